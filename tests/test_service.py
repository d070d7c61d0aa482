"""The whole service, as its clients see it: a real Apache with mod_wsgi, a real Redis, real Keras models."""

import importlib.util
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import requests
import samples
from conftest import (
    ROOT,
    Service,
    assert_error,
    free_port,
    missing,
    raw_answer,
    resident_bytes,
    run_apache,
    run_model_server,
    run_service,
    wait_until,
    web_processes,
)
from PIL import Image
from redis import Redis
from samples import colours, saved
from train_digits import render, split

PNG = saved(Image.fromarray(colours(0)), "PNG")


@pytest.fixture(scope="session")
def held_out() -> list[tuple[bytes, str]]:
    """The digits that training never saw, as the files that a client posts, in all presentations by turns."""
    rng = np.random.default_rng(20)
    presentations = ("raw", "scan", "inverted", "photo")
    _, (digits, classes) = split()
    images = [render(digit, presentations[i % 4], rng) for i, digit in enumerate(digits)]
    return [(saved(image, "PNG"), str(label)) for image, label in zip(images, classes, strict=True)]


def post_all(service: Service, images: list[bytes], clients: int = 64) -> list[requests.Response]:
    """Post every image, by so many clients at once; the answers in the order of the images."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(service.post, images))


# The API


def test_the_homepage_welcomes(service: Service) -> None:
    response = requests.get(service.url, timeout=10)

    assert response.status_code == 200
    assert "Welcome to the PyImageSearch Keras REST API!" in response.text


def test_predict_answers_the_tutorials_json(service: Service) -> None:
    response = service.post((ROOT / "models/digits/three.png").read_bytes())

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert set(body) == {"success", "predictions"}
    assert body["success"] is True
    assert [set(each) for each in body["predictions"]] == [{"label", "probability"}] * 5
    probabilities = [each["probability"] for each in body["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert body["predictions"][0]["label"] == "3"


def test_the_process_says_that_it_lives(service: Service) -> None:
    assert requests.get(f"{service.url}/livez", timeout=10).status_code == 200


def test_the_service_says_that_it_is_ready_and_what_it_serves(service: Service) -> None:
    response = requests.get(f"{service.url}/readyz", timeout=10)

    assert response.status_code == 200
    body = response.json()
    assert body["ready"] is True
    [server] = body["model_servers"].values()
    assert (server["model"], server["weights"]) == ("digits", "digits.keras")


# Errors


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"photo": PNG}, "missing_image"),
        ({"image": b""}, "missing_image"),
        ({"image": b"hello"}, "bad_image"),
        ({"image": PNG[: len(PNG) // 2]}, "bad_image"),
    ],
    ids=["no field", "empty", "no image", "truncated"],
)
def test_a_request_without_a_good_image_is_400(service: Service, files: dict[str, bytes], code: str) -> None:
    assert_error(requests.post(f"{service.url}/predict", files=files, timeout=10), 400, code)


def test_a_post_without_anything_is_400(service: Service) -> None:
    assert_error(requests.post(f"{service.url}/predict", timeout=10), 400, "missing_image")


def test_an_unknown_address_is_404(service: Service) -> None:
    assert_error(requests.get(f"{service.url}/predictions", timeout=10), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/predict"), ("DELETE", "/predict"), ("POST", "/"), ("BREW", "/")]
)
def test_a_method_that_is_not_taken_is_405(service: Service, method: str, path: str) -> None:
    response = requests.request(method, service.url + path, timeout=10)

    assert_error(response, 405, "method_not_allowed")
    assert response.headers["Allow"]


def test_too_many_pixels_are_413_whatever_their_bytes(service: Service) -> None:
    """By its header alone: the pixels themselves are not there."""
    header = saved(Image.new("1", (8100, 8100)), "PNG")[:100]

    assert "megapixels" in assert_error(service.post(header), 413, "too_large")


def test_too_many_bytes_are_413_by_the_web(service: Service) -> None:
    assert "16 MB" in assert_error(service.post(b"x" * (16 * 2**20 - 50)), 413, "too_large")


def test_far_too_many_bytes_are_413_by_apache(service: Service) -> None:
    """By the header alone: it does not wait for them."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 170000000\r\n\r\n"

    assert "far larger" in assert_error(raw_answer(service, head), 413, "too_large")


