"""How the web learns the size of the images that the model takes."""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from harness import Service, free_port, run_apache, run_redis, run_service, running, wait_until
from own_model import LABELS, LEARN_LIMIT, SMALL, photos, save_model
from redis import Redis
from redis.exceptions import RedisError

import settings
from helpers import Shape
from image_queue import ServerQueue, WebQueue

WEB_PROCESSES = 2  # of run_apache()

Record = Callable[[str, object], None]


def live_server(shape: Any) -> ServerQueue:
    """A live model server for images of this shape."""
    server = ServerQueue({"model": "digits", "weights": "own.keras", "shape": shape}, 5)
    server.join()
    return server


@pytest.fixture
def refresh_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_queue.web_queue.REFRESH_EVERY", 0.0)


@pytest.mark.usefixtures("refresh_at_once")
def test_the_web_takes_the_size_from_the_last_model_server(redis: Redis) -> None:
    web = WebQueue()
    assert web.shape() == (224, 224, 3)

    server = live_server(SMALL)
    assert web.shape() == SMALL
    server.leave()
    assert web.shape() == WebQueue().shape() == SMALL  # another process learns it too
    redis.delete(web.shape_key)
    assert web.shape() == SMALL
    assert WebQueue().shape() == (224, 224, 3)


@pytest.mark.usefixtures("refresh_at_once")
def test_a_live_server_of_an_older_version_overrides_a_dead_one(redis: Redis) -> None:
    """An older version writes only a heartbeat."""
    web = WebQueue()
    live_server(SMALL).leave()
    redis.set(web.server_key("older.1"), json.dumps({"model": "a", "weights": "b", "shape": [20, 30, 3]}), ex=60)

    assert web.shape() == (20, 30, 3)


@pytest.mark.usefixtures("refresh_at_once")
@pytest.mark.parametrize("rubbish", [b"", b"[]", b"{", b'{"shape": [1, 2]}', b'{"shape": "SMALL", "server": 7}'])
def test_invalid_sizes_in_redis_are_ignored(redis: Redis, rubbish: bytes) -> None:
    web = WebQueue()
    redis.set(web.shape_key, rubbish, ex=60)
    redis.set(web.server_key("odd"), rubbish, ex=60)

    assert web.shape() == (224, 224, 3)


