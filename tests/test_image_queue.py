"""The Redis protocol, both sides, on a real Redis."""

import errno
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import pytest
from conftest import free_port, own_keys, run_redis, wait_until
from redis import Redis
from redis.exceptions import RedisError

import image_queue
import settings
from helpers import ServiceError, StartupError
from image_queue import HeartbeatExpired, Job, ServerQueue, WebQueue, failed
from image_queue import connection as redis_connection

ABOUT = {"model": "digits", "weights": "digits.keras"}
ANSWER = {"predictions": [{"label": "three", "probability": 0.75}]}


@pytest.fixture
def web(redis: Redis) -> WebQueue:
    return WebQueue()


def joined() -> Iterator[ServerQueue]:
    queue = ServerQueue(ABOUT, 5)
    queue.join()
    yield queue
    queue._held.close()


@pytest.fixture
def server(redis: Redis) -> Iterator[ServerQueue]:
    yield from joined()


@pytest.fixture
def second(redis: Redis) -> Iterator[ServerQueue]:
    yield from joined()


def push(redis: Redis, *ids: str, **fields: Any) -> None:
    for job_id in ids:
        job = {"id": job_id, "image": "aW1hZ2U=", "deadline": time.time() + 30} | fields
        redis.rpush(settings.IMAGE_QUEUE, json.dumps(job))


def ids(batch: Any) -> list[str]:
    return [job.id for job in batch.jobs]


def waiting_ids(redis: Redis) -> list[str]:
    return [json.loads(job)["id"] for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)]


def result_of(redis: Redis, job_id: str) -> Any:
    results = redis.lrange(f"{settings.IMAGE_QUEUE}:result:{job_id}", 0, -1)
    assert len(results) <= 1
    return json.loads(results[0]) if results else None


def die(queue: ServerQueue) -> None:
    """What kill -9 leaves behind once the heartbeat has lapsed."""
    queue.redis.delete(queue.heartbeat)


def in_background(call: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(call)


def test_an_image_gets_its_answer(web: WebQueue, server: ServerQueue) -> None:
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))

    batch = server.take(32, wait=10)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert batch.jobs[0].image == "aW1hZ2U="
    assert asked.result(10) == ANSWER


