"""The web's side of the queue on a real Redis."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import own_keys, wait_until
from queue_fixtures import ANSWER, IMAGE, answer, ask_in_background, die, images, push, result_of, waiting_ids
from redis import Redis
from redis.exceptions import RedisError

import settings
from helpers import ServiceError
from image_queue import Job, NoModelServer, QueueFull, ResultTimeout, ServerQueue, WebQueue, memory
from image_queue.pending_job import PendingJob

pytest_plugins = ["queue_fixtures"]


def test_an_image_gets_its_answer(web: WebQueue, server: ServerQueue) -> None:
    asked = ask_in_background(web)

    batch = server.take(32, wait=10)
    answer(server, batch)

    assert images(batch) == [IMAGE]
    assert asked.result(10) == ANSWER


def test_an_answered_image_leaves_no_key(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    asked = ask_in_background(web)
    batch = server.take(32, wait=10)

    answer(server, batch)

    assert asked.result(10) == ANSWER
    announced = {f"{settings.IMAGE_QUEUE}:models", f"{settings.IMAGE_QUEUE}:model:digits"}
    assert {key.decode() for key in own_keys(redis)} == {server.heartbeat, *announced}


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

    keys = [key.decode() for key in own_keys(redis)]
    assert all(key.startswith(settings.IMAGE_QUEUE) for key in keys)
    kinds = {key: re.sub(r":[^:]*$", "", key) for key in keys}
    permanent = {kinds[key] for key in keys if redis.pttl(key) == -1}
    assert permanent == {settings.IMAGE_QUEUE, f"{settings.IMAGE_QUEUE}:taken"}
    assert {f"{settings.IMAGE_QUEUE}:{part}" for part in ("server", "result", "accepted")} <= set(kinds.values())
    assert [each.result(10) for each in asked[:2]] == [ANSWER] * 2
    with pytest.raises(ResultTimeout):
        asked[2].result(10)


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


def test_job_over_the_limit_that_was_already_taken_is_answered(
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


def test_images_in_flight_are_limited_by_the_connections_of_redis(
    redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    web._limit_connections(3)
    server.take(1)  # connects
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


def test_address_never_contains_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", "redis://user:secret@127.0.0.1:7/0")

    assert WebQueue().address == "127.0.0.1:7"


def test_jobs_wait_in_memory_and_beyond_its_limit_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("same", "A" * 1000, time.time() + 10)
    monkeypatch.setattr(memory, "_free", 2 * len(job.dump()))
    jobs = [PendingJob(job) for _ in range(3)]
    for each in jobs:
        each.prepare_to_wait()

    assert [each._file is not None for each in jobs] == [False, False, True]
    assert {each.read() for each in jobs} == {job.dump()}

    jobs[0].close()  # leaves room for another one
    jobs.append(PendingJob(job))
    jobs[3].prepare_to_wait()
    assert jobs[3]._file is None
    for each in jobs:
        each.close()
