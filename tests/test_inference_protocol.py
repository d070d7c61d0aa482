"""Inference in the Open Inference Protocol, with tritonclient and with requests made by hand."""

import gzip
import io
import json
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from harness import ROOT, Service, free_port, resident_bytes, run_apache, running, wait_until, web_processes
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

FILES = [(ROOT / "models/digits" / name).read_bytes() for name in ("three.png", "seven.jpg", "two.webp")]
DIGITS = [3, 7, 2]
CAT, EGYPTIAN_CAT = (ROOT / "images/cat.jpg").read_bytes(), 285  # and its class
NO_IMAGE = b"no image"
KEY = "the-key-of-2026-is-this"


@pytest.fixture
def client(service: Service) -> Iterator[InferenceServerClient]:
    connected = InferenceServerClient(service.url.removeprefix("http://"))
    yield connected
    connected.close()


def files_input(*files: bytes, binary: bool = True, column: bool = False) -> InferInput:
    """The input `image`; JSON has the files as base64."""
    shape = [len(files), 1] if column else [len(files)]
    made = InferInput("image", shape, "BYTES")
    contents = files if binary else list(map(b64encode, files))
    made.set_data_from_numpy(np.array(contents, object).reshape(shape), binary_data=binary)
    return made


def pixels_input(images: Any, datatype: str = "UINT8", *, binary: bool = True) -> InferInput:
    made = InferInput("pixels", list(images.shape), datatype)
    made.set_data_from_numpy(images, binary_data=binary)
    return made


def prepared(*files: bytes) -> Any:
    """The pixels of these files in the model's shape."""
    opened = [Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224)) for file in files]
    return np.stack([np.asarray(image) for image in opened])


def wanted(*, binary: bool = True, classes: int = 0) -> list[InferRequestedOutput]:
    return [InferRequestedOutput("probabilities", binary_data=binary, class_count=classes)]


def predicted(service: Service, file: bytes) -> list[float]:
    """The probabilities of all digits as /predict gives them, in the order of the digits."""
    answer = requests.post(f"{service.url}/predict?top=10", files={"image": file}, timeout=60).json()
    by_label = {each["label"]: each["probability"] for each in answer["predictions"]}
    return [by_label[str(digit)] for digit in range(10)]


@pytest.mark.parametrize("sent_binary", [True, False])
@pytest.mark.parametrize("got_binary", [True, False])
def test_images_get_the_probabilities_of_predict(
    service: Service, client: InferenceServerClient, sent_binary: bool, got_binary: bool
) -> None:
    [version] = client.get_model_metadata("digits")["versions"]

    result = client.infer("digits", [files_input(*FILES, binary=sent_binary)], outputs=wanted(binary=got_binary),
                          request_id="mine")  # fmt: skip

    probabilities = result.as_numpy("probabilities")
    assert probabilities.dtype == np.float32
    assert probabilities.argmax(axis=1).tolist() == DIGITS
    assert probabilities == pytest.approx(np.array([predicted(service, file) for file in FILES]), abs=1e-6)
    body = result.get_response()
    assert (body["model_name"], body["model_version"], body["id"]) == ("digits", version, "mine")
    assert ("data" in body["outputs"][0]) != got_binary


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("binary", [True, False])
def test_pixels_are_classified(client: InferenceServerClient, datatype: str, binary: bool) -> None:
    images = prepared(*FILES).astype({"UINT8": np.uint8, "FP32": np.float32}[datatype])

    result = client.infer("digits", [pixels_input(images, datatype, binary=binary)], outputs=wanted(binary=binary))

    assert result.as_numpy("probabilities").argmax(axis=1).tolist() == DIGITS


