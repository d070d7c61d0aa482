"""Fixtures and helpers of test_image_queue_*.py, which name this module in pytest_plugins."""

import json
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from redis import Redis

import settings
from image_queue import Answer, Batch, ServerQueue, WebQueue

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


def images(batch: Batch) -> list[str]:
    """Return the images of the jobs as base64, whether they were decoded or not."""
    return [b64encode(job.image).decode() if isinstance(job.image, bytes) else job.image for job in batch.jobs]


def waiting_ids(redis: Redis) -> list[str]:
    return [json.loads(job)["id"] for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)]


def result_of(redis: Redis, job_id: str) -> Any:
    results = redis.lrange(f"{settings.IMAGE_QUEUE}:result:{job_id}", 0, -1)
    assert len(results) <= 1
    return json.loads(results[0]) if results else None


def die(queue: ServerQueue) -> None:
    """Leave the keys in Redis as after a kill -9, once the heartbeat has expired."""
    queue.redis.delete(queue.heartbeat)


def in_background(call: Callable[[], T]) -> Future[T]:
    return ThreadPoolExecutor(1).submit(call)


def ask_in_background(web: WebQueue, seconds: float = 20, request: str = "") -> Future[Answer]:
    return in_background(lambda: web.ask(IMAGE, time.time() + seconds, request))


def answer(server: ServerQueue, batch: Batch, content: Answer = ANSWER) -> None:
    server.answer(batch.jobs, [content] * len(batch.jobs), batch.entries)