def test_a_chunked_upload_is_taken_and_has_the_same_limit(service: Service) -> None:
    good, content_type = requests.models.RequestEncodingMixin._encode_files({"image": PNG}, {})  # type: ignore[attr-defined]
    headers = {"Content-Type": content_type}

    assert requests.post(f"{service.url}/predict", data=iter([good]), headers=headers, timeout=20).status_code == 200
    endless = iter([good[:200], *[b"x" * 2**20] * 20])
    assert_error(requests.post(f"{service.url}/predict", data=endless, headers=headers, timeout=20), 413, "too_large")


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"NONSENSE\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 400, "bad_request"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
        (b"GET /%2e%2e%2f%2e%2e%2fetc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"GET /settings.py HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\n\r\n", 417, "expectation_failed"),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: odd\r\n\r\n", 400, "bad_request"),
    ],
)
def test_what_apache_refuses_is_json_too(service: Service, request_bytes: bytes, status: int, code: str) -> None:
    assert_error(raw_answer(service, request_bytes), status, code)


@pytest.mark.slow("waits for the site's limit of 20 seconds")
def test_a_request_that_stops_half_way_is_cut_with_json(service: Service) -> None:
    started = time.monotonic()
    form = b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"

    response = raw_answer(service, b"POST /predict HTTP/1.1\r\nHost: x\r\n" + form)

    assert_error(response, 408, "request_timeout")
    assert time.monotonic() - started < 40


def test_a_web_process_that_can_not_start_is_a_json_500() -> None:
    with run_apache(wait=False, BATCH_SIZE="0") as url:
        [response] = wait_until(lambda: answers(url), "Apache answers")

        assert_error(response, 500, "internal_error")


def answers(url: str) -> list[requests.Response]:
    """The answer of the homepage, if one comes (an answer that is an error would count as false)."""
    with suppress(requests.RequestException):
        return [requests.get(url, timeout=60)]
    return []


def test_a_web_process_that_dies_with_a_request_gives_json(redis: Redis) -> None:
    """mod_wsgi answers 500 up to version 5, and 502 since."""
    queue = f"queue-{free_port()}"
    with run_apache(IMAGE_QUEUE=queue) as url, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Service(url).post, PNG)
        wait_until(lambda: redis.llen(queue), "the job is queued")
        for pid in web_processes(url):
            os.kill(pid, signal.SIGKILL)

        response = asked.result(60)
        code = {500: "internal_error", 502: "bad_gateway"}[response.status_code]
        assert_error(response, response.status_code, code)
        wait_until(lambda: requests.get(f"{url}/livez", timeout=60).ok, "new web processes answer")


# What is missing, and what is too much


