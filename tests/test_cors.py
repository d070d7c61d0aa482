"""CORS: what pages of other origins may do with CORS_ORIGINS, and that they may do nothing without it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from harness import ROOT, Service, assert_error, raw_answer, run_apache

THREE = (ROOT / "models/digits/three.png").read_bytes()
APP, LOCAL, OTHER = "https://app.example", "http://localhost:3000", "https://evil.example"
KEY, OTHER_KEY = "the-key-of-2026-is-this", "the-key-of-2027-is-that"


@pytest.fixture(scope="module")
def shared(service: Service) -> Iterator[Service]:
    """A service that pages of two origins may call with a key."""
    origins, keys = f"{APP},{LOCAL}", f"{KEY},{OTHER_KEY}"
    with run_apache(IMAGE_QUEUE=service.queue, CORS_ORIGINS=origins, API_KEYS=keys, RATE_LIMIT="20/minute") as url:
        yield Service(url)


def preflight(url: str, origin: str, method: str = "POST") -> requests.Response:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization"}
    return requests.options(url, headers={"Origin": origin} | asked, timeout=10)


def post(service: Service, origin: str, body: bytes = THREE, key: str = KEY) -> requests.Response:
    return service.post(body, headers={"Origin": origin, "Authorization": f"Bearer {key}"})


def send_headers(service: Service, origin: str, length: str) -> requests.Response:
    """Send the headers of a request that Apache rejects for its Content-Length."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nContent-Length: {length}\r\n\r\n"
    return raw_answer(service, head.encode())


def access_headers(answer: Any) -> list[str]:
    return [name for name in answer.headers if name.startswith("Access-Control-")]


def assert_shared(answer: Any, origin: str) -> None:
    """Check that a browser would let a page of `origin` read the response and its useful headers."""
    assert answer.headers["Access-Control-Allow-Origin"] == origin  # once, not from both Apache and the app
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Request-ID", "Retry-After", "Server-Timing"} <= set(exposed)
    assert "Origin" in re.split(r", ?", answer.headers["Vary"])
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", [APP, LOCAL])
def test_preflight_needs_no_key(shared: Service, origin: str) -> None:
    answer = preflight(f"{shared.url}/predict", origin)

    assert answer.ok
    assert_shared(answer, origin)
    assert "POST" in answer.headers["Access-Control-Allow-Methods"].split(", ")
    allowed = set(answer.headers["Access-Control-Allow-Headers"].split(", "))
    assert {"Authorization", "Content-Type", "X-Request-ID"} <= allowed
    assert 600 <= int(answer.headers["Access-Control-Max-Age"]) <= 86400


def test_page_of_a_listed_origin_gets_predictions(shared: Service) -> None:
    answer = post(shared, APP)

    assert answer.json()["predictions"][0]["label"] == "3"
    assert_shared(answer, APP)
    assert "total;dur=" in answer.headers["Server-Timing"]


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/stats", "/openapi.json", "/v2", "/v2/models/digits"])
def test_page_may_read_health_and_metadata(shared: Service, path: str) -> None:
    answer = requests.get(shared.url + path, headers={"Origin": APP}, timeout=10)

    assert answer.status_code == 200
    assert_shared(answer, APP)
    assert "GET" in preflight(shared.url + path, APP, "GET").headers["Access-Control-Allow-Methods"]


def test_page_may_read_errors(shared: Service) -> None:
    refused = [post(shared, APP, b"no image"), post(shared, APP, key="x")]
    for _ in range(21):
        answer = post(shared, APP, b"", OTHER_KEY)
    elsewhere = [requests.get(shared.url + path, headers={"Origin": APP}, timeout=10)
                 for path in ("/nowhere", "/predict", "/v2/nowhere")]  # fmt: skip

    assert [each.status_code for each in (*refused, answer, *elsewhere)] == [400, 401, 429, 404, 405, 404]
    for each in (*refused, answer, *elsewhere):
        assert_shared(each, APP)
    assert int(answer.headers["Retry-After"]) > 0


def test_page_may_read_apaches_errors(shared: Service) -> None:
    too_large, nonsense = send_headers(shared, LOCAL, "999999999"), send_headers(shared, LOCAL, "many")

    assert_error(too_large, 413, "too_large")
    assert_error(nonsense, 400, "bad_request")
    assert_shared(too_large, LOCAL)
    assert_shared(nonsense, LOCAL)


OTHER_ORIGINS = [OTHER, "null", f"{APP}:8443", f"{APP}.evil.example", "http://app.example", f"{APP},{LOCAL}",
                 f"{APP} x", "*", "https://*", ""]  # fmt: skip


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_other_origins_get_no_cors_headers(shared: Service, origin: str) -> None:
    by_apache = send_headers(shared, origin, "999999999")
    answers = [preflight(f"{shared.url}/predict", origin), post(shared, origin, key="x"), by_apache]

    assert [access_headers(answer) for answer in answers] == [[], [], []]
    # Otherwise a cache could give one origin the response meant for another.
    assert "Origin" in answers[1].headers["Vary"]


def test_request_without_origin_gets_no_cors_headers(shared: Service) -> None:
    answer = shared.post(THREE, headers={"Authorization": f"Bearer {KEY}"})

    assert answer.status_code == 200
    assert access_headers(answer) == []


def test_metrics_have_no_cors_headers(shared: Service) -> None:
    answers = [requests.get(f"{shared.url}/metrics", headers={"Origin": APP}, timeout=10),
               preflight(f"{shared.url}/metrics", APP, "GET")]  # fmt: skip

    assert [access_headers(answer) for answer in answers] == [[], []]


def test_preflight_is_not_counted_as_a_request(shared: Service) -> None:
    before = requests.get(f"{shared.url}/stats", timeout=10).json()

    preflight(f"{shared.url}/predict", APP)

    after = requests.get(f"{shared.url}/stats", timeout=10).json()
    assert (after["requests"], after["latency"]["count"]) == (before["requests"], before["latency"]["count"])


def test_star_allows_every_origin() -> None:
    code = f"""
import run_web_server
client = run_web_server.create_app().test_client()
for origin in ("{APP}", "null"):
    for answer in (client.get("/livez", headers={{"Origin": origin}}), client.get("/livez")):
        print(answer.headers["Access-Control-Allow-Origin"], answer.headers.get("Vary"))
"""
    environment = os.environ | {"CORS_ORIGINS": "*"}

    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, timeout=60)

    assert printed == "* None\n" * 4


def test_cors_is_off_by_default(service: Service) -> None:
    answers = [preflight(f"{service.url}/predict", APP), post(service, APP), send_headers(service, APP, "999999999")]

    assert [answer.status_code for answer in answers] == [200, 200, 413]
    assert [access_headers(answer) for answer in answers] == [[], [], []]
    assert "Vary" not in answers[1].headers
