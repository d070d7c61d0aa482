"""What /predict accepts and returns beyond the tutorial, and the Open Inference Protocol."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import ROOT, Service, assert_error, free_port, raw_answer, run_apache, wait_until
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

import settings
from image_queue import WebQueue
from model_server.model_version import version_of
from run_web_server import create_app

THREE, SEVEN = (ROOT / "models/digits" / name for name in ("three.png", "seven.jpg"))


def post(service: Service, *images: bytes, path: str = "/predict", **options: Any) -> requests.Response:
    files = [("image", ("photo", image)) for image in images]
    return requests.post(f"{service.url}{path}", files=files, timeout=60, **options)


@pytest.mark.parametrize(("image", "kind"), [(THREE, "image/png"), (SEVEN, "image/jpeg"), (SEVEN, "image/unheard-of")])
@pytest.mark.parametrize("chunked", [False, True])
def test_image_may_be_the_request_body(service: Service, image: Path, kind: str, chunked: bool) -> None:
    data = image.read_bytes()
    body: Any = iter([data[:100], data[100:]]) if chunked else data

    answer = requests.post(f"{service.url}/predict", body, headers={"Content-Type": kind}, timeout=60)

    assert answer.status_code == 200
    assert answer.json() == post(service, data).json()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b"", 400, "missing_image"), (b"no image", 400, "bad_image"), (b"." * (16 * 2**20 + 1), 413, "too_large")],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_not_an_image_is_rejected(
    service: Service, body: bytes, status: int, code: str, chunked: bool
) -> None:
    sent: Any = iter([body]) if chunked and body else body

    answer = requests.post(f"{service.url}/predict", sent, headers={"Content-Type": "image/png"}, timeout=60)

    assert_error(answer, status, code)


def test_each_of_several_images_gets_its_own_result(service: Service) -> None:
    three, bad, seven = THREE.read_bytes(), b"no image", SEVEN.read_bytes()

    answer = post(service, three, bad, seven)

    assert answer.status_code == 200
    alone = [post(service, image).json() for image in (three, bad, seven)]
    assert answer.json() == {"success": False, "results": alone}
    assert [each["success"] for each in alone] == [True, False, True]


def test_request_succeeds_if_all_its_images_are_classified(service: Service) -> None:
    answer = post(service, *[THREE.read_bytes()] * 32).json()

    assert answer["success"] is True
    assert [each["predictions"][0]["label"] for each in answer["results"]] == ["3"] * 32


def test_request_with_too_many_images_is_413(service: Service) -> None:
    message = assert_error(post(service, *[THREE.read_bytes()] * 33), 413, "too_large")

    assert "32 images" in message


@pytest.mark.parametrize("top", [1, 7])
def test_top_sets_the_number_of_predictions(service: Service, top: int) -> None:
    answer = post(service, THREE.read_bytes(), path=f"/predict?top={top}")

    everything = post(service, THREE.read_bytes(), path="/predict?top=1000").json()["predictions"]
    assert answer.json()["predictions"] == everything[:top]
    assert len(everything) == 10


@pytest.mark.parametrize("top", ["0", "-1", "1001", "five", "", "1.5", "%D9%A3"])
def test_invalid_top_is_400(service: Service, top: str) -> None:
    assert_error(post(service, THREE.read_bytes(), path=f"/predict?top={top}"), 400, "bad_request")


def test_clients_request_id_is_returned_and_logged(service: Service) -> None:
    answer = post(service, THREE.read_bytes(), headers={"X-Request-ID": "order-66.a_b"})

    assert answer.headers["X-Request-ID"] == "order-66.a_b"
    wait_until(lambda: "order-66.a_b" in service.servers[0].log, "the id is in the model server's log")


@pytest.mark.parametrize("given", [None, "", "two words", "a" * 65, "<script>", "ü"])
def test_request_without_a_valid_id_gets_a_new_one(service: Service, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-ID": given.encode("latin-1")}

    answers = [post(service, THREE.read_bytes(), headers=headers) for _ in range(2)]

    ids = {answer.headers["X-Request-ID"] for answer in answers}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[\w@-]{20,64}", each, re.ASCII) for each in ids)


def test_errors_have_a_request_id(service: Service) -> None:
    refused = requests.post(f"{service.url}/predict", b"", timeout=60)
    by_apache = raw_answer(service, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")

    assert (refused.status_code, by_apache.status_code) == (400, 400)
    for answer in (refused, by_apache):
        assert "," not in answer.headers["X-Request-ID"]  # one id, not one from Apache and another from the app


def test_server_timing_has_every_stage(service: Service) -> None:
    took = post(service, THREE.read_bytes()).headers["Server-Timing"]

    stages = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", took)}
    assert list(stages) == ["prepare", "queue", "compute", "total"]
    assert 'desc="batch of 1"' in took
    assert min(stages["prepare"], stages["compute"]) > 0
    assert stages["total"] >= stages["prepare"] + stages["queue"] + stages["compute"] - 0.2  # rounding


def get(service: Service, path: str) -> requests.Response:
    return requests.get(f"{service.url}{path}", timeout=10)


# The Open Inference Protocol


def assert_protocol_error(answer: Any, status: int) -> str:
    """Check that this is an error in the protocol's format; return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert list(answer.json()) == ["error"]
    text: str = answer.json()["error"]
    assert text.endswith(".")
    assert "\n" not in text
    return text


PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": [-1, 224, 224, 3]}
VERSION = version_of(ROOT / f"models/digits{suffix}" for suffix in (".keras", ".json", ".labels.txt"))
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository"]
METADATA = {
    "name": "digits",
    "versions": [VERSION],
    "platform": "keras",
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}, PIXELS],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}],
}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v2/health/live", {"live": True}), ("/v2/health/ready", {"live": True, "ready": True}),
     ("/v2/models/digits", METADATA), (f"/v2/models/digits/versions/{VERSION}", METADATA),
     ("/v2/models/digits/ready", {"name": "digits", "ready": True}),
     (f"/v2/models/digits/versions/{VERSION}/ready", {"name": "digits", "ready": True})],
)  # fmt: skip
def test_protocol_health_and_model_metadata(service: Service, path: str, body: dict[str, Any]) -> None:
    for address in (path, f"{path}/"):
        answer = get(service, address)

        assert (answer.status_code, answer.json()) == (200, body)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_protocol_server_metadata(service: Service, path: str) -> None:
    assert get(service, path).json() == {"name": "keras-rest-api", "version": "1", "extensions": EXTENSIONS}


@pytest.mark.parametrize("path", ["/v2/models/cats", "/v2/models/cats/ready", "/v2/models/cats/versions/1",
                                  "/v2/models/digits/versions/2", "/v2/models/digits/versions/2/ready"])  # fmt: skip
def test_unknown_model_or_version_is_404_and_lists_known_ones(service: Service, path: str) -> None:
    assert "digits" in assert_protocol_error(get(service, path), 404)


@pytest.mark.parametrize(
    "path",
    ["/v2/nothing", "/v2/models/a%2Fb", "/v2/models/a%2Fb/ready", "/v2/repository/models/digits/load",
     "/v2//models/digits/nothing"],
)  # fmt: skip
def test_unknown_path_below_v2_is_404_in_protocol_format(service: Service, path: str) -> None:
    assert_protocol_error(get(service, path), 404)


@pytest.mark.parametrize("path", ["/v2x", "/v3/models/digits", "/predict%2F"])
def test_unknown_path_elsewhere_is_404_in_the_services_format(service: Service, path: str) -> None:
    assert_error(get(service, path), 404, "not_found")


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", f"/v2/models/digits/versions/{VERSION}"])
def test_wrong_method_below_v2_is_405(service: Service, path: str) -> None:
    answer = requests.delete(service.url + path, timeout=10)

    assert_protocol_error(answer, 405)
    assert "GET" in answer.headers["Allow"]


