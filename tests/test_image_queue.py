"""Both sides of the queue on a real Redis."""

import errno
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest
from harness import (
    free_port,
    own_keys,
    run_redis,
    wait_until,
)
from redis import Redis
from redis.exceptions import RedisError

import settings
from helpers import ServiceError, StartupError
from image_queue import (
    Answer,
    Batch,
    HeartbeatExpired,
    Job,
    NoModelServer,
    QueueFull,
    RedisDown,
    ResultTimeout,
    ServerQueue,
    WebQueue,
    failed,
)
from image_queue.pending_job import PendingJob

T = TypeVar("T")
IMAGE = "aW1hZ2U="  # base64
ABOUT = {"model": "digits", "weights": "digits.keras"}
ANSWER: Answer = {"predictions": [{"label": "three", "probability": 0.75}]}


@pytest.fixture
def web(redis: Redis) -> WebQueue:
    return WebQueue()


def joined() -> Iterator[ServerQueue]:
    queue = ServerQueue(ABOUT, 5)
    queue.join()
    yield queue
    queue._slot_socket.close()


@pytest.fixture
def server(redis: Redis) -> Iterator[ServerQueue]:
    yield from joined()


@pytest.fixture
def second(redis: Redis) -> Iterator[ServerQueue]:
    yield from joined()


def push(redis: Redis, *ids: str, **fields: Any) -> None:
    for job_id in ids:
        job = {"id": job_id, "image": IMAGE, "deadline": time.time() + 30} | fields
        redis.rpush(settings.IMAGE_QUEUE, json.dumps(job))


def ids(batch: Batch) -> list[str]:
    return [job.id for job in batch.jobs]


def waiting_ids(redis: Redis) -> list[str]:
    return [json.loads(job)["id"] for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)]


def result_of(redis: Redis, job_id: str) -> Any:
    results = redis.lrange(f"{settings.IMAGE_QUEUE}:result:{job_id}", 0, -1)
    assert len(results) <= 1
    return json.loads(results[0]) if results else None


def die(queue: ServerQueue) -> None:
    """Leave what kill -9 leaves once the heartbeat has expired."""
    queue.redis.delete(queue.heartbeat)


def in_background(call: Callable[[], T]) -> Future[T]:
    return ThreadPoolExecutor(1).submit(call)


def ask_in_background(web: WebQueue, seconds: float = 20) -> Future[Answer]:
    return in_background(lambda: web.ask(IMAGE, time.time() + seconds))


def answer(server: ServerQueue, batch: Batch, content: Answer = ANSWER) -> None:
    server.answer(batch.jobs, [content] * len(batch.jobs), batch.entries)


@contextmanager
def ready_redis(log: Path, port: int, *options: str) -> Iterator[Any]:
    with run_redis(log, port, *options) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is ready")
        yield process


def test_an_image_gets_its_answer(web: WebQueue, server: ServerQueue) -> None:
    asked = ask_in_background(web)

    batch = server.take(32, wait=10)
    answer(server, batch)

    assert batch.jobs[0].image == IMAGE
    assert asked.result(10) == ANSWER


