"""The whole service from the outside: a real Apache with mod_wsgi, a real Redis, real Keras models."""

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
from harness import (
    ROOT,
    Missing,
    Service,
    assert_error,
    free_port,
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
from samples import colors, saved
from train_digits import render, split

PNG = saved(Image.fromarray(colors(0)), "PNG")


@pytest.fixture(scope="session")
def held_out() -> list[tuple[bytes, str]]:
    """Digits that were held out from training, as PNG files in four styles, each with its label."""
    rng = np.random.default_rng(20)
    styles = ("raw", "scan", "inverted", "photo")
    _, (digits, classes) = split()
    images = [render(digit, styles[i % 4], rng) for i, digit in enumerate(digits)]
    return [(saved(image, "PNG"), str(label)) for image, label in zip(images, classes, strict=True)]


def post_all(service: Service, images: list[bytes], clients: int = 64) -> list[requests.Response]:
    """Post every image with `clients` at once; return the responses in the order of the images."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(service.post, images))


# The API


def test_homepage_welcomes_the_client(service: Service) -> None:
    response = requests.get(service.url, timeout=10)

    assert response.status_code == 200
    assert "Welcome to the PyImageSearch Keras REST API!" in response.text


def test_predict_returns_the_tutorials_json(service: Service) -> None:
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


def test_livez_is_200(service: Service) -> None:
    assert requests.get(f"{service.url}/livez", timeout=10).status_code == 200


def test_readyz_names_the_model_that_is_served(service: Service) -> None:
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
    ids=["missing field", "empty", "not an image", "truncated"],
)
def test_request_without_a_valid_image_is_400(service: Service, files: dict[str, bytes], code: str) -> None:
    assert_error(requests.post(f"{service.url}/predict", files=files, timeout=10), 400, code)


def test_empty_post_is_400(service: Service) -> None:
    assert_error(requests.post(f"{service.url}/predict", timeout=10), 400, "missing_image")


def test_unknown_path_is_404(service: Service) -> None:
    assert_error(requests.get(f"{service.url}/predictions", timeout=10), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/predict"), ("DELETE", "/predict"), ("POST", "/"), ("BREW", "/")]
)
def test_wrong_method_is_405(service: Service, method: str, path: str) -> None:
    response = requests.request(method, service.url + path, timeout=10)

    assert_error(response, 405, "method_not_allowed")
    assert response.headers["Allow"]


def test_too_many_pixels_are_413(service: Service) -> None:
    """The header is enough: this file has no pixel data."""
    header = saved(Image.new("1", (8100, 8100)), "PNG")[:100]

    assert "megapixels" in assert_error(service.post(header), 413, "too_large")


def test_web_rejects_too_many_bytes_with_413(service: Service) -> None:
    assert "16 MB" in assert_error(service.post(b"x" * (16 * 2**20 - 50)), 413, "too_large")


def test_apache_rejects_far_too_many_bytes_with_413(service: Service) -> None:
    """Content-Length is enough: the body is never sent."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 170000000\r\n\r\n"

    assert "far larger" in assert_error(raw_answer(service, head), 413, "too_large")


def test_chunked_upload_has_the_same_size_limit(service: Service) -> None:
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
def test_apaches_own_errors_are_json(service: Service, request_bytes: bytes, status: int, code: str) -> None:
    assert_error(raw_answer(service, request_bytes), status, code)


@pytest.mark.slow("waits for the 20-second limit of the site")
def test_stalled_request_gets_408(service: Service) -> None:
    started = time.monotonic()
    form = b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"

    response = raw_answer(service, b"POST /predict HTTP/1.1\r\nHost: x\r\n" + form)

    assert_error(response, 408, "request_timeout")
    assert time.monotonic() - started < 40


def test_web_process_that_cannot_start_gives_json_500() -> None:
    with run_apache(wait=False, BATCH_SIZE="0") as url:
        [response] = wait_until(lambda: answers(url), "Apache answers")

        assert_error(response, 500, "internal_error")


def answers(url: str) -> list[requests.Response]:
    """The homepage's response in a list, which is empty if there is none. A response with an error status is falsy."""
    with suppress(requests.RequestException):
        return [requests.get(url, timeout=60)]
    return []


def test_web_process_that_dies_during_a_request_gives_json(redis: Redis) -> None:
    """mod_wsgi responds 500 up to version 5, and 502 in later ones."""
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


# Missing parts and overload


@pytest.fixture(scope="module")
def without_server(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A service without a model server, with short limits, and the name of its queue, which each test leaves empty."""
    queue = f"lonely-{free_port()}"
    with run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="2", MAX_QUEUE="3") as url:
        yield Service(url), queue


def test_readyz_without_model_server_is_503(without_server: tuple[Service, str]) -> None:
    response = requests.get(f"{without_server[0].url}/readyz", timeout=10)

    assert_error_with_ready(response, "no_model_server")


def assert_error_with_ready(response: requests.Response, code: str) -> None:
    assert response.json()["ready"] is False
    assert response.headers["Retry-After"] == "5"
    assert_error(response, 503, code)


def test_request_without_model_server_is_504_with_reason(without_server: tuple[Service, str]) -> None:
    started = time.monotonic()

    message = assert_error(without_server[0].post(PNG), 504, "timeout")

    assert "no model server for digits is alive" in message
    assert 2 <= time.monotonic() - started < 3


@pytest.mark.parametrize(("alive", "code"), [(True, "queue_full"), (False, "no_model_server")])
def test_full_queue_is_503_with_retry_after(
    without_server: tuple[Service, str], redis: Redis, alive: bool, code: str
) -> None:
    service, queue = without_server
    redis.rpush(queue, *[json.dumps({"id": str(i), "image": "", "deadline": 0}) for i in range(3)])
    if alive:
        redis.set(f"{queue}:server:busy", json.dumps({"model": "digits", "weights": "digits.keras"}), ex=60)

    response = service.post(PNG)

    assert response.headers["Retry-After"] == "5"
    assert_error(response, 503, code)


def test_model_error_is_500_model_failed(without_server: tuple[Service, str], redis: Redis) -> None:
    """The test stands in for the model server, with its answer to an image that breaks the model."""
    service, queue = without_server
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.post, PNG)
        job = json.loads(wait_until(lambda: redis.lindex(queue, 0), "the job is queued"))
        failed = {"error": {"code": "model_failed", "message": "The model could not classify this image."}}
        redis.rpush(f"{queue}:result:{job['id']}", json.dumps(failed))

        assert_error(asked.result(), 500, "model_failed")


def test_answer_of_an_older_model_server_is_understood(without_server: tuple[Service, str], redis: Redis) -> None:
    service, queue = without_server
    predictions = [{"label": "3", "probability": 0.9}]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.post, PNG)
        job = json.loads(wait_until(lambda: redis.lindex(queue, 0), "the job is queued"))
        redis.rpush(f"{queue}:result:{job['id']}", json.dumps({"predictions": predictions}))

        assert asked.result().json() == {"success": True, "predictions": predictions}


def test_request_without_redis_is_503(tmp_path: Path) -> None:
    with run_apache(REDIS_PORT=str(free_port()), REDIS_TIMEOUT="1") as url:
        response = Service(url).post(PNG)

        assert response.headers["Retry-After"] == "5"
        assert_error(response, 503, "redis_down")
        assert_error_with_ready(requests.get(f"{url}/readyz", timeout=10), "redis_down")
        assert requests.get(f"{url}/livez", timeout=10).status_code == 200


# Correct results


def test_held_out_digits_are_recognized(service: Service, held_out: list[tuple[bytes, str]]) -> None:
    responses = post_all(service, [image for image, _ in held_out])

    right = [r.json()["predictions"][0]["label"] == label for r, (_, label) in zip(responses, held_out, strict=True)]
    assert len(right) >= 300
    assert sum(right) / len(right) >= 0.97


def test_result_does_not_depend_on_the_rest_of_the_batch(service: Service, held_out: list[tuple[bytes, str]]) -> None:
    images = [image for image, _ in held_out[:60]]

    alone = [service.predictions(image) for image in images[:10]]
    together = [response.json()["predictions"] for response in post_all(service, images)]

    for one, other in zip(alone, together, strict=False):
        assert one[0]["label"] == other[0]["label"]
        assert one[0]["probability"] == pytest.approx(other[0]["probability"], abs=1e-5)


@pytest.mark.slow("draws and sends 1,000 images")
def test_two_model_servers_answer_each_request_correctly_once(
    redis_port: int, tmp_path: Path, held_out: list[tuple[bytes, str]]
) -> None:
    """All 1,000 images differ."""
    rng = np.random.default_rng(1)
    _, (digits, classes) = split()
    chosen = rng.permutation(np.resize(np.arange(len(digits)), 1000))
    images = [saved(render(digits[i], "scan", rng), "PNG") for i in chosen]
    assert len(set(images)) == 1000
    with run_service(tmp_path, servers=2) as two:
        responses = post_all(two, images)
        served = [sum(server.batches) for server in two.servers]

    assert [response.status_code for response in responses] == [200] * 1000
    right = sum(r.json()["predictions"][0]["label"] == str(classes[i]) for r, i in zip(responses, chosen, strict=True))
    assert right >= 970
    assert sum(served) == 1000
    assert min(served) > 100


@pytest.mark.slow("starts the service and a second model server")
def test_model_server_killed_mid_batch_loses_no_request(
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


def test_500_simultaneous_requests_are_all_answered(service: Service) -> None:
    figures = stress(service, "--interval", "0")

    assert figures["answered"] == 500


@pytest.mark.slow("starts a service of its own for hundreds of requests")
def test_hundreds_of_requests_wait_despite_a_low_file_limit(redis: Redis, tmp_path: Path) -> None:
    """systemd limits open files to 1,024 unless a process raises its limit; connections count as files."""
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
        wait_until(lambda: redis.llen(queue) == images, "all are queued", 60)

        stack.enter_context(run_model_server(tmp_path / "server", IMAGE_QUEUE=queue))

        assert [answer.result(120).status_code for answer in asked] == [200] * images


@pytest.mark.slow("sends 500 requests in 25 seconds")
def test_tutorials_stress_test_passes(service: Service) -> None:
    figures = stress(service)

    assert figures["answered"] == 500


def stress(service: Service, *options: str) -> dict[str, Any]:
    command = [sys.executable, "stress_test.py", "--url", f"{service.url}/predict", "--json", "/dev/stdout", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    figures: dict[str, Any] = json.loads(ended.stdout[ended.stdout.index("\n{") :])
    return figures


def test_simple_client_prints_the_tutorials_lines(service: Service) -> None:
    command = [sys.executable, "simple_request.py", "models/digits/three.png", "--url", f"{service.url}/predict"]

    printed = subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)

    assert re.match(r"1\. 3: 0\.\d{4}\n2\. \d: 0\.\d{4}\n", printed)


@pytest.mark.slow("sends 1,000 photos")
def test_web_process_stays_small_under_load(service: Service, record_property: Callable[[str, object], None]) -> None:
    """Uses new web processes, since other tests may have enlarged those of `service`."""
    photo = np.asarray(Image.fromarray(colors(0)).resize((375, 500))).astype(int)
    noisy = (photo + np.random.default_rng(0).integers(-20, 20, photo.shape)).clip(0, 255).astype(np.uint8)

    with run_apache(IMAGE_QUEUE=service.queue) as url:
        post_all(Service(url), [saved(Image.fromarray(noisy), "PNG")] * 1000, clients=200)
        sizes = [resident_bytes(pid) for pid in web_processes(url)]

    assert len(sizes) == 2
    assert max(sizes) < 125e6  # without limit_malloc() 145e6
    record_property("figures", f"at most {max(sizes) / 1e6:.0f} MB")


@pytest.mark.slow("waits for 256 timeouts")
def test_few_queued_images_are_kept_in_memory(redis: Redis, record_property: Callable[[str, object], None]) -> None:
    image, queue = saved(Image.fromarray(colors(0)), "PNG"), f"queue-{free_port()}"
    web = run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="15", IMAGE_HEIGHT="600", IMAGE_WIDTH="600")
    with web as url, ThreadPoolExecutor(256) as pool:
        before = max(map(resident_bytes, web_processes(url)))
        asked = [pool.submit(Service(url).post, image) for _ in range(256)]
        wait_until(lambda: redis.llen(queue) == 256, "all are queued")
        grown = max(map(resident_bytes, web_processes(url))) - before
        assert {each.result().status_code for each in asked} == {504}

    # Each process has about 128 images of 1.4 MB as text, of which 16 MB may stay in memory. With all of them it grows
    # by more than 250 MB; with none, by about 80 MB for what it imports, its threads, and the images of one moment.
    assert grown < 150e6
    record_property("figures", f"grown by {grown / 1e6:.0f} MB")


# The same numbers as Keras


@pytest.fixture(scope="session")
def imagenet_names() -> bool:
    """Whether Keras has the ImageNet class names, or can download them."""
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        keras.applications.resnet50.decode_predictions(np.zeros((1, 1000)), top=1)
    except Exception:
        return False
    finally:
        socket.setdefaulttimeout(default)
    return True


def decoded(probabilities: Any, imagenet_names: bool) -> list[list[tuple[str, float]]]:
    """The top five of each row, with labels from Keras' decode_predictions or from the test's labels file."""
    if imagenet_names:
        rows = keras.applications.resnet50.decode_predictions(probabilities, top=5)
        return [[(label, probability) for _, label, probability in row] for row in rows]
    return [[(f"label {i}", row[i]) for i in row.argsort()[::-1][:5]] for row in probabilities]


class Plain(NamedTuple):
    """Settings that serve a ResNet50, and its probabilities for the samples computed directly in Keras."""

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
    """20 images in all formats and modes give the same labels in the same order, probabilities within 1e-4."""
    if importlib.util.find_spec(backend) is None:
        raise Missing(f"{backend} is not installed")
    sent = samples.samples()
    plain = plain_resnet50.probabilities

    # Warm-up times every batch size; up to 32 would take long.
    with run_service(tmp_path, 1, KERAS_BACKEND=backend, BATCH_SIZE="8", **plain_resnet50.settings) as service:
        responses = post_all(service, [sample.data for sample in sent])

    assert len(sent) >= 20
    for sample, response, expected in zip(sent, responses, decoded(plain, imagenet_names), strict=True):
        got = [(each["label"], each["probability"]) for each in response.json()["predictions"]]
        assert [label for label, _ in got] == [label for label, _ in expected], sample.name
        assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=1e-4), sample.name
    assert np.ptp(plain[:, plain[0].argmax()]) > 0.01  # the images differ enough for a mix-up to be noticed