@pytest.fixture(scope="module")
def lonely(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A service without a model server, with short limits; and the name of its queue, which each test leaves empty."""
    queue = f"lonely-{free_port()}"
    with run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="2", MAX_QUEUE="3") as url:
        yield Service(url), queue


def test_without_a_model_server_ready_is_503(lonely: tuple[Service, str]) -> None:
    response = requests.get(f"{lonely[0].url}/readyz", timeout=10)

    assert_error_with_ready(response, "no_model_server")


def assert_error_with_ready(response: requests.Response, code: str) -> None:
    assert response.json()["ready"] is False
    assert response.headers["Retry-After"] == "5"
    assert_error(response, 503, code)


def test_without_a_model_server_a_request_is_504_in_time_and_says_why(lonely: tuple[Service, str]) -> None:
    started = time.monotonic()

    message = assert_error(lonely[0].post(PNG), 504, "timeout")

    assert "no model server is alive" in message
    assert 2 <= time.monotonic() - started < 3


@pytest.mark.parametrize(("alive", "code"), [(True, "queue_full"), (False, "no_model_server")])
def test_a_full_queue_is_503_with_retry_after(
    lonely: tuple[Service, str], redis: Redis, alive: bool, code: str
) -> None:
    service, queue = lonely
    redis.rpush(queue, *[json.dumps({"id": str(i), "image": "", "deadline": 0}) for i in range(3)])
    if alive:
        redis.set(f"{queue}:server:busy", json.dumps({"model": "digits", "weights": "digits.keras"}), ex=60)

    response = service.post(PNG)

    assert response.headers["Retry-After"] == "5"
    assert_error(response, 503, code)


def test_an_error_of_the_model_is_500_model_failed(lonely: tuple[Service, str], redis: Redis) -> None:
    """The answer is the one that a model server gives when an image breaks the model."""
    service, queue = lonely
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.post, PNG)
        job = json.loads(wait_until(lambda: redis.lindex(queue, 0), "the job is queued"))
        failed = {"error": {"code": "model_failed", "message": "The model could not classify this image."}}
        redis.rpush(f"{queue}:result:{job['id']}", json.dumps(failed))

        assert_error(asked.result(), 500, "model_failed")


def test_the_answer_of_a_model_server_before_its_upgrade_is_understood(
    lonely: tuple[Service, str], redis: Redis
) -> None:
    service, queue = lonely
    predictions = [{"label": "3", "probability": 0.9}]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.post, PNG)
        job = json.loads(wait_until(lambda: redis.lindex(queue, 0), "the job is queued"))
        redis.rpush(f"{queue}:result:{job['id']}", json.dumps({"predictions": predictions}))

        assert asked.result().json() == {"success": True, "predictions": predictions}


def test_without_redis_a_request_is_503_redis_down(tmp_path: Path) -> None:
    with run_apache(REDIS_PORT=str(free_port()), REDIS_TIMEOUT="1") as url:
        response = Service(url).post(PNG)

        assert response.headers["Retry-After"] == "5"
        assert_error(response, 503, "redis_down")
        assert_error_with_ready(requests.get(f"{url}/readyz", timeout=10), "redis_down")
        assert requests.get(f"{url}/livez", timeout=10).status_code == 200


# Right answers


def test_digits_that_training_never_saw_are_read(service: Service, held_out: list[tuple[bytes, str]]) -> None:
    responses = post_all(service, [image for image, _ in held_out])

    right = [r.json()["predictions"][0]["label"] == label for r, (_, label) in zip(responses, held_out, strict=True)]
    assert len(right) >= 300
    assert sum(right) / len(right) >= 0.97


def test_an_answer_does_not_depend_on_batch_mates(service: Service, held_out: list[tuple[bytes, str]]) -> None:
    images = [image for image, _ in held_out[:60]]

    alone = [service.predictions(image) for image in images[:10]]
    together = [response.json()["predictions"] for response in post_all(service, images)]

    for one, other in zip(alone, together, strict=False):
        assert one[0]["label"] == other[0]["label"]
        assert one[0]["probability"] == pytest.approx(other[0]["probability"], abs=1e-5)


@pytest.mark.slow("draws and sends 1,000 images")
def test_two_model_servers_answer_each_request_once_and_rightly(
    redis_port: int, tmp_path: Path, held_out: list[tuple[bytes, str]]
) -> None:
    """1,000 distinct images, each with the answer that one server alone gives."""
    rng = np.random.default_rng(1)
    _, (digits, classes) = split()
    chosen = rng.permutation(np.resize(np.arange(len(digits)), 1000))
    images = [saved(render(digits[i], "scan", rng), "PNG") for i in chosen]
    assert len(set(images)) == 1000
    with run_service(tmp_path, servers=2) as two:
        responses = post_all(two, images)
        served = [sum(map(int, re.findall(r"Batch size: \((\d+),", server.log))) for server in two.servers]

    assert [response.status_code for response in responses] == [200] * 1000
    right = sum(r.json()["predictions"][0]["label"] == str(classes[i]) for r, i in zip(responses, chosen, strict=True))
    assert right >= 970
    assert sum(served) == 1000
    assert min(served) > 100


@pytest.mark.slow("starts the service and a second model server")
def test_a_model_server_killed_in_mid_batch_loses_nothing(
    redis_port: int, tmp_path: Path, held_out: list[tuple[bytes, str]]
) -> None:
    images, labels = zip(*held_out[:200], strict=True)
    with run_service(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post_all, service, list(images))
        service.servers[0].wait_for_log("* Batch size", times=2)
        service.servers[0].stop(signal.SIGKILL)
        with run_model_server(tmp_path / "again", IMAGE_QUEUE=service.queue):
            responses = asked.result(120)

    assert [response.status_code for response in responses] == [200] * 200
    right = sum(r.json()["predictions"][0]["label"] == label for r, label in zip(responses, labels, strict=True))
    assert right >= 194


# Load


def test_500_requests_at_the_same_instant_are_all_answered(service: Service) -> None:
    figures = stress(service, "--interval", "0")

    assert figures["answered"] == 500


def test_hundreds_wait_where_a_process_begins_with_few_open_files(redis: Redis, tmp_path: Path) -> None:
    """As under systemd, whose limit for the sum of connections and files is 1,024 unless a process raises it."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    images, queue = 300, f"queue-{free_port()}"
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, most))
        try:
            url = stack.enter_context(run_apache(log=tmp_path / "apache", IMAGE_QUEUE=queue, REQUEST_TIMEOUT="120"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
        pool = stack.enter_context(ThreadPoolExecutor(images))
        asked = [pool.submit(Service(url).post, PNG) for _ in range(images)]
        wait_until(lambda: redis.llen(queue) == images, "all of them wait", 60)

        stack.enter_context(run_model_server(tmp_path / "server", IMAGE_QUEUE=queue))

        assert [answer.result(120).status_code for answer in asked] == [200] * images


@pytest.mark.slow("sends 500 requests in 25 seconds")
def test_the_tutorials_stress_test_passes(service: Service) -> None:
    figures = stress(service)

    assert figures["answered"] == 500


def stress(service: Service, *options: str) -> dict[str, Any]:
    command = [sys.executable, "stress_test.py", "--url", f"{service.url}/predict", "--json", "/dev/stdout", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    figures: dict[str, Any] = json.loads(ended.stdout[ended.stdout.index("\n{") :])
    return figures


def test_the_simple_client_prints_the_tutorials_lines(service: Service) -> None:
    command = [sys.executable, "simple_request.py", "models/digits/three.png", "--url", f"{service.url}/predict"]

    printed = subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)

    assert re.match(r"1\. 3: 0\.\d{4}\n2\. \d: 0\.\d{4}\n", printed)


@pytest.mark.slow("sends 1,000 photos")
def test_a_web_process_stays_small_under_load(service: Service, record_property: Callable[[str, object], None]) -> None:
    """In web processes of its own: what other tests made of the service's is not what a load takes."""
    photo = np.asarray(Image.fromarray(colours(0)).resize((375, 500))).astype(int)
    noisy = (photo + np.random.default_rng(0).integers(-20, 20, photo.shape)).clip(0, 255).astype(np.uint8)

    with run_apache(IMAGE_QUEUE=service.queue) as url:
        post_all(Service(url), [saved(Image.fromarray(noisy), "PNG")] * 1000, clients=200)
        sizes = [resident_bytes(pid) for pid in web_processes(url)]

    assert len(sizes) == 2
    assert max(sizes) < 110e6
    record_property("figures", f"at most {max(sizes) / 1e6:.0f} MB")


@pytest.mark.slow("waits for 256 timeouts")
def test_images_that_wait_are_not_kept_in_the_memory(
    redis: Redis, record_property: Callable[[str, object], None]
) -> None:
    image, queue = saved(Image.fromarray(colours(0)), "PNG"), f"queue-{free_port()}"
    with run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="15") as url, ThreadPoolExecutor(256) as pool:
        before = max(map(resident_bytes, web_processes(url)))
        asked = [pool.submit(Service(url).post, image) for _ in range(256)]
        wait_until(lambda: redis.llen(queue) == 256, "all of them wait")
        grown = max(map(resident_bytes, web_processes(url))) - before
        assert {each.result().status_code for each in asked} == {504}

    # Each of about 128 is 0.2 MB as text: kept once they would be 26 MB more.
    assert grown < 38e6
    record_property("figures", f"grown by {grown / 1e6:.0f} MB")


# The numbers that Keras itself gives


@pytest.fixture(scope="session")
def imagenet_names() -> bool:
    """Whether Keras has ImageNet's class names, or can fetch them: without internet it may not."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        keras.applications.resnet50.decode_predictions(np.zeros((1, 1000)), top=1)
    except Exception:
        return False
    finally:
        socket.setdefaulttimeout(patience)
    return True


def decoded(probabilities: Any, imagenet_names: bool) -> list[list[tuple[str, float]]]:
    """The five best of each row, by Keras' own decode_predictions or by the labels file of the test."""
    if imagenet_names:
        rows = keras.applications.resnet50.decode_predictions(probabilities, top=5)
        return [[(label, probability) for _, label, probability in row] for row in rows]
    return [[(f"label {i}", row[i]) for i in row.argsort()[::-1][:5]] for row in probabilities]


class Plain(NamedTuple):
    """What plain Keras makes of the samples with a ResNet50: the settings that serve it, and the probabilities."""

    settings: dict[str, str]
    probabilities: Any


@pytest.fixture(scope="module")
def plain_resnet50(tmp_path_factory: pytest.TempPathFactory, imagenet_names: bool) -> Plain:
    folder = tmp_path_factory.mktemp("resnet50")
    weights, labels = folder / "resnet50.weights.h5", folder / "labels.txt"
    keras.utils.set_random_seed(1)
    network = keras.applications.ResNet50(weights=None)
    network.save_weights(weights)
    labels.write_text("\n".join(f"label {i}" for i in range(1000)))
    sent = samples.samples()
    pixels = [Image.fromarray(sample.pixels).resize((224, 224), Image.Resampling.BICUBIC) for sample in sent]
    prepared = keras.applications.resnet50.preprocess_input(np.stack([np.asarray(p, np.float32) for p in pixels]))
    model = {"MODEL": "ResNet50", "MODEL_WEIGHTS": str(weights), "LABELS": "" if imagenet_names else str(labels)}
    return Plain(model, network.predict(prepared, verbose=0))


@pytest.mark.slow("warms up a ResNet50")
@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("torch", marks=pytest.mark.backends)])
def test_resnet50_through_http_equals_plain_keras(
    redis_port: int, tmp_path: Path, backend: str, imagenet_names: bool, plain_resnet50: Plain
) -> None:
    """20 images of all formats and modes: the same labels in the same order, probabilities to 1e-4."""
    if importlib.util.find_spec(backend) is None:
        missing(f"{backend} is not installed")
    sent = samples.samples()
    plain = plain_resnet50.probabilities

    # Warm-up measures each size of batch, which takes long for 32.
    with run_service(tmp_path, 1, KERAS_BACKEND=backend, BATCH_SIZE="8", **plain_resnet50.settings) as service:
        responses = post_all(service, [sample.data for sample in sent])

    assert len(sent) >= 20
    for sample, response, expected in zip(sent, responses, decoded(plain, imagenet_names), strict=True):
        got = [(each["label"], each["probability"]) for each in response.json()["predictions"]]
        assert [label for label, _ in got] == [label for label, _ in expected], sample.name
        assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=1e-4), sample.name
    assert np.ptp(plain[:, plain[0].argmax()]) > 0.01  # so that a mix-up would show
