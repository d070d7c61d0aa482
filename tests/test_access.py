"""API keys, TLS and security headers."""

import hmac
import io
import re
import ssl

import flask
import pytest
import requests
from access_fixtures import NEW_KEY, OLD_KEY, PNG, Guarded, answer_of, bearer, raw
from harness import assert_error, connect

from run_web_server import create_app
from web import access

pytest_plugins = ["access_fixtures"]

# Keys


@pytest.mark.parametrize("authorization", [f"Bearer {OLD_KEY}", f"Bearer {NEW_KEY}", f"bearer  {NEW_KEY}"])
def test_each_of_two_keys_is_accepted(guarded: Guarded, authorization: str) -> None:
    assert guarded.service.post(PNG, headers={"Authorization": authorization}).status_code == 200


BAD_KEYS = {
    "no header": b"",
    "no key": b"Authorization: Bearer\r\n",
    "empty": b"Authorization: Bearer \r\n",
    "another key": b"Authorization: Bearer the-key-of-2025-was-this\r\n",
    "half a key": f"Authorization: Bearer {OLD_KEY[:-1]}\r\n".encode(),
    "a key and more": f"Authorization: Bearer {OLD_KEY}x\r\n".encode(),
    "both keys": f"Authorization: Bearer {OLD_KEY},{NEW_KEY}\r\n".encode(),
    "no scheme": f"Authorization: {OLD_KEY}\r\n".encode(),
    "another scheme": f"Authorization: Basic {OLD_KEY}\r\n".encode(),
    "two headers": f"Authorization: Bearer {OLD_KEY}\r\n".encode() * 2,
    "bytes beyond ASCII": b"Authorization: Bearer \xff\xfe\xc3\xbc\xe2\x82\xac\r\n",
    "control characters": b"Authorization: Bearer \x01\x02\r\n",
    "a key of 7 kB": b"Authorization: Bearer " + b"k" * 7000 + b"\r\n",
    "a cookie": f"Cookie: key={OLD_KEY}\r\n".encode(),
}


@pytest.mark.parametrize("header", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_request_without_a_valid_key_gets_json_401(guarded: Guarded, header: bytes) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"Content-Length: 0\r\n\r\n"

    answer = raw(guarded.url, request)

    # Apache itself rejects control characters as invalid HTTP.
    status, code = (b"400", b"bad_request") if b"\x01" in header else (b"401", b"unauthorized")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b'"code": "%s"' % code in answer.replace(b'":"', b'": "')
    assert b"content-type: application/json" in answer.lower()
    assert (b"www-authenticate: bearer\r\n" in answer.lower()) == (status == b"401")


def test_missing_key_has_the_usual_error_format(guarded: Guarded) -> None:
    assert_error(guarded.service.post(PNG), 401, "unauthorized")
    assert_error(requests.get(f"{guarded.url}/predict", timeout=10), 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz"])
def test_health_needs_no_key(guarded: Guarded, path: str) -> None:
    assert requests.get(guarded.url + path, timeout=10).status_code == 200


def test_large_upload_without_a_key_is_401(guarded: Guarded) -> None:
    """Apache forwards a body that the app never reads, which must not cause a broken pipe."""
    for _ in range(5):
        assert_error(guarded.service.post(b"x" * 10_000_000), 401, "unauthorized")


class Unreadable(io.RawIOBase):
    """An upload that raises an error if it is read."""

    def readinto(self, _buffer: object, /) -> int:
        raise AssertionError("the body was read")


def test_upload_without_a_key_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "key_hashes", [access.key_hash(OLD_KEY)])
    upload = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "9999", "CONTENT_TYPE": "multipart/form-data; boundary=x"}

    client = create_app().test_client()
    refused = client.post("/predict", environ_overrides=upload)
    let_in = client.post("/predict", environ_overrides=upload, headers=bearer(OLD_KEY))

    assert (refused.status_code, let_in.status_code) == (401, 500)


def test_all_keys_are_always_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """hmac compares in constant time, but only if the loop over the keys does not stop at the first match."""
    compared: list[bool] = []
    true_compare = hmac.compare_digest
    keys = [OLD_KEY, NEW_KEY, "another-key-altogether"]

    def compare(given: str, known: str) -> bool:
        compared.append(true_compare(given, known))
        return compared[-1]

    monkeypatch.setattr(access, "key_hashes", [access.key_hash(key) for key in keys])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    with flask.Flask("any").test_request_context(headers=bearer(OLD_KEY)):
        access.check_key()

    assert compared == [True, False, False]


def test_keys_are_not_logged(guarded: Guarded) -> None:
    """Covers the logs of all tests above."""
    guarded.service.post(PNG, headers=bearer(OLD_KEY))

    for log in guarded.logs.iterdir():
        assert not re.search("|".join(map(re.escape, (OLD_KEY[:-1], NEW_KEY))), log.read_text(errors="replace"))


# TLS


def test_predict_works_over_tls(guarded: Guarded) -> None:
    files = {"image": PNG}
    answer = requests.post(
        f"{guarded.tls_url}/predict",
        files=files,
        headers=bearer(OLD_KEY),
        verify=guarded.certificates["ca"],
        timeout=60,
    )

    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "3"
    assert "max-age=" in answer.headers["Strict-Transport-Security"]
    assert guarded.service.post(PNG, headers=bearer(OLD_KEY)).status_code == 200


def test_tls_site_requires_a_key_too(guarded: Guarded) -> None:
    answer = requests.post(f"{guarded.tls_url}/predict", verify=guarded.certificates["ca"], timeout=60)

    assert_error(answer, 401, "unauthorized")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_versions_are_rejected(guarded: Guarded, version: ssl.TLSVersion) -> None:
    """This client allows them, so it is the server that rejects them."""
    context = ssl.create_default_context(cafile=guarded.certificates["ca"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with connect(guarded.tls_url) as plain, pytest.raises(ssl.SSLError) as refusal:
        context.wrap_socket(plain, server_hostname="localhost")

    assert refusal.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


def test_plain_http_on_the_tls_port_gets_json_400(guarded: Guarded) -> None:
    assert_error(requests.get(guarded.tls_url.replace("https", "http"), timeout=60), 400, "bad_request")


# Headers


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", 200),
        (b"GET /readyz HTTP/1.1", 200),
        (b"POST /predict HTTP/1.1", 401),
        (b"GET /nowhere HTTP/1.1", 404),
        (b"GET /%2e%2e%2fetc HTTP/1.1", 404),  # answered by Apache itself
        (b"NONSENSE", 400),
        (b"TRACE / HTTP/1.1", 405),
    ],
)
def test_security_headers_are_set_once_without_versions(guarded: Guarded, request_line: bytes, status: int) -> None:
    got, headers = answer_of(guarded.url, request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert got == status
    wanted = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }
    assert [(name, value) for name, value in headers if name in wanted] == sorted(wanted.items(), key=headers.index)
    assert dict(headers)["server"] == "Apache"
    assert not re.search(r"powered|python|werkzeug|wsgi|\d+\.\d+\.\d+", str(headers), re.IGNORECASE)
