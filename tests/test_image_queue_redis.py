"""Both sides of the queue with a Redis that fails, restarts, is full or too old."""

import errno
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from harness import free_port, own_keys, run_redis, wait_until
from queue_fixtures import ABOUT, ANSWER, IMAGE, answer, ask_in_background, ids, images, push, result_of
from redis import Redis
from redis.exceptions import RedisError

import settings
from helpers import StartupError
from image_queue import QueueFull, RedisDown, ServerQueue, WebQueue
from image_queue.pending_job import PendingJob

pytest_plugins = ["queue_fixtures"]


@contextmanager
def ready_redis(log: Path, port: int, *options: str) -> Iterator[Any]:
    with run_redis(log, port, *options) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is ready")
        yield process


def test_without_redis_a_request_fails_after_redis_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REDIS_PORT", free_port())
    monkeypatch.setattr(settings, "REDIS_TIMEOUT", 0.6)
    started = time.monotonic()

    with pytest.raises(RedisDown):
        WebQueue().ask(IMAGE, time.time() + 30)

    assert 0.5 < time.monotonic() - started < 5


def test_redis_restart_without_its_data_loses_no_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    web = WebQueue()
    with ready_redis(tmp_path / "log", port) as process:
        asked = ask_in_background(web, 30)
        wait_until(lambda: web.waiting() == 1, "the job waits")
        process.stop(9)
    wait_until(lambda: "does not answer" in caplog.text, "the log says that Redis does not answer")

    with ready_redis(tmp_path / "log2", port):
        server = ServerQueue(ABOUT, 5)
        server.join()
        batch = server.take(1, wait=10)
        answer(server, batch)

        assert asked.result(10) == ANSWER
        assert images(batch) == [IMAGE]


def test_job_is_pushed_again_when_redis_is_replaced_between_polls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """redis-py reconnects silently, so no error tells the web that its job is gone."""
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.3)
    web = WebQueue()
    poll, polled, replaced = web._poll, threading.Event(), threading.Event()

    def poll_then_hold(*arguments: Any) -> Any:
        reply = poll(*arguments)
        if not replaced.is_set():
            polled.set()
            replaced.wait(20)
        return reply

    monkeypatch.setattr(web, "_poll", poll_then_hold)
    with ready_redis(tmp_path / "log", port):
        asked = ask_in_background(web)
        assert polled.wait(10)
    with ready_redis(tmp_path / "log2", port):
        replaced.set()
        server = ServerQueue(ABOUT, 5)
        server.join()
        batch = server.take(1, wait=3)
        assert batch.jobs, "the new Redis has no job"
        answer(server, batch)

        assert asked.result(10) == ANSWER


def no_space(**_: Any) -> IO[bytes]:
    raise OSError(errno.ENOSPC, "No space left on device")


def space_for_ten_bytes(**_: Any) -> IO[bytes]:
    """Return a file on a disk that is full after ten bytes."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:10])

    return Full()


@pytest.mark.parametrize("disk", [no_space, space_for_ten_bytes])
def test_full_disk_loses_no_image(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, disk: Any
) -> None:
    monkeypatch.setattr("image_queue.pending_job.TemporaryFile", disk)
    poll = web._poll

    def poll_after_a_restart(*arguments: Any) -> Any:
        monkeypatch.setattr(web, "_poll", poll)
        redis.delete(*own_keys(redis))
        raise RedisError("Redis has restarted")

    monkeypatch.setattr(web, "_poll", poll_after_a_restart)
    asked = ask_in_background(web)
    wait_until(lambda: web._poll is poll and web.waiting() == 1, "the job is pushed again")
    server.join()

    batch = server.take(32, wait=10)
    answer(server, batch)

    assert asked.result(10) == ANSWER
    assert images(batch) == [IMAGE]


def test_each_outage_of_redis_begins_with_a_short_pause(monkeypatch: pytest.MonkeyPatch, web: WebQueue) -> None:
    monkeypatch.setattr("image_queue.web_queue.pauses", lambda: iter([0.01, 60.0]))
    replies = iter([RedisError("down"), None, RedisError("down again"), ANSWER])

    def poll(*_: object) -> Any:
        reply = next(replies)
        if isinstance(reply, RedisError):
            raise reply
        return reply

    monkeypatch.setattr(web, "_poll", poll)

    assert web.ask(IMAGE, time.time() + 5) == ANSWER


def test_answer_sent_to_a_dead_connection_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    """After an error the web finds its job in Redis and waits. Then a poll on the dead connection gets the answer."""
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.3)
    poll, errors = web._poll, iter([RedisError("down")])
    known, checked = web._known, threading.Event()

    def look(job: PendingJob) -> bool:
        result = known(job)
        checked.set()
        return result

    def poll_after_an_error(*arguments: Any) -> Any:
        for error in errors:
            raise error
        return poll(*arguments)

    monkeypatch.setattr(web, "_poll", poll_after_an_error)
    monkeypatch.setattr(web, "_known", look)
    asked = ask_in_background(web)
    first = server.take(1, wait=5)
    assert checked.wait(5)
    redis.delete(web.accepted_key(first.jobs[0].id))  # as when the answer is published and then lost
    redis.ltrim(server.taken, 1, -1)

    again = server.take(1, wait=5)
    answer(server, again)

    assert asked.result(10) == ANSWER
    assert again.jobs[0].id == first.jobs[0].id


def test_jobs_are_still_computed_when_redis_is_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    with ready_redis(tmp_path / "log", port, "--maxmemory-policy", "noeviction"):
        redis = Redis(port=port)
        server = ServerQueue(ABOUT, 5)
        server.join()
        push(redis, "a", "b")
        redis.config_set("maxmemory", "1")
        server._next_beat = 0
        server.beat()
        server.join()

        batch = server.take(1, wait=2)
        answer(server, batch)

        assert result_of(redis, "a") == ANSWER
        assert ids(server.take(1, wait=2)) == ["b"]


def test_image_is_refused_at_once_when_redis_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    options = ["--maxmemory", "1", "--maxmemory-policy", "noeviction"]
    with ready_redis(tmp_path / "log", port, *options), pytest.raises(QueueFull, match="no memory"):
        WebQueue().ask(IMAGE, time.time() + 30)

    assert f"Redis at 127.0.0.1:{port} has no memory left" in caplog.text
    assert caplog.text.rstrip().endswith("images are refused")


def test_redis_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, web: WebQueue) -> None:
    monkeypatch.setattr("image_queue.diagnosis.OLDEST_REDIS", 999)

    with pytest.raises(StartupError, match="999 or newer is needed"):
        web.check()


def test_redis_on_a_unix_socket_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", f"unix://{tmp_path}/socket?db=0")
    with run_redis(tmp_path / "log", free_port(), "--unixsocket", str(tmp_path / "socket")):
        web, queue = WebQueue(), ServerQueue(ABOUT, 5)
        wait_until((tmp_path / "socket").exists, "Redis is up")
        queue.join()
        asked = ask_in_background(web)

        batch = queue.take(32, wait=10)
        answer(queue, batch)

        assert asked.result(10) == ANSWER
