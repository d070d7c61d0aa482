"""Jobs whose images have another shape than the model takes."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis
from samples import colors
from stand_in_model import stepped_server

import image_queue
import settings
from helpers import Shape, base64_encode_image
from image_queue import Job
from model_server.loop import ModelServer
from model_server.tray import resized


class Shaped:
    """A classifier of 4x6 RGB images that labels each with its mean, rounded to tens."""

    shape = (4, 6, 3)
    batch_size = 32

    def classify(self, images: Any) -> list[Any]:
        return [image.mean() for image in images]

    def decode(self, mean: float, _top: int) -> list[tuple[str, float]]:
        return [(str(round(mean / 10) * 10), 1.0)]


@pytest.fixture
def server(redis: Redis) -> Iterator[ModelServer]:
    yield from stepped_server(Shaped(), {"model": "digits", "weights": "none", "shape": Shaped.shape})


def queued(redis: Redis, level: int, pixels: Shape, **others: Any) -> Callable[[], Any]:
    """Queue a flat image of this shape, with `others` in its job; return a function that waits for the answer."""
    image = base64_encode_image(np.full(pixels, level, settings.IMAGE_DTYPE))
    job = {"id": f"job{level}", "image": image, "deadline": time.time() + 60, "shape": pixels} | others
    redis.rpush(settings.IMAGE_QUEUE, json.dumps({name: value for name, value in job.items() if value is not None}))

    def answer() -> Any:
        reply = redis.blpop([f"{settings.IMAGE_QUEUE}:result:job{level}"], 10)
        assert reply is not None
        return json.loads(reply[1])

    return answer


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_jobs_of_other_shapes_are_resized_in_one_batch(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, server: ModelServer, dtype: str
) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", dtype)
    shapes: list[Shape] = [(4, 6, 3), (224, 224, 3), (64, 96, 1), (1, 1, 3), (6, 4, 3)]
    asked = [queued(redis, 10 * (i + 1), shape) for i, shape in enumerate(shapes)]

    server.step()

    assert [answer()["predictions"][0]["label"] for answer in asked] == ["10", "20", "30", "40", "50"]


def test_a_job_without_a_shape_has_the_shape_of_the_model(redis: Redis, server: ModelServer) -> None:
    """An older web server sends jobs without a shape."""
    right, wrong = queued(redis, 10, (4, 6, 3), shape=None), queued(redis, 20, (224, 224, 3), shape=None)

    server.step()

    assert right()["predictions"][0]["label"] == "10"
    assert wrong()["error"]["code"] == "model_failed"


@pytest.mark.parametrize("shape", [[4, 6], [4, 6, 2], [0, 6, 3], [4.0, 6, 3], "4x6", [10**9, 6, 3], [6, 6, 3], {}])
def test_a_job_with_an_invalid_shape_does_not_affect_its_batch(redis: Redis, server: ModelServer, shape: Any) -> None:
    wrong, right = queued(redis, 20, (4, 6, 3), shape=shape), queued(redis, 10, (4, 6, 3))

    server.step()

    assert wrong()["error"]["code"] == "model_failed"
    assert right()["predictions"][0]["label"] == "10"


def test_a_job_longer_than_the_largest_image_is_refused(redis: Redis, server: ModelServer) -> None:
    largest, longer = queued(redis, 10, image_queue.LARGEST_SHAPE), queued(redis, 20, (700, 700, 3))

    server.step()

    assert largest()["predictions"][0]["label"] == "10"
    assert longer()["error"]["code"] == "model_failed"


def test_a_job_keeps_its_shape_when_its_server_dies() -> None:
    job = Job("a", "aW1hZ2U=", time.time() + 5, shape=(4, 6, 3))

    assert Job.parse(job.dump()) == job


def test_resizing_is_bicubic_and_swaps_neither_sides_nor_colors() -> None:
    pixels = colors(0, (90, 60))
    expected = np.asarray(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC))

    assert (resized(pixels, (20, 30, 3)) == expected).all()
    gray = np.asarray(Image.fromarray(pixels).convert("L").resize((30, 20), Image.Resampling.BICUBIC))
    assert (resized(pixels, (20, 30, 1))[:, :, 0] == gray).all()
