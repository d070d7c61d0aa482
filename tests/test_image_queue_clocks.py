"""Both sides of the queue on machines whose clocks differ."""

import time
from typing import Any

import pytest
from harness import wait_until
from queue_fixtures import ANSWER, IMAGE, answer, ask_in_background, die, ids, images, push, result_of
from redis import Redis

import settings
from image_queue import Job, ResultTimeout, ServerQueue, WebQueue
from image_queue.pending_job import PendingJob

pytest_plugins = ["queue_fixtures"]


def shift_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Shift the clock of this process, so that what runs from now on seems to be on a machine with a wrong clock."""
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
    assert images(batch) == [IMAGE]
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
    shifted = time.monotonic()
    if shift < 0:
        with pytest.raises(ResultTimeout):
            asked.result(10)
        assert time.monotonic() - shifted < 6
        return
    before = polls(redis)
    wait_until(lambda: polls(redis) >= before + 5, "the web polls five times")
    batch = server.take(1)
    answer(server, batch)

    assert asked.result(10) == ANSWER


def polls(redis: Redis) -> int:
    """How often this Redis has been polled for an answer."""
    statistics: dict[str, Any] = redis.info("commandstats")
    return int(statistics.get("cmdstat_blpop", {"calls": 0})["calls"])


@pytest.mark.parametrize("shift", [0, 7200])
def test_job_with_an_expired_marker_is_dropped(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    """The job is still queued because its web process died."""
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
    """The deadlines are from a wrong clock and have no effect."""
    for name, seconds in (("soon", 2.0), ("later", 30.0)):
        job = PendingJob(Job(name, IMAGE, time.time() - 7200))
        job.until = time.monotonic() + seconds
        web._push(job, accepted=False)
    batch = server.take(2)
    taken = ids(batch)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 5)

    assert batch.drop_expired() == 1
    assert (taken, ids(batch)) == (["soon", "later"], ["later"])


@pytest.mark.parametrize(("marked", "left"), [(None, 3602), (200, 202)])
def test_answer_is_kept_until_the_deadline_but_at_most_an_hour(
    redis: Redis, server: ServerQueue, marked: int | None, left: int
) -> None:
    push(redis, "endless", deadline=1e300)
    if marked:
        redis.set(server.accepted_key("endless"), "", ex=marked)
    batch = server.take(1)

    answer(server, batch)

    assert result_of(redis, "endless") == ANSWER
    assert left - 5 <= redis.ttl(server.result_key("endless")) <= left + 1