def test_an_answered_image_leaves_no_key(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    batch = server.take(32, wait=10)

    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert asked.result(10) == ANSWER
    assert own_keys(redis) == [server.heartbeat.encode()]


def test_a_job_that_is_answered_is_not_queued_again(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    job = Job("same", "aW1hZ2U=", time.time() + 10)
    web._push(job.id, job.dump(), time.monotonic() + 10, unlimited=False)
    batch = server.take(32)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert web._known(job.id)
    assert waiting_ids(redis) == []
    assert result_of(redis, "same") == ANSWER


def test_an_answer_that_is_lost_on_its_way_is_computed_again(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    """Redis hands it out and forgets it, and the connection breaks before it arrives."""
    job = Job("same", "aW1hZ2U=", time.time() + 10)
    web._push(job.id, job.dump(), time.monotonic() + 10, unlimited=False)
    batch = server.take(32)
    server.answer(batch.jobs, [ANSWER], batch.entries)
    assert redis.blpop([web.result_key("same")], 1)

    assert not web._known(job.id)


def test_first_in_is_first_out_and_a_batch_has_its_limit(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b", "c", "d", "e")

    assert ids(server.take(3)) == ["a", "b", "c"]
    assert ids(server.take(3)) == ["d", "e"]
    assert ids(server.take(3)) == []


def test_taking_waits_for_the_first_job_only(redis: Redis, server: ServerQueue) -> None:
    taken = in_background(lambda: server.take(32, wait=4))
    wait_until(lambda: redis.info("clients")["blocked_clients"], "the server waits")
    started = time.monotonic()

    push(redis, "a")

    assert ids(taken.result(10)) == ["a"]
    assert time.monotonic() - started < 2


def test_only_the_queue_and_the_taken_lists_live_for_ever(redis: Redis, web: WebQueue, server: ServerQueue) -> None:
    asked = [in_background(lambda: web.ask("aW1hZ2U=", time.time() + 3)) for _ in range(2)]
    wait_until(lambda: web.waiting() == 2, "two jobs wait")
    batch = server.take(1)
    push(redis, "nobody-waits")
    last = server.take(2)
    server.answer(batch.jobs + last.jobs, [ANSWER] * 3, 3)
    push(redis, "waiting")
    server.take(1)
    asked.append(in_background(lambda: web.ask("aW1hZ2U=", time.time() + 3)))
    wait_until(lambda: web.waiting() == 1, "another job waits")

    kinds = {}
    for key in (key.decode() for key in own_keys(redis)):
        assert key.startswith(settings.IMAGE_QUEUE)
        kinds[re.sub(r":[^:]*$", "", key)] = redis.pttl(key)
    eternal = {kind for kind, ttl in kinds.items() if ttl == -1}
    assert eternal == {settings.IMAGE_QUEUE, f"{settings.IMAGE_QUEUE}:taken"}
    assert {f"{settings.IMAGE_QUEUE}:{part}" for part in ("server", "result", "accepted")} <= set(kinds)
    assert [each.result(10) for each in asked[:2]] == [ANSWER] * 2
    with pytest.raises(image_queue.ResultTimeout):
        asked[2].result(10)


def test_an_expired_job_is_dropped_unanswered(redis: Redis, server: ServerQueue) -> None:
    push(redis, "late", deadline=time.time() - 1)
    push(redis, "in-time")

    batch = server.take(32)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert ids(batch) == ["in-time"]
    assert result_of(redis, "late") is None
    assert redis.llen(server.taken) == 0


def test_answers_that_are_not_one_per_image_are_not_handed_out(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b")
    batch = server.take(32)

    with pytest.raises(ValueError, match="zip"):
        server.answer(batch.jobs, [ANSWER], batch.entries)

    assert result_of(redis, "a") is None
    assert redis.llen(server.taken) == 2


@pytest.mark.parametrize(
    "rubbish",
    [b"not json", b"[]", b"7", b"null", b"{}", b'{"id": 7}', b'{"id": "\\ud800"}', b'{"id": ""}', b"\xff" * 9,
     b"[" * 100_000, b'{"id": "' + b"x" * 100 + b'"}'],
)  # fmt: skip
def test_rubbish_without_an_id_is_dropped(redis: Redis, server: ServerQueue, rubbish: bytes) -> None:
    redis.rpush(settings.IMAGE_QUEUE, rubbish)
    push(redis, "good")

    batch = server.take(32)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert ids(batch) == ["good"]
    assert redis.llen(server.taken) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"image": 7}, {"image": None}, {"deadline": "soon"}, {"deadline": float("nan")}, {"deadline": float("inf")},
     {"deadline": None}, {"crashes": "many"}, {"crashes": -1}],
)  # fmt: skip
def test_rubbish_with_an_id_can_be_answered(redis: Redis, server: ServerQueue, wrong: dict[str, Any]) -> None:
    push(redis, "wrong", **wrong)

    batch = server.take(32)
    assert [job.image for job in batch.jobs] == [""]
    server.answer(batch.jobs, [failed("No.")], batch.entries)

    assert result_of(redis, "wrong") == failed("No.")


@pytest.mark.parametrize(
    "rubbish", [b'{"id": "wrong", "image": "AA', b'{"deadline": 1, "id":"wrong"', b'{"id": "wrong"}}']
)
def test_rubbish_that_begins_with_an_id_can_be_answered(redis: Redis, server: ServerQueue, rubbish: bytes) -> None:
    redis.rpush(settings.IMAGE_QUEUE, rubbish)

    batch = server.take(32)
    server.answer(batch.jobs, [failed("No.")], batch.entries)

    assert result_of(redis, "wrong") == failed("No.")


@pytest.mark.parametrize("waits", [True, False])
def test_an_entry_too_long_for_an_image_is_not_parsed_but_answered(
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
    server.answer(batch.jobs, [failed("No.")], batch.entries)

    assert parsed == [200]
    assert result_of(redis, "long") == failed("No.")
    assert redis.llen(server.taken) == 0


@pytest.mark.parametrize("rubbish", [b"", b"[]", b"7", b"\xff", b"{", b"[" * 100_000])
def test_a_heartbeat_that_is_rubbish_harms_nobody(redis: Redis, web: WebQueue, rubbish: bytes) -> None:
    redis.set(f"{settings.IMAGE_QUEUE}:server:odd", rubbish, ex=60)

    assert web.live_servers() == ({"odd": {}} if rubbish else {})


def test_jobs_of_a_dead_server_go_back_to_the_head_in_order(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "a", "b", "c", "d")
    server.take(3)

    die(server)
    second.reclaim()

    assert waiting_ids(redis) == ["a", "b", "c", "d"]
    assert redis.llen(server.taken) == 0


def test_jobs_of_a_live_server_stay_with_it(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    push(redis, "a", "b")
    server.take(2)

    second.reclaim()

    assert waiting_ids(redis) == []
    assert redis.llen(server.taken) == 2


def test_a_dead_servers_jobs_go_back_once_however_many_find_it(redis: Redis, server: ServerQueue) -> None:
    push(redis, *(f"job{i}" for i in range(40)))
    server.take(40)
    die(server)
    others = [ServerQueue(ABOUT, 5) for _ in range(6)]
    all_have_looked = threading.Barrier(len(others))
    for other in others:
        other._reclaim = after(all_have_looked, other._recover)  # type: ignore[assignment]

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(lambda other: other.reclaim(), others))

    assert waiting_ids(redis) == [f"job{i}" for i in range(40)]


def after(barrier: threading.Barrier, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but only when so many threads are about to make it."""

    def wait_and_call(*arguments: Any) -> Any:
        barrier.wait(10)
        return call(*arguments)

    return wait_and_call


def test_a_server_started_again_finds_its_own_jobs_without_waiting(redis: Redis) -> None:
    killed = ServerQueue(ABOUT, 60)
    killed.join()
    push(redis, "a", "b")
    killed.take(2)
    killed._held.close()  # as the kernel does when the process dies

    again = ServerQueue(ABOUT, 60)
    again.join()

    assert waiting_ids(redis) == ["a", "b"]
    assert list(again.live_servers()) == [again.name]


def test_a_server_started_again_may_serve_another_model(redis: Redis) -> None:
    killed = ServerQueue(ABOUT, 60)
    killed.join()
    killed._held.close()

    again = ServerQueue(ABOUT | {"weights": "better.keras"}, 60)
    again.join()

    assert [about["weights"] for about in again.live_servers().values()] == ["better.keras"]


def test_two_live_servers_never_share_a_slot(server: ServerQueue, second: ServerQueue) -> None:
    assert server.slot != second.slot


def test_what_a_held_up_command_takes_for_a_server_that_joined_again_is_brought_back(
    redis: Redis, server: ServerQueue
) -> None:
    """Its connection was cut, and the network delivers what was sent on it later."""
    taken_before = server.taken
    server.join()
    push(redis, "a", "b")

    server._take([settings.IMAGE_QUEUE, taken_before], [1])
    batch = server.take(1)
    server.answer(batch.jobs, [ANSWER], batch.entries)
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


def test_a_job_in_flight_at_three_crashes_is_given_up_and_holds_up_nobody(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
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


def test_a_job_that_is_given_up_leaves_no_mark_either(redis: Redis, server: ServerQueue, second: ServerQueue) -> None:
    """Else an answer that is lost on its way would not be asked for again."""
    push(redis, "killer", crashes=2)
    redis.set(server.accepted_key("killer"), "", ex=60)
    server.take(1)

    die(server)
    second.reclaim()

    assert result_of(redis, "killer")["error"]["code"] == "model_failed"
    assert not redis.exists(server.accepted_key("killer"))


def test_an_image_that_waits_alone_when_its_server_is_killed_has_another_chance(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "unlucky")
    for killed, finder in ((server, second), (second, server)):
        killed.take(1)
        die(killed)
        finder.join()

    batch = server.take(1)

    assert ids(batch) == ["unlucky"]
    assert batch.suspect


def test_leaving_puts_back_what_was_not_computed_and_blames_nobody(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b")
    server.take(2)

    server.leave()

    assert [json.loads(job).get("crashes") for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)] == [None, None]
    assert waiting_ids(redis) == ["a", "b"]
    assert server.live_servers() == {}


def test_a_late_answer_is_handed_out_and_leaves_the_lists_alone(
    redis: Redis, server: ServerQueue, second: ServerQueue
) -> None:
    push(redis, "a")
    frozen = server.take(1)
    die(server)
    second.reclaim()
    push(redis, "b")
    server.redis.lmove(settings.IMAGE_QUEUE, server.taken, "RIGHT", "RIGHT")  # taken before it knew

    with pytest.raises(HeartbeatExpired):
        server.answer(frozen.jobs, [ANSWER], frozen.entries)

    assert result_of(redis, "a") == ANSWER
    assert [json.loads(job)["id"] for job in redis.lrange(server.taken, 0, -1)] == ["b"]


def test_a_lapsed_heartbeat_is_noticed_by_the_server_itself(server: ServerQueue) -> None:
    die(server)
    server._next_beat = 0

    with pytest.raises(HeartbeatExpired):
        server.beat()


def test_another_model_on_the_same_queue_is_refused(redis: Redis, server: ServerQueue) -> None:
    other = ServerQueue({"model": "ResNet50", "weights": "imagenet"}, 5)

    with pytest.raises(StartupError, match="IMAGE_QUEUE"):
        other.join()


def test_racing_requests_never_overfill_the_queue(monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue,
                                                  server: ServerQueue) -> None:  # fmt: skip
    monkeypatch.setattr(settings, "MAX_QUEUE", 5)
    outcomes = []

    def ask() -> None:
        try:
            web.ask("aW1hZ2U=", time.time() + 1)
        except ServiceError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sorted(outcomes) == ["queue_full"] * 35 + ["timeout"] * 5


def test_a_full_queue_without_a_model_server_says_so(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue
) -> None:
    monkeypatch.setattr(settings, "MAX_QUEUE", 1)
    push(redis, "a")

    with pytest.raises(image_queue.NoModelServer):
        web.ask("aW1hZ2U=", time.time() + 5)


@pytest.mark.parametrize(
    ("alive", "cause"), [(False, "no model server is alive"), (True, "the model servers are busy")]
)
def test_a_timeout_names_its_cause(web: WebQueue, server: ServerQueue, alive: bool, cause: str) -> None:
    if not alive:
        die(server)

    with pytest.raises(image_queue.ResultTimeout, match=cause):
        web.ask("aW1hZ2U=", time.time() + 0.5)


def test_a_request_that_times_out_leaves_no_key(redis: Redis, web: WebQueue) -> None:
    with pytest.raises(image_queue.ResultTimeout):
        web.ask("aW1hZ2U=", time.time() + 0.5)

    assert own_keys(redis) == []


def test_an_image_whose_push_got_no_reply_is_queued_once(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    append, known = web._append, web._known
    looked = threading.Event()

    def without_reply(*arguments: Any) -> bool:
        append(*arguments)
        raise RedisError("the connection broke")

    def look(job_id: str) -> bool:
        try:
            return known(job_id)
        finally:
            looked.set()

    monkeypatch.setattr(web, "_append", without_reply)
    monkeypatch.setattr(web, "_known", look)
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    assert looked.wait(10)

    batch = server.take(32, wait=10)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert asked.result(10) == ANSWER
    assert batch.entries == 1


def test_an_image_too_many_that_is_taken_before_it_is_withdrawn_is_answered(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    monkeypatch.setattr(settings, "MAX_QUEUE", 1)
    push(redis, "first")
    remove, batches = web._remove, []

    def too_late(*arguments: Any, **options: Any) -> bool:
        batches.append(server.take(32))
        return remove(*arguments, **options)

    monkeypatch.setattr(web, "_remove", too_late)
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    wait_until(lambda: len(batches) == 1, "both are taken")

    server.answer(batches[0].jobs, [ANSWER, ANSWER], batches[0].entries)

    assert asked.result(10) == ANSWER


def test_without_redis_a_request_is_refused_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REDIS_PORT", free_port())
    monkeypatch.setattr(settings, "REDIS_TIMEOUT", 0.6)
    started = time.monotonic()

    with pytest.raises(image_queue.RedisDown):
        WebQueue().ask("aW1hZ2U=", time.time() + 30)

    assert 0.5 < time.monotonic() - started < 5


def test_a_restart_of_redis_that_forgets_all_loses_no_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    web = WebQueue()
    with run_redis(tmp_path / "log", port) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 30))
        wait_until(lambda: web.waiting() == 1, "the job waits")
        process.stop(9)
    wait_until(lambda: "does not answer" in caplog.text, "the log says that Redis is away")

    with run_redis(tmp_path / "log2", port) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up again")
        server = ServerQueue(ABOUT, 5)
        server.join()
        batch = server.take(1, wait=10)
        server.answer(batch.jobs, [ANSWER], batch.entries)

        assert asked.result(10) == ANSWER
        assert [job.image for job in batch.jobs] == ["aW1hZ2U="]


def test_a_redis_swapped_between_two_polls_is_given_the_job_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """redis-py connects to the new one silently: no error tells the web that its job is gone."""
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.3)
    web = WebQueue()
    poll, between, swapped = web._poll, threading.Event(), threading.Event()

    def poll_when_swapped(*arguments: Any) -> Any:
        answer = poll(*arguments)
        if not swapped.is_set():
            between.set()
            swapped.wait(20)
        return answer

    monkeypatch.setattr(web, "_poll", poll_when_swapped)
    with run_redis(tmp_path / "log", port) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
        assert between.wait(10)
    with run_redis(tmp_path / "log2", port) as process:
        wait_until(lambda: "Ready to accept" in process.log, "another is up")
        swapped.set()
        server = ServerQueue(ABOUT, 5)
        server.join()
        batch = server.take(1, wait=3)
        assert batch.jobs, "the new Redis has no job"
        server.answer(batch.jobs, [ANSWER], batch.entries)

        assert asked.result(10) == ANSWER


# Clocks


def shift_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the clock of this process, which the web has read already, as on another machine that is wrong."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("shift", [90, -90, 7200, -86400])
def test_a_model_server_with_a_wrong_clock_answers(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    wait_until(lambda: web.waiting() == 1, "the job waits")
    shift_clock(monkeypatch, shift)

    batch = server.take(32)
    assert [job.image for job in batch.jobs] == ["aW1hZ2U="]
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert asked.result(10) == ANSWER


def test_a_model_server_with_a_fast_clock_brings_the_jobs_of_a_dead_one_back(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, second: ServerQueue
) -> None:
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    assert len(server.take(1, wait=5).jobs) == 1
    die(server)
    shift_clock(monkeypatch, 7200)

    second.reclaim()
    batch = second.take(1)
    second.answer(batch.jobs, [ANSWER] * len(batch.jobs), batch.entries)

    assert asked.result(10) == ANSWER
    assert batch.suspect


@pytest.mark.parametrize("shift", [3600, -3600])
def test_a_step_of_the_webs_clock_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.1)
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 3))
    wait_until(lambda: web.waiting() == 1, "the job waits")
    shift_clock(monkeypatch, shift)
    stepped = time.monotonic()
    if shift < 0:
        with pytest.raises(image_queue.ResultTimeout):
            asked.result(10)
        assert time.monotonic() - stepped < 6
        return
    before = polls(redis)
    wait_until(lambda: polls(redis) >= before + 5, "the web polls five times")
    batch = server.take(1)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert asked.result(10) == ANSWER


def polls(redis: Redis) -> int:
    """How often anybody has waited for an answer in this Redis."""
    statistics: dict[str, Any] = redis.info("commandstats")
    return int(statistics.get("cmdstat_blpop", {"calls": 0})["calls"])


@pytest.mark.parametrize("shift", [0, 7200])
def test_a_job_whose_mark_has_expired_is_dropped_unanswered(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, shift: float
) -> None:
    """Its web process died, else it would have taken it back."""
    job = Job("late", "aW1hZ2U=", time.time() + 0.3)
    web._push(job.id, job.dump(), time.monotonic() + 0.3, unlimited=False)
    push(redis, "in-time", deadline=time.time() + shift + 30)
    wait_until(lambda: not redis.exists(web.accepted_key("late")), "its mark has expired")
    wait_until(lambda: time.time() > job.deadline, "its deadline has passed")
    shift_clock(monkeypatch, shift)

    batch = server.take(32)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert ids(batch) == ["in-time"]
    assert result_of(redis, "late") is None


def test_a_job_expires_in_a_batch_when_its_mark_does(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    """While the batch before it is computed; its deadline, by a clock that is wrong, says nothing."""
    for name, seconds in (("soon", 2.0), ("later", 30.0)):
        job = Job(name, "aW1hZ2U=", time.time() - 7200)
        web._push(name, job.dump(), time.monotonic() + seconds, unlimited=False)
    batch = server.take(2)
    batch.images = [None, None]
    taken = ids(batch)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 5)

    assert batch.drop_expired() == 1
    assert (taken, ids(batch)) == (["soon", "later"], ["later"])


@pytest.mark.parametrize(("marked", "left"), [(None, 3602), (200, 202)])
def test_an_answer_is_kept_as_long_as_its_job_lives_and_an_hour_at_most(
    redis: Redis, server: ServerQueue, marked: int | None, left: int
) -> None:
    push(redis, "tool", deadline=1e300)
    if marked:
        redis.set(server.accepted_key("tool"), "", ex=marked)
    batch = server.take(1)

    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert result_of(redis, "tool") == ANSWER
    assert left - 5 <= redis.ttl(server.result_key("tool")) <= left + 1


# Connections


def test_no_more_images_wait_at_once_than_redis_has_connections_for(
    redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    web._share_connections(3)
    before = redis.info("clients")["connected_clients"]
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(web.ask, "aW1hZ2U=", time.time() + 20) for _ in range(30)]
        most = 0
        while not all(each.done() for each in asked):
            batch = server.take(32, wait=1)
            most = max(most, redis.info("clients")["connected_clients"] - before)
            server.answer(batch.jobs, [ANSWER] * len(batch.jobs), batch.entries)

    assert [each.result() for each in asked] == [ANSWER] * 30
    assert most <= 3


def test_an_image_that_finds_no_connection_free_is_refused_after_its_patience(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    monkeypatch.setattr(settings, "REDIS_TIMEOUT", 0.3)
    web._share_connections(1)
    first = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    wait_until(lambda: web.waiting() == 1, "the first waits")

    with pytest.raises(image_queue.QueueFull, match="no connection free"):
        web.ask("aW1hZ2U=", time.time() + 20)

    batch = server.take(1)
    server.answer(batch.jobs, [ANSWER], batch.entries)
    assert first.result(10) == ANSWER


def no_file(**_: Any) -> IO[bytes]:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(**_: Any) -> IO[bytes]:
    """A file on a disk that is full after ten bytes."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:10])

    return Full()


@pytest.mark.parametrize("disk", [no_file, half_a_file])
def test_a_full_disk_is_no_reason_to_lose_an_image(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue, disk: Any
) -> None:
    monkeypatch.setattr(image_queue, "TemporaryFile", disk)
    poll = web._poll

    def forgetting_poll(*arguments: Any) -> Any:
        monkeypatch.setattr(web, "_poll", poll)
        redis.delete(*own_keys(redis))
        raise RedisError("Redis has begun anew")

    monkeypatch.setattr(web, "_poll", forgetting_poll)
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    wait_until(lambda: web._poll is poll and web.waiting() == 1, "it is pushed again")
    server.join()

    batch = server.take(32, wait=10)
    server.answer(batch.jobs, [ANSWER], batch.entries)

    assert asked.result(10) == ANSWER
    assert [job.image for job in batch.jobs] == ["aW1hZ2U="]


def test_each_loss_of_redis_begins_with_short_pauses(monkeypatch: pytest.MonkeyPatch, web: WebQueue) -> None:
    monkeypatch.setattr(image_queue, "pauses", lambda: iter([0.01, 60.0]))
    replies = iter([RedisError("away"), None, RedisError("away again"), ANSWER])

    def poll(*_: object) -> Any:
        reply = next(replies)
        if isinstance(reply, RedisError):
            raise reply
        return reply

    monkeypatch.setattr(web, "_poll", poll)

    assert web.ask("aW1hZ2U=", time.time() + 5) == ANSWER


def test_an_answer_that_goes_to_a_dead_connection_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, web: WebQueue, server: ServerQueue
) -> None:
    """The web has found its job known after a loss, and waits; then a poll of its dead connection takes the answer."""
    monkeypatch.setattr(settings, "CLIENT_SLEEP", 0.3)
    poll, troubles = web._poll, iter([RedisError("away")])
    known, found = web._known, threading.Event()

    def look(job_id: str) -> bool:
        here = known(job_id)
        found.set()
        return here

    def poll_with_trouble(*arguments: Any) -> Any:
        for trouble in troubles:
            raise trouble
        return poll(*arguments)

    monkeypatch.setattr(web, "_poll", poll_with_trouble)
    monkeypatch.setattr(web, "_known", look)
    asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))
    first = server.take(1, wait=5)
    assert found.wait(5)
    redis.delete(web.accepted_key(first.jobs[0].id))  # as the answer does, which somebody else takes
    redis.ltrim(server.taken, 1, -1)

    again = server.take(1, wait=5)
    server.answer(again.jobs, [ANSWER], again.entries)

    assert asked.result(10) == ANSWER
    assert again.jobs[0].id == first.jobs[0].id


def test_a_redis_out_of_memory_still_lets_jobs_be_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    with run_redis(tmp_path / "log", port, "--maxmemory-policy", "noeviction") as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        redis = Redis(port=port)
        server = ServerQueue(ABOUT, 5)
        server.join()
        push(redis, "a", "b")
        redis.config_set("maxmemory", "1")
        server._next_beat = 0
        server.beat()
        server.join()

        batch = server.take(1, wait=2)
        server.answer(batch.jobs, [ANSWER], batch.entries)

        assert result_of(redis, "a") == ANSWER
        assert ids(server.take(1, wait=2)) == ["b"]


def test_a_redis_out_of_memory_refuses_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    with run_redis(tmp_path / "log", port, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")

        with pytest.raises(image_queue.QueueFull, match="no memory"):
            WebQueue().ask("aW1hZ2U=", time.time() + 30)

    assert f"Redis at 127.0.0.1:{port} has no memory left" in caplog.text
    assert caplog.text.rstrip().endswith("images are refused")


def test_a_redis_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, web: WebQueue) -> None:
    monkeypatch.setattr(redis_connection, "OLDEST_REDIS", 999)

    with pytest.raises(StartupError, match="999 or newer is needed"):
        web.check()


def test_a_redis_behind_a_unix_socket_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", f"unix://{tmp_path}/socket?db=0")
    with run_redis(tmp_path / "log", free_port(), "--unixsocket", str(tmp_path / "socket")):
        web, queue = WebQueue(), ServerQueue(ABOUT, 5)
        wait_until((tmp_path / "socket").exists, "Redis is up")
        queue.join()
        asked = in_background(lambda: web.ask("aW1hZ2U=", time.time() + 20))

        batch = queue.take(32, wait=10)
        queue.answer(batch.jobs, [ANSWER], batch.entries)

        assert asked.result(10) == ANSWER


def test_the_password_in_redis_url_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", "redis://user:secret@127.0.0.1:7/0")

    assert WebQueue().address == "127.0.0.1:7"