def test_apaches_errors_below_v2_have_protocol_format(service: Service) -> None:
    too_large = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"

    assert_protocol_error(raw_answer(service, too_large), 413)


def test_tritonclient_reads_answers_and_errors(service: Service) -> None:
    with triton(service.url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata()["name"] == "keras-rest-api"
        assert client.get_model_metadata("digits") == METADATA
        [version] = METADATA["versions"]
        assert client.get_model_metadata("digits", version) == METADATA
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", version)
        assert not client.is_model_ready("digits", "2")
        assert not client.is_model_ready("cats")

        assert "[404] The models served here are: digits." in error_text(client.get_model_metadata, "cats")
        assert f"[404] The versions of digits served here are: {VERSION}." in error_text(
            client.get_model_metadata, "digits", "2"
        )
        assert "[404] There is nothing at this address" in error_text(client.load_model, "digits")


def test_tritonclient_learns_why_the_service_is_not_ready(redis_port: int) -> None:
    with run_apache(IMAGE_QUEUE=f"queue-{free_port()}", API_KEYS="the-key-of-2026-is-this") as url:
        with triton(url) as client:
            assert client.is_server_live()
            assert not client.is_server_ready()
            assert not client.is_model_ready("digits")
            assert "[503] No model server of digits is alive" in error_text(client.get_model_metadata, "digits")
            assert "[401] Send a key" in error_text(client.infer, "digits", [])
        for path in ("/v2/health/ready", "/v2/models/digits", "/v2/models/digits/versions/1/ready"):
            answer = get(Service(url), path)
            assert_protocol_error(answer, 503)
            assert answer.headers["Retry-After"] == "5"


@contextmanager
def triton(url: str) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(url.removeprefix("http://"))
    try:
        yield client
    finally:
        client.close()


def error_text(call: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **more)
    return str(raised.value)


def test_internal_error_below_v2_has_protocol_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WebQueue, "live_servers_by_queue", lambda _: 1 / 0)

    answer = create_app().test_client().get("/v2/health/ready")

    assert (answer.status_code, list(answer.get_json())) == (500, ["error"])


def serve_only(monkeypatch: pytest.MonkeyPatch, servers: dict[str, Any]) -> None:
    """Let the web find these live servers, of an older version, on the default queue, which is empty."""
    monkeypatch.setattr(WebQueue, "live_servers", lambda _: servers)
    monkeypatch.setattr(WebQueue, "live_servers_by_queue", lambda _: {settings.IMAGE_QUEUE: servers})
    monkeypatch.setattr(WebQueue, "waiting", lambda _: 0)


@pytest.mark.parametrize(
    ("weights", "version"),
    [("digits.keras", "digits.keras"), ("my model (2).keras", "my-model-2-.keras"), ("vögel.keras", "v-gel.keras"),
     ("a/b?c#d%20", "a-b-c-d-20"), ("imagenet", "imagenet")],
)  # fmt: skip
def test_version_is_url_safe(monkeypatch: pytest.MonkeyPatch, weights: str, version: str) -> None:
    server = {"model": "birds", "weights": weights, "shape": [224, 224, 3], "classes": 2}
    serve_only(monkeypatch, {"a": server, "b": server})
    client = create_app().test_client()

    assert client.get("/v2/models/birds").get_json()["versions"] == [version]
    assert client.get(f"/v2/models/birds/versions/{version}/ready").status_code == 200


def test_both_versions_are_listed_while_a_model_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = {name: {"model": "birds", "weights": f"{name}.keras", "shape": [64, 64, 3], "classes": classes}
               for name, classes in (("new", 3), ("old", 2))}  # fmt: skip
    serve_only(monkeypatch, servers)
    client = create_app().test_client()

    for version, classes in (("new.keras", 3), ("old.keras", 2)):
        body = client.get(f"/v2/models/birds/versions/{version}").get_json()
        assert body["versions"] == ["new.keras", "old.keras"]
        assert body["outputs"][0]["shape"] == [-1, classes]
