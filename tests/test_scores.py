"""Jobs that ask for the probabilities of all classes."""

import json
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from redis import Redis
from stand_in_model import stepped_server

import settings
from helpers import base64_encode_image
from image_queue import Job
from model_server.classifier import Classifier
from model_server.loop import ModelServer
from model_server.model_file import Facts

LABELS = ["red", "green", "blue", "none"]


class ColorNetwork:
    """A network whose probabilities are the mean of each channel, and the rest."""

    def predict_on_batch(self, images: Any) -> Any:
        colors = images.mean(axis=(1, 2)) / 765
        return np.concatenate([colors, 1 - colors.sum(axis=1, keepdims=True)], axis=1)


@pytest.fixture
def server(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    for name, value in (("IMAGE_WIDTH", 2), ("IMAGE_HEIGHT", 2), ("IMAGE_CHANS", 3)):
        monkeypatch.setattr(settings, name, value)
    classifier = Classifier(ColorNetwork(), Facts((2, 2, 3), LABELS, "LABELS"))
    classifier.warm_up()
    yield from stepped_server(classifier, {"model": "digits", "weights": "none"})


def push(redis: Redis, name: str, **fields: Any) -> None:
    pixels = np.full((2, 2, 3), (51, 204, 102), np.uint8)
    job = {"id": name, "deadline": time.time() + 60, "image": base64_encode_image(pixels)} | fields
    redis.rpush(settings.IMAGE_QUEUE, json.dumps(job))


def answer(redis: Redis, name: str) -> Any:
    reply = redis.blpop([f"{settings.IMAGE_QUEUE}:result:{name}"], 10)
    assert reply is not None
    return json.loads(reply[1])


def test_scores_are_in_class_order_and_indices_in_that_of_the_predictions(redis: Redis, server: ModelServer) -> None:
    push(redis, "all", scores=True, top=2)
    push(redis, "some", top=2)

    server.step()
    asked, other = answer(redis, "all"), answer(redis, "some")

    scores = np.frombuffer(b64decode(asked["scores"]), "<f4")
    assert scores == pytest.approx([51 / 765, 204 / 765, 102 / 765, 408 / 765])
    assert [each["label"] for each in asked["predictions"]] == ["none", "green"]
    assert asked["indices"] == [3, 1]
    assert asked["batch"] == 2
    assert asked["predictions"] == other["predictions"]
    assert {"scores", "indices"}.isdisjoint(other)


@pytest.mark.parametrize("wrong", [1, "true", None, []])
def test_invalid_scores_do_not_affect_the_batch(redis: Redis, server: ModelServer, wrong: Any) -> None:
    push(redis, "wrong", scores=wrong)
    push(redis, "right", scores=True)

    server.step()

    assert answer(redis, "wrong")["error"]["code"] == "model_failed"
    assert len(answer(redis, "right")["indices"]) == len(LABELS)


def test_a_job_keeps_its_scores_when_its_server_dies() -> None:
    job = Job("a", "aW1hZ2U=", time.time() + 5, scores=True)

    assert Job.parse(job.dump()) == job
    assert b"scores" not in Job("a", "aW1hZ2U=", time.time() + 5).dump()
