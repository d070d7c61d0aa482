"""Inference in the Open Inference Protocol while model servers are replaced, upgraded, or gone.

The model server here gives scripted answers, over a real Redis.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis
from test_tensors import BODIES, JSON

import settings
from image_queue import Answer, ServerQueue, failed
from run_web_server import create_app

SCORES = base64.b64encode(np.array([0.25, 0.75], "<f4").tobytes()).decode()
PIXEL = [51, 102, 153]
URL = "/v2/models/digits/infer"


def answer(version: str, model: str = "digits") -> Answer:
    return {"predictions": [{"label": "seven", "probability": 0.75}], "scores": SCORES, "indices": [1],
            "model": model, "version": version}  # fmt: skip


@contextmanager
def model_server(*answers: Answer, version: str = "new", model: str = "digits") -> Iterator[None]:
    """A model server for images of one pixel that gives these answers to the images that come."""
    about = {"model": model, "weights": f"{model}.keras", "version": version, "shape": [1, 1, 3], "classes": 2}
    queue = ServerQueue(about, 5)
    queue.join()

    def serve() -> None:
        for content in answers:
            batch = queue.take(1, wait=10)
            queue.answer(batch.jobs, [content] * len(batch.jobs), batch.entries)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join()
    queue.leave()
    queue._slot_socket.close()


def infer(images: int = 1, url: str = URL) -> Any:
    pixels = {"name": "pixels", "datatype": "UINT8", "shape": [images, 1, 1, 3], "data": PIXEL * images}
    return create_app().test_client().post(url, json={"inputs": [pixels]})


def get(url: str) -> Any:
    return create_app().test_client().get(url)


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert list(response.get_json()) == ["error"]
    assert ("Retry-After" in response.headers) == (status == 503)
    text: str = response.get_json()["error"]
    assert text.endswith(".")
    return text


def test_all_images_of_a_request_have_the_same_version(redis: Redis) -> None:
    with model_server(answer("old"), answer("new"), answer("new"), answer("new")):
        response = infer(2)

    assert response.get_json()["model_version"] == response.headers["X-Model-Version"] == "new"
    assert response.get_json()["outputs"][0]["data"] == [0.25, 0.75] * 2


def test_versions_that_stay_mixed_are_503(redis: Redis) -> None:
    with model_server(*[answer("old"), answer("new")] * 3):
        response = infer(2)

    assert error_of(response, 503) == "The model digits is being replaced, so try again in a few seconds."


def test_the_version_in_the_path_answers(redis: Redis) -> None:
    with model_server(answer("old"), answer("new")):
        response = infer(url="/v2/models/digits/versions/new/infer")
        gone = infer(url="/v2/models/digits/versions/old/infer")

    assert response.get_json()["model_version"] == "new"
    assert error_of(gone, 404) == "The versions of digits served here are: new."


def test_a_model_server_that_knows_no_scores_is_503(redis: Redis) -> None:
    old = {"predictions": answer("old")["predictions"]}
    with model_server(old):
        response = infer()

    assert "being upgraded" in error_of(response, 503)


def test_an_image_that_breaks_the_model_fails_the_request(redis: Redis) -> None:
    broken = failed("The model could not classify this image; try another.")
    with model_server(broken, broken, broken):
        responses = infer(), infer(2)

    assert error_of(responses[0], 500) == "The model could not classify this image; try another."
    assert error_of(responses[1], 500) == "Image 0: The model could not classify this image; try another."


def test_without_an_answer_it_is_504(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REQUEST_TIMEOUT", 0.5)
    with model_server():
        assert "No answer came within 0.5 seconds" in error_of(infer(), 504)


def test_a_model_without_live_servers_is_503_by_version(redis: Redis) -> None:
    with model_server():
        pass

    for response in (infer(url="/v2/models/digits/versions/new/infer"), get("/v2/models/digits"),
                     get("/v2/models/digits/versions/new/ready")):  # fmt: skip
        assert "No model server of digits is alive" in error_of(response, 503)
    [entry] = get("/v2/models").get_json()
    assert (entry["name"], entry["version"], entry["state"]) == ("digits", "new", "UNAVAILABLE")
    assert create_app().test_client().post("/v2/repository/index", json={"ready": True}).get_json() == []


def test_each_model_answers_its_own_requests(redis: Redis) -> None:
    with model_server(answer("1")), model_server(answer("2", "birds"), model="birds"):
        responses = infer(), infer(url="/v2/models/birds/infer")
        both = get("/v2/models").get_json()

    assert [each.get_json()["model_name"] for each in responses] == ["digits", "birds"]
    assert [each["name"] for each in both] == ["birds", "digits"]


def test_both_versions_are_in_the_index_while_a_model_is_replaced(redis: Redis) -> None:
    with model_server(version="old"), model_server(version="new"):
        entries = create_app().test_client().post("/v2/repository/index").get_json()

    assert [(each["version"], each["state"]) for each in entries] == [("new", "READY"), ("old", "READY")]


@pytest.fixture(scope="module")
def client(redis_port: int) -> Any:
    return create_app().test_client()


@given(body=BODIES | JSON, rest=st.binary(max_size=40), header=st.integers(-3, 3) | st.none())
@hypothesis_settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_body_gets_400_or_413_unless_it_is_right(client: Any, body: Any, rest: bytes, header: int | None) -> None:
    """No model server answers, so a valid request would get 504."""
    text = json.dumps(body).encode()
    headers = {} if header is None else {"Inference-Header-Content-Length": str(len(text) + header)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "REQUEST_TIMEOUT", 0.02)
        response = client.post(URL, data=text + rest, headers=headers)

    assert response.status_code in (400, 413, 504)
    assert list(response.get_json()) == ["error"]
    assert response.get_json()["error"].endswith(".")