def test_an_image_has_the_same_probabilities_as_its_pixels(client: InferenceServerClient) -> None:
    images = prepared(*FILES)
    files = []
    for pixels in images:
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())

    of_files = client.infer("digits", [files_input(*files, column=True)]).as_numpy("probabilities")
    of_pixels = client.infer("digits", [pixels_input(images)]).as_numpy("probabilities")

    assert of_files == pytest.approx(of_pixels, abs=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_classification_names_the_most_probable_classes(
    service: Service, client: InferenceServerClient, binary: bool
) -> None:
    result = client.infer("digits", [files_input(*FILES[:2])], outputs=wanted(binary=binary, classes=3))

    rows = result.as_numpy("probabilities")
    assert rows.shape == (2, 3)
    for row, file in zip(rows, FILES, strict=False):
        expected = predicted(service, file)
        texts = [each.decode() if binary else each for each in row]
        indices = sorted(range(10), key=expected.__getitem__, reverse=True)[:3]
        assert texts == [f"{expected[index]:f}:{index}:{index}" for index in indices]


def test_more_classes_than_the_model_has_are_all_of_them(client: InferenceServerClient) -> None:
    assert client.infer("digits", [files_input(FILES[0])], outputs=wanted(classes=5000)).as_numpy(
        "probabilities"
    ).shape == (1, 10)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_a_version_and_a_compressed_request(client: InferenceServerClient, compression: str) -> None:
    [version] = client.get_model_metadata("digits")["versions"]

    result = client.infer("digits", [files_input(FILES[0])], version, request_compression_algorithm=compression)

    assert result.as_numpy("probabilities").argmax() == DIGITS[0]
    assert result.get_response()["model_version"] == version


def test_a_large_request_is_classified(client: InferenceServerClient) -> None:
    """It is stored on disk, unlike the others."""
    images = np.repeat(prepared(*FILES), 8, axis=0)

    for binary in (True, False):
        result = client.infer("digits", [pixels_input(images, binary=binary)])
        assert result.as_numpy("probabilities").argmax(axis=1).tolist() == [3] * 8 + [7] * 8 + [2] * 8


def error_of(call: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **more)
    return str(raised.value)


def test_errors_have_our_text_and_status(client: InferenceServerClient) -> None:
    one = files_input(FILES[0])
    twice = [files_input(FILES[0]), pixels_input(prepared(FILES[0]))]
    other_output = [InferRequestedOutput("logits")]

    assert "[404] There is no model cats" in error_of(client.infer, "cats", [one])
    assert "[404] The versions of digits served here are: " in error_of(client.infer, "digits", [one], "2")
    assert "[400] The request has 2 inputs" in error_of(client.infer, "digits", twice)
    assert "[400] The request has 0 inputs" in error_of(client.infer, "digits", [])
    assert "[400] The only output" in error_of(client.infer, "digits", [one], outputs=other_output)
    assert "[400] The input has another name" in error_of(client.infer, "digits", [InferInput("input_1", [1], "BYTES")])
    wrong = pixels_input(np.zeros((1, 28, 28, 1), np.uint8))
    assert "shape [n, 224, 224, 3])" in error_of(client.infer, "digits", [wrong])


def test_an_error_of_an_image_names_its_number(client: InferenceServerClient) -> None:
    cut = FILES[1][: len(FILES[1]) // 2]
    values = prepared(*FILES).astype(np.float32)
    values[1, 0, 0, 0] = np.nan

    assert "[400] This is text" in error_of(client.infer, "digits", [files_input(NO_IMAGE)])
    assert "[400] Image 1: This is text" in error_of(client.infer, "digits", [files_input(FILES[0], NO_IMAGE)])
    assert "[400] Image 2: The image is damaged" in error_of(client.infer, "digits", [files_input(*FILES[:2], cut)])
    assert "[400] Image 1: The tensor `pixels`" in error_of(client.infer, "digits", [pixels_input(values, "FP32")])


def test_limits_are_those_of_predict(service: Service, client: InferenceServerClient) -> None:
    large = np.zeros((32, 224, 224, 3), np.float32)
    url = f"{service.url}/v2/models/digits/infer"
    bomb = gzip.compress(b" " * 2**25)

    assert "[413] A request may have at most 32 images" in error_of(client.infer, "digits", [files_input(*FILES * 11)])
    assert "[413] A request may have at most 16 MB" in error_of(client.infer, "digits", [pixels_input(large, "FP32")])
    for encoding, status in (("gzip", 413), ("br", 415)):
        answer = requests.post(url, bomb, headers={"Content-Encoding": encoding}, timeout=60)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


def test_keys_and_rate_limits_hold(service: Service) -> None:
    with run_apache(IMAGE_QUEUE=service.queue, API_KEYS=KEY, RATE_LIMIT="2/hour") as url:
        client = InferenceServerClient(url.removeprefix("http://"))
        key, image = {"Authorization": f"Bearer {KEY}"}, files_input(FILES[0])
        texts = [error_of(client.infer, "digits", [image])]
        for _ in range(2):
            client.infer("digits", [image], headers=dict(key))
        texts.append(error_of(client.infer, "digits", [image], headers=dict(key)))
        refused = requests.post(f"{url}/v2/models/digits/infer", headers=key, timeout=10)
        client.close()

    assert "[401] Send a key" in texts[0]
    assert "[429] You have exceeded the limit of 2/hour" in texts[1]
    assert int(refused.headers["Retry-After"]) > 0


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v2/models/digits/infer/"])
def test_json_by_default(service: Service, path: str) -> None:
    sent = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64encode(FILES[0]).decode()]}],
            "parameters": {"classification": 1}}  # fmt: skip

    answer = requests.post(service.url + path, json=sent, timeout=60)

    assert answer.headers["Content-Type"] == "application/json"
    [output] = answer.json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "BYTES", [1, 1])
    assert output["data"][0].endswith(":3:3")
    assert "id" not in answer.json()
    assert "total;dur=" in answer.headers["Server-Timing"]
    assert answer.headers["X-Model"] == "digits"
    assert answer.headers["X-Model-Version"] == answer.json()["model_version"]


