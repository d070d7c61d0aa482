"""A stand-in for the classifier, and a model server that tests run with it, step by step."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from redis import Redis

import settings
from helpers import base64_encode_image
from image_queue import ServerQueue
from model_server.classifier import Classifier
from model_server.loop import ModelServer

POISON = 13
MEAN = {"model": "digits", "weights": "none"}


class MeanClassifier:
    """Labels an image with its first pixel, fails for POISON, and calls `before` with each batch."""

    shape = (2, 2, 3)
    batch_size = 32

    def __init__(self) -> None:
        self.before: Callable[[Any], object] = lambda images: None
        self.sizes: list[int] = []

    def classify(self, images: Any) -> list[Any]:
        self.sizes.append(len(images))
        self.before(images)
        levels = [int(image.flat[0]) for image in images]
        return [RuntimeError("poison") if level == POISON else level for level in levels]

    def decode(self, level: int, _top: int) -> list[tuple[str, float]]:
        return [(str(level), 1.0)]


def stepped_server(classifier: Any, about: dict[str, Any]) -> Iterator[ModelServer]:
    """For a fixture: yield a model server that has joined the queue, and end its threads afterwards."""
    queue = ServerQueue(about, 5)
    model_server = ModelServer(cast(Classifier, classifier), queue)
    queue.join()
    yield model_server
    model_server._computing.shutdown()
    model_server._answering.shutdown()
    queue._slot_socket.close()


def push(redis: Redis, *levels: int, image: str | None = None, seconds: float = 60) -> None:
    for level in levels:
        pixels = np.full((2, 2, 3), level, np.uint8)
        job = {"id": f"job{level}", "image": image or base64_encode_image(pixels), "deadline": time.time() + seconds}
        redis.rpush(settings.IMAGE_QUEUE, json.dumps(job))
