"""What /predict takes and says besides the tutorial's form and the tutorial's JSON."""

import re
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Service, assert_error, free_port, raw_answer, run_apache, wait_until

THREE, SEVEN = (ROOT / "images" / name for name in ("three.png", "seven.jpg"))


def post(service: Service, *images: bytes, path: str = "/predict", **options: Any) -> requests.Response:
    files = [("image", ("photo", image)) for image in images]
    return requests.post(f"{service.url}{path}", files=files, timeout=60, **options)


@pytest.mark.parametrize(("image", "kind"), [(THREE, "image/png"), (SEVEN, "image/jpeg"), (SEVEN, "image/unheard-of")])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_image_may_be_the_body(service: Service, image: Path, kind: str, chunked: bool) -> None:
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
def test_a_body_that_is_no_image_is_refused(
    service: Service, body: bytes, status: int, code: str, chunked: bool
) -> None:
    sent: Any = iter([body]) if chunked and body else body

    answer = requests.post(f"{service.url}/predict", sent, headers={"Content-Type": "image/png"}, timeout=60)

    assert_error(answer, status, code)


def test_each_of_several_images_gets_what_it_would_get_alone(service: Service) -> None:
    three, bad, seven = THREE.read_bytes(), b"no image", SEVEN.read_bytes()

    answer = post(service, three, bad, seven)

    assert answer.status_code == 200
    alone = [post(service, image).json() for image in (three, bad, seven)]
    assert answer.json() == {"success": False, "results": alone}
    assert [each["success"] for each in alone] == [True, False, True]


def test_several_images_that_are_all_classified_are_a_success(service: Service) -> None:
    answer = post(service, *[THREE.read_bytes()] * 32).json()

    assert answer["success"] is True
    assert [each["predictions"][0]["label"] for each in answer["results"]] == ["3"] * 32


def test_too_many_images_are_413(service: Service) -> None:
    message = assert_error(post(service, *[THREE.read_bytes()] * 33), 413, "too_large")

    assert "32 images" in message


@pytest.mark.parametrize("top", [1, 7])
def test_top_says_how_many_predictions_there_are(service: Service, top: int) -> None:
    answer = post(service, THREE.read_bytes(), path=f"/predict?top={top}")

    everything = post(service, THREE.read_bytes(), path="/predict?top=1000").json()["predictions"]
    assert answer.json()["predictions"] == everything[:top]
    assert len(everything) == 10


@pytest.mark.parametrize("top", ["0", "-1", "1001", "five", "", "1.5", "%D9%A3"])
def test_a_top_that_makes_no_sense_is_400(service: Service, top: str) -> None:
    assert_error(post(service, THREE.read_bytes(), path=f"/predict?top={top}"), 400, "bad_request")


def test_a_request_has_its_clients_id_in_its_answer_and_in_the_log(service: Service) -> None:
    answer = post(service, THREE.read_bytes(), headers={"X-Request-ID": "order-66.a_b"})

    assert answer.headers["X-Request-ID"] == "order-66.a_b"
    wait_until(lambda: "order-66.a_b" in service.servers[0].log, "the model server's log has it")


@pytest.mark.parametrize("given", [None, "", "two words", "a" * 65, "<script>", "ü"])
def test_a_request_without_a_sensible_id_gets_one_of_its_own(service: Service, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-ID": given.encode("latin-1")}

    answers = [post(service, THREE.read_bytes(), headers=headers) for _ in range(2)]

    ids = {answer.headers["X-Request-ID"] for answer in answers}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[\w@-]{20,64}", each, re.ASCII) for each in ids)


def test_an_error_has_an_id_too_apaches_own_included(service: Service) -> None:
    refused = requests.post(f"{service.url}/predict", b"", timeout=60)
    by_apache = raw_answer(service, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")

    assert (refused.status_code, by_apache.status_code) == (400, 400)
    for answer in (refused, by_apache):
        assert "," not in answer.headers["X-Request-ID"]  # one, not one of each


def test_the_time_of_each_stage_is_told(service: Service) -> None:
    took = post(service, THREE.read_bytes()).headers["Server-Timing"]

    stages = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", took)}
    assert list(stages) == ["prepare", "queue", "compute", "total"]
    assert 'desc="batch of 1"' in took
    assert min(stages["prepare"], stages["compute"]) > 0
    assert stages["total"] >= stages["prepare"] + stages["queue"] + stages["compute"] - 0.2  # each is rounded


def get(service: Service, path: str) -> requests.Response:
    return requests.get(f"{service.url}{path}", timeout=10)


def test_the_open_inference_protocol_has_its_health_and_metadata(service: Service) -> None:
    assert get(service, "/v2/health/live").json() == {"live": True}
    assert get(service, "/v2/health/ready").json() == {"ready": True}
    assert get(service, "/v2/models/digits/ready").json() == {"name": "digits", "ready": True}
    assert get(service, "/v2").json()["name"] == "keras-rest-api"
    assert get(service, "/v2/models/digits").json() == {
        "name": "digits",
        "versions": ["digits.keras"],
        "platform": "keras",
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 224, 224, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}],
    }


@pytest.mark.parametrize("path", ["/v2/models/cats", "/v2/models/cats/ready"])
def test_of_a_model_that_is_not_served_it_says_which_are(service: Service, path: str) -> None:
    assert "digits" in assert_error(get(service, path), 404, "not_found")


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/digits", "/v2/models/digits/ready"])
def test_without_a_model_server_it_is_not_ready(path: str) -> None:
    with run_apache(IMAGE_QUEUE=f"queue-{free_port()}") as url:
        assert_error(get(Service(url), path), 503, "no_model_server")
        assert get(Service(url), "/v2/health/live").status_code == 200