def test_an_answered_image_leaves_no_key(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    asked = ask_in_background(web)
    batch = server.take(32, wait=10)

    answer(server, batch)

    assert asked.result(10) == ANSWER
    assert own_keys(redis) == [server.heartbeat.encode()]


def test_answered_job_is_not_pushed_again(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    job = PendingJob(Job("same", IMAGE, time.time() + 10))
    web._push(job, accepted=False)
    batch = server.take(32)
    answer(server, batch)

    assert web._known(job)
    assert waiting_ids(redis) == []
    assert result_of(redis, "same") == ANSWER


def test_job_is_unknown_when_its_answer_was_popped_but_lost(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    """Redis deletes an answer when a poll fetches it, but the connection may break before the answer arrives."""
    job = PendingJob(Job("same", IMAGE, time.time() + 10))
    web._push(job, accepted=False)
    batch = server.take(32)
    answer(server, batch)
    assert redis.blpop([web.result_key("same")], 1)

    assert not web._known(job)


def test_jobs_are_taken_first_in_first_out_up_to_the_limit(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b", "c", "d", "e")

    assert ids(server.take(3)) == ["a", "b", "c"]
    assert ids(server.take(3)) == ["d", "e"]
    assert ids(server.take(3)) == []


def test_take_waits_only_for_the_first_job(redis: Redis, server: ServerQueue) -> None:
    taken = in_background(lambda: server.take(32, wait=4))
    wait_until(lambda: redis.info("clients")["blocked_clients"], "the server waits")
    started = time.monotonic()

    push(redis, "a")

    assert ids(taken.result(10)) == ["a"]
    assert time.monotonic() - started < 2


def test_only_the_queue_and_taken_lists_have_no_ttl(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    asked = [ask_in_background(web, 3) for _ in range(2)]
    wait_until(lambda: web.waiting() == 2, "two jobs wait")
    batch = server.take(1)
    push(redis, "nobody-waits")
    last = server.take(2)
    server.answer(batch.jobs + last.jobs, [ANSWER] * 3, 3)
    push(redis, "waiting")
    server.take(1)
    asked.append(ask_in_background(web, 3))
    wait_until(lambda: web.waiting() == 1, "a third job waits")

    kinds = {}
    for key in (key.decode() for key in own_keys(redis)):
        assert key.startswith(settings.IMAGE_QUEUE)
        kinds[re.sub(r":[^:]*$", "", key)] = redis.pttl(key)
    permanent = {kind for kind, ttl in kinds.items() if ttl == -1}
    assert permanent == {settings.IMAGE_QUEUE, f"{settings.IMAGE_QUEUE}:taken"}
    assert {f"{settings.IMAGE_QUEUE}:{part}" for part in ("server", "result", "accepted")} <= set(kinds)
    assert [each.result(10) for each in asked[:2]] == [ANSWER] * 2
    with pytest.raises(ResultTimeout):
        asked[2].result(10)


def test_expired_job_is_dropped_without_an_answer(redis: Redis, server: ServerQueue) -> None:
    push(redis, "late", deadline=time.time() - 1)
    push(redis, "in-time")

    batch = server.take(32)
    answer(server, batch)

    assert ids(batch) == ["in-time"]
    assert result_of(redis, "late") is None
    assert redis.llen(server.taken) == 0


def test_nothing_is_published_when_the_number_of_answers_is_wrong(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b")
    batch = server.take(32)

    with pytest.raises(ValueError, match="zip"):
        server.answer(batch.jobs, [ANSWER], batch.entries)

    assert result_of(redis, "a") is None
    assert redis.llen(server.taken) == 2


@pytest.mark.parametrize(
    "malformed",
    [b"not json", b"[]", b"7", b"null", b"{}", b'{"id": 7}', b'{"id": "\\ud800"}', b'{"id": ""}', b"\xff" * 9,
     b"[" * 100_000, b'{"id": "' + b"x" * 100 + b'"}'],
)  # fmt: skip
def test_malformed_entry_without_an_id_is_dropped(redis: Redis, server: ServerQueue, malformed: bytes) -> None:
    redis.rpush(settings.IMAGE_QUEUE, malformed)
    push(redis, "good")

    batch = server.take(32)
    answer(server, batch)

    assert ids(batch) == ["good"]
    assert redis.llen(server.taken) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"image": 7}, {"image": None}, {"deadline": "soon"}, {"deadline": float("nan")}, {"deadline": float("inf")},
     {"deadline": None}, {"crashes": "many"}, {"crashes": -1}],
)  # fmt: skip
def test_job_with_an_invalid_field_can_be_answered(redis: Redis, server: ServerQueue, wrong: dict[str, Any]) -> None:
    push(redis, "wrong", **wrong)

    batch = server.take(32)
    assert [job.image for job in batch.jobs] == [""]
    answer(server, batch, failed("No."))

    assert result_of(redis, "wrong") == failed("No.")


@pytest.mark.parametrize(
    "malformed", [b'{"id": "wrong", "image": "AA', b'{"deadline": 1, "id":"wrong"', b'{"id": "wrong"}}']
)
def test_invalid_json_that_contains_an_id_can_be_answered(redis: Redis, server: ServerQueue, malformed: bytes) -> None:
    redis.rpush(settings.IMAGE_QUEUE, malformed)

    batch = server.take(32)
    answer(server, batch, failed("No."))

    assert result_of(redis, "wrong") == failed("No.")


@pytest.mark.parametrize("waits", [True, False])
def test_oversized_entry_is_answered_without_parsing_it(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, server: ServerQueue, waits: bool
) -> None:
    parsed: list[int] = []
    parse = Job.parse
    monkeypatch.setattr(Job, "parse", lambda raw: parsed.append(len(raw)) or parse(raw))  # type: ignore[func-returns-value]
    if waits:
        taken = in_background(lambda: server.take(32, wait=4))
        wait_until(lambda: redis.info("clients")["blocked_clients"], "the server waits")
    push(redis, "long", image="A" * 20_000_000)

    batch = taken.result(10) if waits else server.take(32)
    answer(server, batch, failed("No."))

    assert parsed == [200]
    assert result_of(redis, "long") == failed("No.")
    assert redis.llen(server.taken) == 0


@pytest.mark.parametrize("malformed", [b"", b"[]", b"7", b"\xff", b"{", b"[" * 100_000])
def test_malformed_heartbeat_is_read_as_empty(redis: Redis, web: WebQueue, malformed: bytes) -> None:
    redis.set(f"{settings.IMAGE_QUEUE}:server:odd", malformed, ex=60)

    assert web.live_servers() == ({"odd": {}} if malformed else {})


def test_jobs_of_a_dead_server_are_requeued_at_the_head_in_order(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "a", "b", "c", "d")
    server.take(3)

    die(server)
    second.reclaim()

    assert waiting_ids(redis) == ["a", "b", "c", "d"]
    assert redis.llen(server.taken) == 0


def test_jobs_of_a_live_server_are_not_reclaimed(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    push(redis, "a", "b")
    server.take(2)

    second.reclaim()

    assert waiting_ids(redis) == []
    assert redis.llen(server.taken) == 2


def test_only_one_of_several_servers_reclaims_a_dead_one(redis: Redis, server: ServerQueue) -> None:
    push(redis, *(f"job{i}" for i in range(40)))
    server.take(40)
    die(server)
    others = [ServerQueue(ABOUT, 5) for _ in range(6)]
    all_found_it = threading.Barrier(len(others))
    for other in others:
        other._scripts["reclaim"] = after(all_found_it, other._scripts["reclaim"])  # type: ignore[assignment]

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(lambda other: other.reclaim(), others))

    assert waiting_ids(redis) == [f"job{i}" for i in range(40)]


def after(barrier: threading.Barrier, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wait until all threads of the barrier are about to call `call`."""

    def wait_and_call(*arguments: Any) -> Any:
        barrier.wait(10)
        return call(*arguments)

    return wait_and_call


def test_restarted_server_reclaims_its_jobs_at_once(redis: Redis) -> None:
    killed = ServerQueue(ABOUT, 60)
    killed.join()
    push(redis, "a", "b")
    killed.take(2)
    killed._slot_socket.close()  # as the kernel does when the process dies

    again = ServerQueue(ABOUT, 60)
    again.join()

    assert waiting_ids(redis) == ["a", "b"]
    assert list(again.live_servers()) == [again.name]


def test_restarted_server_may_serve_another_model(redis: Redis) -> None:
    killed = ServerQueue(ABOUT, 60)
    killed.join()
    killed._slot_socket.close()

    again = ServerQueue(ABOUT | {"weights": "better.keras"}, 60)
    again.join()

    assert [about["weights"] for about in again.live_servers().values()] == ["better.keras"]


def test_two_live_servers_never_share_a_slot(server: ServerQueue, second: ServerQueue) -> None:
    assert server.slot != second.slot


def test_jobs_taken_by_a_delayed_command_are_reclaimed(redis: Redis, server: ServerQueue) -> None:
    """The connection was cut, and the network delivers the command later."""
    old_list = server.taken
    server.join()
    push(redis, "a", "b")

    server._scripts["take"]([settings.IMAGE_QUEUE, old_list], [1])
    batch = server.take(1)
    answer(server, batch)
    server.reclaim()

    assert ids(batch) == ["b"]
    assert waiting_ids(redis) == ["a"]


def test_after_a_crash_each_job_is_computed_alone(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    push(redis, "a", "b", "c")
    server.take(2)
    die(server)
    second.reclaim()

    batches = [second.take(32) for _ in range(3)]

    assert [ids(batch) for batch in batches] == [["a"], ["b"], ["c"]]
    assert [batch.suspect for batch in batches] == [True, True, False]


def test_no_suspect_is_taken_while_another_batch_is_computed(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a")
    push(redis, "suspect", crashes=1)
    push(redis, "b")

    assert ids(server.take(32, ahead=True)) == ["a"]
    assert ids(server.take(32, ahead=True)) == []
    assert waiting_ids(redis) == ["suspect", "b"]


def test_job_in_flight_at_three_crashes_is_given_up(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    push(redis, "killer", "mate")
    server.take(2)
    push(redis, "later")
    die(server)
    second.reclaim()
    assert ids(second.take(32)) == ["killer"]
    die(second)
    server.join()
    assert waiting_ids(redis) == ["mate", "later", "killer"]
    assert [ids(server.take(32)) for _ in range(3)] == [["mate"], ["later"], ["killer"]]
    server.redis.ltrim(server.taken, 2, -1)

    die(server)
    second.join()

    assert result_of(redis, "killer")["error"]["code"] == "model_failed"
    assert waiting_ids(redis) == []


def test_given_up_job_leaves_no_accepted_marker(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    """With a marker, the web would not notice that the answer was lost."""
    push(redis, "killer", crashes=2)
    redis.set(server.accepted_key("killer"), "", ex=60)
    server.take(1)

    die(server)
    second.reclaim()

    assert result_of(redis, "killer")["error"]["code"] == "model_failed"
    assert not redis.exists(server.accepted_key("killer"))


def test_job_alone_in_flight_at_two_crashes_is_tried_again(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "unlucky")
    for killed, other in ((server, second), (second, server)):
        killed.take(1)
        die(killed)
        other.join()

    batch = server.take(1)

    assert ids(batch) == ["unlucky"]
    assert batch.suspect


def test_leaving_requeues_jobs_without_counting_a_crash(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b")
    server.take(2)

    server.leave()

    assert [json.loads(job).get("crashes") for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)] == [None, None]
    assert waiting_ids(redis) == ["a", "b"]
    assert server.live_servers() == {}


def test_late_answer_is_published_without_touching_the_lists(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "a")
    frozen = server.take(1)
    die(server)
    second.reclaim()
    push(redis, "b")
    server.redis.lmove(settings.IMAGE_QUEUE, server.taken, "RIGHT", "RIGHT")  # taken before it noticed

    with pytest.raises(HeartbeatExpired):
        answer(server, frozen)

    assert result_of(redis, "a") == ANSWER
    assert [json.loads(job)["id"] for job in redis.lrange(server.taken, 0, -1)] == ["b"]


def test_server_notices_that_its_heartbeat_expired(server: ServerQueue) -> None:
    die(server)
    server._next_beat = 0

    with pytest.raises(HeartbeatExpired):
        server.beat()


def test_second_model_on_the_same_queue_is_refused(redis: Redis, server: ServerQueue) -> None:
    other = ServerQueue({"model": "ResNet50", "weights": "imagenet"}, 5)

    with pytest.raises(StartupError, match="IMAGE_QUEUE"):
        other.join()


def test_concurrent_requests_never_overfill_the_queue(monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue,
                                                  server: ServerQueue) -> None:  # fmt: skip
    monkeypatch.setattr(settings, "MAX_QUEUE", 5)
    outcomes = []

    def ask() -> None:
        try:
            web.ask(IMAGE, time.time() + 1)
        except ServiceError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sorted(outcomes) == ["queue_full"] * 35 + ["timeout"] * 5


def test_full_queue_without_a_model_server_is_reported(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue
) -> None:
    monkeypatch.setattr(settings, "MAX_QUEUE", 1)
    push(redis, "a")

    with pytest.raises(NoModelServer):
        web.ask(IMAGE, time.time() + 5)


@pytest.mark.parametrize(
    ("alive", "cause"), [(False, "no model server is alive"), (True, "the model servers are busy")]
)
def test_timeout_names_its_cause(web: WebQueue, server: ServerQueue, alive: bool, cause: str) -> None:
    if not alive:
        die(server)

    with pytest.raises(ResultTimeout, match=cause):
        web.ask(IMAGE, time.time() + 0.5)


def test_a_request_that_times_out_leaves_no_key(redis: Redis, web: WebQueue) -> None:
    with pytest.raises(ResultTimeout):
        web.ask(IMAGE, time.time() + 0.5)

    assert own_keys(redis) == []


def test_job_whose_push_got_no_reply_is_queued_once(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    append, known = web._append, web._known
    checked = threading.Event()

    def without_reply(*arguments: Any) -> bool:
        append(*arguments)
        raise RedisError("the connection broke")

    def look(job: PendingJob) -> bool:
        try:
            return known(job)
        finally:
            checked.set()

    monkeypatch.setattr(web, "_append", without_reply)
    monkeypatch.setattr(web, "_known", look)
    asked = ask_in_background(web)
    assert checked.wait(10)

    batch = server.take(32, wait=10)
    answer(server, batch)

    assert asked.result(10) == ANSWER
    assert batch.entries == 1


def test_surplus_job_taken_before_its_withdrawal_is_answered(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    monkeypatch.setattr(settings, "MAX_QUEUE", 1)
    push(redis, "first")
    remove, batches = web._remove, []

    def too_late(*arguments: Any, **options: Any) -> bool:
        batches.append(server.take(32))
        return remove(*arguments, **options)

    monkeypatch.setattr(web, "_remove", too_late)
    asked = ask_in_background(web)
    wait_until(lambda: len(batches) == 1, "both are taken")

    answer(server, batches[0])

    assert asked.result(10) == ANSWER


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
        assert [job.image for job in batch.jobs] == [IMAGE]


def test_job_is_pushed_again_when_redis_is_replaced_between_polls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """redis-py reconnects silently, so no error tells the web that its job is gone."""
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.3)
    web = WebQueue()
    poll, polled, replaced = web._poll, threading.Event(), threading.Event()

    def poll_then_wait(*arguments: Any) -> Any:
        reply = poll(*arguments)
        if not replaced.is_set():
            polled.set()
            replaced.wait(20)
        return reply

    monkeypatch.setattr(web, "_poll", poll_then_wait)
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


# Clocks


def shift_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Change the clock of this process, as if the next to read it ran on a machine with a wrong clock."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("shift", [90, -90, 7200, -86400])
def test_a_model_server_with_a_wrong_clock_answers(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    asked = ask_in_background(web)
    wait_until(lambda: web.waiting() == 1, "the job waits")
    shift_clock(monkeypatch, shift)

    batch = server.take(32)
    assert [job.image for job in batch.jobs] == [IMAGE]
    answer(server, batch)

    assert asked.result(10) == ANSWER


def test_model_server_with_a_fast_clock_reclaims_jobs(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, second: ServerQueue
) -> None:
    asked = ask_in_background(web)
    assert len(server.take(1, wait=5).jobs) == 1
    die(server)
    shift_clock(monkeypatch, 7200)

    second.reclaim()
    batch = second.take(1)
    answer(second, batch)

    assert asked.result(10) == ANSWER
    assert batch.suspect


@pytest.mark.parametrize("shift", [3600, -3600])
def test_clock_change_on_the_web_server_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.1)
    asked = ask_in_background(web, 3)
    wait_until(lambda: web.waiting() == 1, "the job waits")
    shift_clock(monkeypatch, shift)
    stepped = time.monotonic()
    if shift < 0:
        with pytest.raises(ResultTimeout):
            asked.result(10)
        assert time.monotonic() - stepped < 6
        return
    before = polls(redis)
    wait_until(lambda: polls(redis) >= before + 5, "the web polls five times")
    batch = server.take(1)
    answer(server, batch)

    assert asked.result(10) == ANSWER


def polls(redis: Redis) -> int:
    """How often anybody has waited for an answer in this Redis."""
    statistics: dict[str, Any] = redis.info("commandstats")
    return int(statistics.get("cmdstat_blpop", {"calls": 0})["calls"])


@pytest.mark.parametrize("shift", [0, 7200])
def test_job_with_an_expired_marker_is_dropped(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    """The web process died; otherwise it would have removed the job."""
    job = Job("late", IMAGE, time.time() + 0.3)
    web._push(PendingJob(job), accepted=False)
    push(redis, "in-time", deadline=time.time() + shift + 30)
    wait_until(lambda: not redis.exists(web.accepted_key("late")), "the marker expires")
    wait_until(lambda: time.time() > job.deadline, "the deadline passes")
    shift_clock(monkeypatch, shift)

    batch = server.take(32)
    answer(server, batch)

    assert ids(batch) == ["in-time"]
    assert result_of(redis, "late") is None


def test_job_in_a_batch_expires_with_its_marker(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    """The deadlines, by a wrong clock, have no effect."""
    for name, seconds in (("soon", 2.0), ("later", 30.0)):
        job = PendingJob(Job(name, IMAGE, time.time() - 7200))
        job.until = time.monotonic() + seconds
        web._push(job, accepted=False)
    batch = server.take(2)
    batch.images = [None, None]
    taken = ids(batch)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 5)

    assert batch.drop_expired() == 1
    assert (taken, ids(batch)) == (["soon", "later"], ["later"])


@pytest.mark.parametrize(("marked", "left"), [(None, 3602), (200, 202)])
def test_answer_is_kept_until_the_deadline_but_at_most_an_hour(
    redis: Redis, server: ServerQueue, marked: int | None, left: int
) -> None:
    push(redis, "tool", deadline=1e300)
    if marked:
        redis.set(server.accepted_key("tool"), "", ex=marked)
    batch = server.take(1)

    answer(server, batch)

    assert result_of(redis, "tool") == ANSWER
    assert left - 5 <= redis.ttl(server.result_key("tool")) <= left + 1


# Connections


def test_images_in_flight_are_limited_by_the_connections_of_redis(
    redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    web._limit_connections(3)
    before = redis.info("clients")["connected_clients"]
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(web.ask, IMAGE, time.time() + 20) for _ in range(30)]
        most = 0
        while not all(each.done() for each in asked):
            batch = server.take(32, wait=1)
            most = max(most, redis.info("clients")["connected_clients"] - before)
            answer(server, batch)

    assert [each.result() for each in asked] == [ANSWER] * 30
    assert most <= 3


def test_image_without_a_free_connection_is_refused(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    monkeypatch.setattr(settings, "REDIS_TIMEOUT", 0.3)
    web._limit_connections(1)
    first = ask_in_background(web)
    wait_until(lambda: web.waiting() == 1, "the first job waits")

    with pytest.raises(QueueFull, match="no free connection"):
        web.ask(IMAGE, time.time() + 20)

    batch = server.take(1)
    answer(server, batch)
    assert first.result(10) == ANSWER


def no_file(**_: Any) -> IO[bytes]:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(**_: Any) -> IO[bytes]:
    """Return a file on a disk that is full after ten bytes."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:10])

    return Full()


@pytest.mark.parametrize("disk", [no_file, half_a_file])
def test_full_disk_loses_no_image(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, disk: Any
) -> None:
    monkeypatch.setattr("image_queue.pending_job.TemporaryFile", disk)
    poll = web._poll

    def forgetting_poll(*arguments: Any) -> Any:
        monkeypatch.setattr(web, "_poll", poll)
        redis.delete(*own_keys(redis))
        raise RedisError("Redis has restarted")

    monkeypatch.setattr(web, "_poll", forgetting_poll)
    asked = ask_in_background(web)
    wait_until(lambda: web._poll is poll and web.waiting() == 1, "the job is pushed again")
    server.join()

    batch = server.take(32, wait=10)
    answer(server, batch)

    assert asked.result(10) == ANSWER
    assert [job.image for job in batch.jobs] == [IMAGE]


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


def test_address_never_contains_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", "redis://user:secret@127.0.0.1:7/0")

    assert WebQueue().address == "127.0.0.1:7"