@pytest.mark.parametrize(
    ("body", "header"),
    [(b"", None), (b"{}", "3"), (b"{}", "-1"), (b"{}", "0"), (b"[" * 10**6, None), (b'{"inputs":' * 10**5, None),
     (b"\xff\xfe", None), (b"null", None), (b'{"inputs":[{}]}', "99999999999999999999"), (b"[" + b"0," * 10**6, None)],
)  # fmt: skip
def test_hostile_bodies_get_400(service: Service, body: bytes, header: str | None) -> None:
    headers = {} if header is None else {"Inference-Header-Content-Length": header}

    answer = requests.post(f"{service.url}/v2/models/digits/infer", body, headers=headers, timeout=60)

    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert answer.json()["error"].endswith(".")


def test_the_index_lists_models_and_their_versions(service: Service, client: InferenceServerClient) -> None:
    [version] = client.get_model_metadata("digits")["versions"]
    entry = {"name": "digits", "version": version, "state": "READY", "reason": ""}

    assert client.get_model_repository_index() == [entry]
    assert requests.get(f"{service.url}/v2/models/", timeout=10).json() == [entry]
    for ready in (True, False):
        answer = requests.post(f"{service.url}/v2/repository/index/", json={"ready": ready}, timeout=10)
        assert answer.json() == [entry]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ready": 1}', b" " * 10**6])
def test_an_invalid_request_for_the_index_gets_400(service: Service, body: bytes) -> None:
    answer = requests.post(f"{service.url}/v2/repository/index", body, timeout=10)

    assert (answer.status_code, list(json.loads(answer.text))) == (400, ["error"])


def test_the_documented_example_works(service: Service) -> None:
    """It runs with the digits model and other images; the tests' service has no other model."""
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    for name, here in {
        "localhost:8080": service.url.removeprefix("http://"),
        "efficientnet_lite0": "digits",
        "images/cat.jpg": "models/digits/three.png",
        "images/coffee.jpg": "models/digits/seven.jpg",
    }.items():
        assert name in program
        program = program.replace(name, here)

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("(2, 10) [3 7]\n")
    assert re.findall(r":(\d):(\d)'", done.stdout)[::3] == [("3", "3"), ("7", "7")]


def test_large_json_at_once_takes_no_more_memory_than_images(service: Service) -> None:
    """Each of these takes 570 MB to parse. Counts both web processes."""
    values = b'{"":0},' * (15 * 2**20 // 7)
    tensor = b'"name":"pixels","datatype":"FP32","shape":[1,224,224,3],"data":[%s0]' % values
    before, most = sum(map(resident_bytes, web_processes(service.url))), list[int]()

    def post() -> requests.Response:
        return requests.post(f"{service.url}/v2/models/digits/infer", b'{"inputs":[{%s}]}' % tensor, timeout=90)

    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(post) for _ in range(4)]
        while not all(answer.done() for answer in answers):
            most.append(sum(map(resident_bytes, web_processes(service.url))))
            time.sleep(0.01)

    assert {answer.result().status_code for answer in answers} == {400}
    assert max(most) - before < 7.2e8
    wait_until(lambda: sum(map(resident_bytes, web_processes(service.url))) < before + 1e8, "the memory is freed")


@pytest.mark.slow("loads the bundled model beside the digits")
def test_two_models_answer_each_its_own_images(redis_port: int, tmp_path: Path) -> None:
    """They take images of different sizes; both get requests at once."""
    names = {"digits": (FILES, DIGITS), "efficientnet_lite0": ([CAT], [EGYPTIAN_CAT])}
    queue, models = f"queue-{free_port()}", ",".join(f"models/{name}.keras" for name in names)
    with ExitStack() as stack:
        for name in names:
            command = [sys.executable, "run_model_server.py", "--model", f"models/{name}.keras"]
            stack.enter_context(running(command, tmp_path / name, IMAGE_QUEUE=queue, MODELS=models))
        url = stack.enter_context(run_apache(IMAGE_QUEUE=queue, MODELS=models))
        address = url.removeprefix("http://")

        def infer(name: str) -> Any:
            with closing(InferenceServerClient(address)) as client:
                return client.infer(name, [files_input(*names[name][0])]).as_numpy("probabilities")

        with closing(InferenceServerClient(address)) as client:
            ready = [(name, "READY") for name in names]
            wait_until(
                lambda: [(each["name"], each["state"]) for each in client.get_model_repository_index()] == ready,
                "both are ready", 120,
            )  # fmt: skip
        with ThreadPoolExecutor(4) as clients:
            asked = [(name, clients.submit(infer, name)) for _ in range(10) for name in names]

    for name, answer in asked:
        assert answer.result().argmax(axis=1).tolist() == names[name][1]
