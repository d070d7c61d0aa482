"""The model server's side of the queue on a real Redis."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import wait_until
from queue_fixtures import ABOUT, ANSWER, answer, die, ids, in_background, push, result_of, waiting_ids
from redis import Redis

import settings
from image_queue import HeartbeatExpired, Job, ServerQueue, WebQueue, failed

pytest_plugins = ["queue_fixtures"]


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
def test_only_the_start_of_an_oversized_entry_is_parsed(
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
    all_ready = threading.Barrier(len(others))
    for other in others:
        other._scripts["reclaim"] = together(all_ready, other._scripts["reclaim"])  # type: ignore[assignment]

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(lambda other: other.reclaim(), others))

    assert waiting_ids(redis) == [f"job{i}" for i in range(40)]


def together(barrier: threading.Barrier, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call`, delayed until all threads of the barrier are about to call it."""

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

    restarted = ServerQueue(ABOUT, 60)
    restarted.join()

    assert waiting_ids(redis) == ["a", "b"]
    assert list(restarted.live_servers()) == [restarted.name]


def test_restarted_server_may_serve_another_model(redis: Redis) -> None:
    killed = ServerQueue(ABOUT, 60)
    killed.join()
    killed._slot_socket.close()

    restarted = ServerQueue(ABOUT | {"weights": "better.keras"}, 60)
    restarted.join()

    assert [about["weights"] for about in restarted.live_servers().values()] == ["better.keras"]


def test_two_live_servers_never_share_a_slot(server: ServerQueue, second: ServerQueue) -> None:
    assert server.slot != second.slot


def test_jobs_taken_by_a_delayed_command_are_reclaimed(redis: Redis, server: ServerQueue) -> None:
    """Its connection broke, and the network delivers the command after the server has joined again."""
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
    server.redis.lmove(settings.IMAGE_QUEUE, server.taken, "RIGHT", "RIGHT")  # taken before it notices

    with pytest.raises(HeartbeatExpired):
        answer(server, frozen)

    assert result_of(redis, "a") == ANSWER
    assert [json.loads(job)["id"] for job in redis.lrange(server.taken, 0, -1)] == ["b"]


def test_server_notices_that_its_heartbeat_expired(server: ServerQueue) -> None:
    die(server)
    server._next_beat = 0

    with pytest.raises(HeartbeatExpired):
        server.beat()