@pytest.mark.usefixtures("refresh_at_once")
def test_settings_override_the_size_of_the_model_server(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    live_server(SMALL)
    web = WebQueue()

    monkeypatch.setattr(settings, "IMAGE_WIDTH", 50)
    assert web.shape() == (64, 50, 1)


def test_with_all_sizes_set_the_web_does_not_ask_redis(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGE_WIDTH", "IMAGE_HEIGHT", "IMAGE_CHANS"):
        monkeypatch.setattr(settings, name, 3)
    web = WebQueue()
    monkeypatch.setattr(web.connections, "redis", None)

    assert web.shape() == (3, 3, 3)


class SlowRefresh:
    """Refreshes that block until `go_on`; the n-th finds the shape n x n."""

    def __init__(self, web: WebQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.go_on = threading.Event()
        monkeypatch.setattr(web._shape, "_read", self.look)

    def look(self) -> Shape:
        self.count += 1
        assert self.go_on.wait(10)
        return self.count, self.count, 1


def test_one_thread_refreshes_the_size_and_others_use_the_cached_one(
    redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = WebQueue()
    web._shape._next = time.monotonic()
    slow = SlowRefresh(web, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(web.shape)
        wait_until(lambda: slow.count, "the refresh has begun")
        assert {web.shape() for _ in range(8)} == {(224, 224, 3)}
        slow.go_on.set()

        assert looking.result(10) == web.shape() == (1, 1, 1)
    assert slow.count == 1


def test_after_an_idle_time_all_wait_for_the_refresh(redis_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first requests to a web process that was idle would get a size that is an hour old."""
    web = WebQueue()
    slow = SlowRefresh(web, monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        looking = pool.submit(web.shape)
        wait_until(lambda: slow.count, "the refresh has begun")
        assert web.shape() == (224, 224, 3)  # the wait is limited, since Redis may be down
        crowd = [pool.submit(web.shape) for _ in range(7)]
        slow.go_on.set()

        assert {each.result(10) for each in [looking, *crowd]} == {(1, 1, 1)}
    assert slow.count == 1


@pytest.mark.usefixtures("refresh_at_once")
def test_a_failed_refresh_keeps_the_cached_size(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    server, web = live_server(SMALL), WebQueue()
    assert web.shape() == SMALL
    server.leave()

    def broken() -> None:
        raise RedisError

    monkeypatch.setattr(web._shape, "_read", broken)
    assert web.shape() == SMALL


# The whole service


def queued_shapes(url: str, redis: Redis, queue: str, count: int) -> set[tuple[int, ...]]:
    """The shapes in which the web processes at `url` queue `count` images, while no model server takes them."""
    image = photos(1)[0]
    before = redis.llen(queue)
    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(Service(url).post, image, timeout=20)
        wait_until(lambda: redis.llen(queue) == before + count, "the images are queued")
        shapes = {tuple(json.loads(job)["shape"]) for job in redis.lrange(queue, before, -1)}
        redis.delete(queue)
    return shapes


@pytest.mark.slow("waits for heartbeats to expire")
def test_web_processes_learn_and_remember_the_size(redis: Redis, tmp_path: Path) -> None:
    """Running processes learn it within seconds. Those started while no model server is alive know it at once."""
    path = save_model(tmp_path / "gray.keras", facts={"labels": LABELS})
    queue = f"queue-{free_port()}"
    limits: Any = {"IMAGE_QUEUE": queue, "REQUEST_TIMEOUT": "3"}
    with run_apache(**limits) as url:
        assert queued_shapes(url, redis, queue, 16) == {(224, 224, 3)}
        with running([sys.executable, "run_model_server.py"], tmp_path / "log", MODEL=str(path), IMAGE_QUEUE=queue):
            wait_until(lambda: redis.exists(f"{queue}:shape"), "the model server has joined", 120)
            joined = time.monotonic()
        wait_until(lambda: time.monotonic() > joined + LEARN_LIMIT, "the web has had time to learn it")
        assert redis.keys(f"{queue}:server:*") == []
        assert queued_shapes(url, redis, queue, 16) == {SMALL}
    with run_apache(**limits) as url:
        assert queued_shapes(url, redis, queue, 16) == {SMALL}


def commands(redis: Redis) -> Counter[str]:
    """How often the web has sent each command to Redis."""
    stats = cast(dict[str, dict[str, int]], redis.info("commandstats"))
    calls = Counter({name.removeprefix("cmdstat_"): about["calls"] for name, about in stats.items()})
    calls["exists"] -= calls["ltrim"]  # the model server checks its heartbeat with each answered batch
    return Counter({name: calls[name] for name in ("rpush", "multi", "exec", "blpop", "get", "exists", "mget")})


def asked_of_redis(redis: Redis, url: str, images: list[bytes]) -> tuple[Counter[str], float]:
    """The commands that these requests cause, and the seconds that they take."""
    service = Service(url)
    before, begun = commands(redis), time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(service.post, images)} == {200}
    return commands(redis) - before, time.monotonic() - begun


@pytest.mark.slow("starts the service twice, for 400 requests")
def test_learning_the_size_costs_no_command_per_request(tmp_path: Path, record_property: Record) -> None:
    """Each web process looks it up only once a second."""
    port, images = free_port(), photos(20) * 20
    where: Any = {"REDIS_PORT": str(port), "IMAGE_QUEUE": "queue-of-its-own"}
    size: Any = {"IMAGE_WIDTH": "224", "IMAGE_HEIGHT": "224", "IMAGE_CHANS": "3"}
    with (
        run_redis(tmp_path / "redis", port) as process,
        Redis(port=port, socket_timeout=5) as redis,
    ):
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        with run_service(tmp_path, **where) as service, run_apache(**where, **size) as url:
            with_size, _ = asked_of_redis(redis, url, images)
            without, seconds = asked_of_redis(redis, service.url, images)

    extra = without - with_size
    assert with_size["rpush"] >= len(images)
    assert 2 <= extra["get"] <= WEB_PROCESSES * (seconds + 2)
    assert extra.total() <= 2 * WEB_PROCESSES * (seconds + 2)
    assert len(images) > 4 * WEB_PROCESSES * (seconds + 2)  # so that one command per request would be noticed
    record_property("figures", f"{extra.total()} more commands for {len(images)} requests in {seconds:.1f} s")
