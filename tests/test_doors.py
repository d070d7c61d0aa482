"""Access: API keys, rate limits, Redis credentials, TLS, security headers, hidden files, privileges, known CVEs."""

import base64
import hmac
import io
import json
import os
import pwd
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import flask
import keras
import numpy as np
import pytest
import requests
from chroot import need_root
from harness import (
    ROOT,
    Service,
    answers,
    assert_error,
    connect,
    free_port,
    make_certificates,
    need,
    run_apache,
    run_model_server,
    run_redis,
    run_service,
    running,
    wait_until,
)
from redis import Redis
from redis.exceptions import NoPermissionError

from helpers import StartupError
from model_server.privileges import give_up_root
from run_web_server import create_app
from web import access

PNG = (ROOT / "models/digits/three.png").read_bytes()
OLD_KEY = "the-key-of-2026-is-this"
NEW_KEY = "the.key~of+2027/is-that=="


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def raw(url: str, request: bytes) -> bytes:
    """Send raw bytes; return everything that Apache sends until it closes the connection."""
    with connect(url) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Keys


class Guarded(NamedTuple):
    """A service with two API keys, on a plain and a TLS site; its certificates and logs."""

    service: Service
    tls_url: str
    certificates: dict[str, str]
    logs: Path

    @property
    def url(self) -> str:
        return self.service.url


@pytest.fixture(scope="module")
def guarded(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    logs, files = tmp_path_factory.mktemp("guarded"), make_certificates(tmp_path_factory.mktemp("certificates"))
    port = free_port()
    defines = f"WEB_PROCESSES=2 WEB_THREADS=320 TLS_PORT={port}"
    defines += f" TLS_CERTIFICATE={files['certificate']} TLS_KEY={files['key']}"
    with run_service(logs, API_KEYS=f"{OLD_KEY},{NEW_KEY}", APACHE_DEFINES=defines) as service:
        yield Guarded(service, f"https://127.0.0.1:{port}", files, logs)


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


# Rate limits


def post_nothing(url: str, **headers: str) -> requests.Response:
    """Send a request that counts but has no image: it gets 400 unless the limit rejects it."""
    return requests.post(f"{url}/predict", headers=headers, timeout=60)


def test_rate_limit_is_shared_by_processes_and_machines(redis: Redis) -> None:
    """Two Apaches with two processes each count together, and X-Forwarded-For is ignored."""
    queue, before = f"queue-{free_port()}", set(redis.scan_iter("*:limit:*"))  # other tests' counters
    with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        apaches = [run_apache(RATE_LIMIT="1000/day;20/hour", IMAGE_QUEUE=queue) for _ in range(2)]
        urls = [stack.enter_context(apache) for apache in apaches]
        asked = [pool.submit(post_nothing, urls[i % 2], **{"X-Forwarded-For": f"192.0.2.{i}"}) for i in range(120)]
        responses = [each.result() for each in asked]
        unlimited = [requests.get(url + path, timeout=10).status_code for url in urls for path in ("/", "/livez")]

    assert Counter(response.status_code for response in responses) == {400: 20, 429: 100}
    refused = next(response for response in responses if response.status_code == 429)
    assert "20/hour" in assert_error(refused, 429, "rate_limited")
    assert 3000 < int(refused.headers["Retry-After"]) <= 3601
    assert unlimited == [200] * 4
    counters = set(redis.scan_iter("*:limit:*")) - before
    assert len(counters) == 2
    assert all(counter.startswith(f"{queue}:".encode()) and redis.ttl(counter) > 0 for counter in counters)


def test_rate_limit_counts_each_key_without_storing_it(redis: Redis, tmp_path: Path) -> None:
    queue, log = f"queue-{free_port()}", tmp_path / "log"
    with run_apache(RATE_LIMIT="2/hour", API_KEYS=f"{OLD_KEY},{NEW_KEY}", IMAGE_QUEUE=queue, log=log) as url:
        keyless = [post_nothing(url).status_code for _ in range(4)]
        old = [post_nothing(url, **bearer(OLD_KEY)).status_code for _ in range(3)]
        new = [post_nothing(url, **bearer(NEW_KEY)).status_code for _ in range(3)]

    assert (keyless, old, new) == ([401] * 4, [400, 400, 429], [400, 400, 429])
    counters = [key.decode() for key in redis.scan_iter(f"{queue}*")]
    assert len(counters) == 2
    assert not any(OLD_KEY in counter or NEW_KEY in counter for counter in counters)
    assert "exceeded" not in log.read_text()  # a line for each rejection would let clients fill the disk


def test_rate_limited_client_may_return_after_retry_after(redis: Redis) -> None:
    with run_apache(RATE_LIMIT="1/2seconds", IMAGE_QUEUE=f"queue-{free_port()}") as url:
        assert post_nothing(url).status_code == 400
        refused = post_nothing(url)
        while refused.status_code == 400:  # on a slow machine, a new window has already begun
            refused = post_nothing(url)
        assert refused.headers["Retry-After"] in {"1", "2", "3"}
        time.sleep(int(refused.headers["Retry-After"]))

        assert post_nothing(url).status_code == 400


def test_rate_limit_is_not_enforced_without_redis(tmp_path: Path) -> None:
    """Requests wait in the web until Redis is back, so the limit must not reject them."""
    unused = str(free_port())
    with run_apache(RATE_LIMIT="1/hour", REDIS_PORT=unused, REDIS_TIMEOUT="0.5", log=tmp_path / "log") as url:
        assert [post_nothing(url).status_code for _ in range(3)] == [400] * 3
        assert_error(Service(url).post(PNG), 503, "redis_down")

    log = (tmp_path / "log").read_text()
    assert "RATE_LIMIT is not enforced" in log
    assert "Traceback" not in log


# Redis with a user, a password and TLS

PASSWORD = "pass/word@of:redis"


class SecureRedis(NamedTuple):
    """A Redis that requires TLS, a user and a password: its port, its certificates and an admin's client."""

    port: int
    certificates: dict[str, str]
    admin: Redis

    def url(self, password: str = PASSWORD, ca: str = "") -> str:
        trust = ca or self.certificates["ca"]
        return f"rediss://keras-rest-api:{quote(password, safe='')}@127.0.0.1:{self.port}/0?ssl_ca_certs={trust}"


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that Apache's user may read, unlike pytest's folders, which belong to root."""
    with tempfile.TemporaryDirectory(prefix="test-doors-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def secure_redis(public: Path) -> Iterator[SecureRedis]:
    """A Redis whose user is the one in docs/operations.md, word for word."""
    files, port = make_certificates(public), free_port()
    [line] = re.findall(r"^ *(user keras-rest-api .*)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    users = [line.replace("PASSWORD", PASSWORD), "user default off", "user admin on >admin ~* +@all"]
    (public / "redis.conf").write_text(
        f"port 0\nbind 127.0.0.1\ntls-port {port}\ntls-auth-clients no\ntls-cert-file {files['certificate']}\n"
        f'tls-key-file {files["key"]}\ntls-ca-cert-file {files["ca"]}\nsave ""\ndir {public}\n' + "\n".join(users)
    )
    admin = Redis.from_url(f"rediss://admin:admin@127.0.0.1:{port}/0?ssl_ca_certs={files['ca']}", socket_timeout=5)
    with running([need("redis-server"), str(public / "redis.conf")], public / "log") as process:
        wait_until(lambda: process.alive and answers(admin), "Redis answers")
        yield SecureRedis(port, files, admin)


def test_redis_with_user_password_and_tls_works(secure_redis: SecureRedis, tmp_path: Path) -> None:
    settings = {"REDIS_URL": secure_redis.url(), "IMAGE_QUEUE": "image_queue", "RATE_LIMIT": "100/hour"}
    with run_service(tmp_path, 1, **settings) as service:
        labels = [service.label(PNG) for _ in range(3)]
        service.servers[0].stop(signal.SIGKILL)
        with run_model_server(tmp_path / "again", **settings) as again:
            labels.append(service.label(PNG))
            again.stop()

    assert labels == ["3"] * 4
    assert secure_redis.admin.acl_log() == []
    assert not any("Traceback" in log.read_text() for log in tmp_path.iterdir())


def test_documented_redis_user_has_no_other_rights(secure_redis: SecureRedis) -> None:
    with Redis.from_url(secure_redis.url(), protocol=2) as client:
        for command in (
            ["KEYS", "*"],
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["GET", "other"],
            ["EVAL", "return 1", "0"],
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


REDIS_FAULTS = {
    "password": "rejects the password, so check the user and the password in REDIS_URL",
    "certificate": "presents an untrusted certificate, so check ssl_ca_certs",
    "rights": "does not grant this user the permissions it needs, so set those in docs/operations.md",
}


def weak_user(secure_redis: SecureRedis) -> str:
    """Create a user that may run only PING and INFO; return its URL."""
    secure_redis.admin.acl_setuser(
        "weak", enabled=True, reset=True, passwords="+the-wrong-one", keys=["image_queue*"], commands=["+ping", "+info"]
    )
    return secure_redis.url("the-wrong-one").replace("keras-rest-api", "weak")


@pytest.mark.slow("starts both programs for each case")
@pytest.mark.parametrize("fault", REDIS_FAULTS)
def test_redis_access_errors_are_logged_without_the_password(
    secure_redis: SecureRedis, public: Path, tmp_path: Path, fault: str
) -> None:
    other = make_certificates(public, "other")["ca"]
    urls = {
        "password": secure_redis.url("the-wrong-one"),
        "certificate": secure_redis.url(ca=other),
        "rights": weak_user(secure_redis),
    }
    url = urls[fault]
    logs = [tmp_path / "server.log", tmp_path / "apache.log"]
    with (
        running([sys.executable, "run_model_server.py"], logs[0], REDIS_URL=url) as server,
        run_apache(log=logs[1], REDIS_URL=url, REDIS_TIMEOUT="1") as site,
    ):
        answered = [Service(site).post(PNG), requests.get(f"{site}/readyz", timeout=10)]
        server.wait_for_log(REDIS_FAULTS[fault])
        texts = [log.read_text() for log in logs] + [response.text for response in answered]

    assert [response.status_code for response in answered] == [503, 503]
    assert REDIS_FAULTS[fault] in texts[1]
    assert REDIS_FAULTS[fault] in answered[1].json()["error"]["message"]
    for text in texts:
        assert "Traceback" not in text
        assert not any(secret in text for secret in (PASSWORD, quote(PASSWORD, safe=""), "the-wrong-one"))


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


def answer_of(url: str, request: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Return the status and all headers, repeated ones included, with names in lower case."""
    head = raw(url, request).split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in head[1:]]
    return int(head[0].split()[1]), [(name.lower(), value) for name, value in pairs]


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


# Hidden files

SPELLINGS = [
    "/{}", "//{}", "/./{}", "/a/../{}", "/%2e/{}", "/a/%2e%2e/{}", "/..%2f{}", "/%2e%2e%2f{}", "/a%2f..%2f{}",
    "/..%5c{}", "/..\\{}", "/%c0%ae%c0%ae/{}", "/%252e%252e/{}", "/..%252f{}", "/.%00./{}", "/../{}", "/../../{}",
    "/static/{}", "/static/../{}", "/static/%2e%2e/{}", "/images/{}", "/images/../{}", "/cgi-bin/../{}", "/~root/{}",
    "/{}/", "/{}.", "/{}%20", "/{}~", "/{}%00", "/{}%00.png", "/{}.bak", "/{}::$DATA", "/{};x", "/{}?x", "/{}/x",
]  # fmt: skip


def targets() -> list[tuple[str, list[str]]]:
    """Return every project file and some hidden files, each with many spellings of its path."""
    tracked = subprocess.check_output([need("git"), "-c", "safe.directory=*", "ls-files"], cwd=ROOT, text=True).split()
    hidden = [".env", ".git", ".git/config", ".git/HEAD", ".venv/pyvenv.cfg", ".ruff_cache/CACHEDIR.TAG", "bin"]
    absolute = [f"{each}{ROOT}/{{}}" for each in ("", "/", "/..", "/file:", "/static/")]
    return [(name, [spelling.format(name) for spelling in [*SPELLINGS, *absolute]]) for name in [*tracked, *hidden]]


def distinctive(name: str) -> bytes:
    """Return the longest line of a file, which identifies it in a response."""
    path = ROOT / name
    longest = max(path.read_bytes().splitlines(), key=len) if path.is_file() else b""
    return longest if len(longest) > 12 else b"no such line"


def test_no_url_serves_a_project_file(guarded: Guarded) -> None:
    def leaks(name: str, address: str) -> str:
        request = f"GET {address} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        answer = raw(guarded.url, request)
        found = answer.split()[1] == b"200" or distinctive(name) in answer
        return f"{address}: {answer[:60]!r}" if found else ""

    asked = [(name, address) for name, addresses in targets() for address in addresses]
    with ThreadPoolExecutor(8) as pool:
        found = [each for each in pool.map(lambda each: leaks(*each), asked) if each]

    assert len(asked) > 1500
    assert found == []


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "PATCH", "PROPFIND", "MKCOL", "COPY", "CONNECT", "DEBUG"])
@pytest.mark.parametrize("path", ["/", "/predict", "/settings.py", "*"])
def test_other_methods_are_rejected(guarded: Guarded, method: str, path: str) -> None:
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()

    answer = raw(guarded.url, request)

    assert int(answer.split()[1]) in {400, 403, 404, 405, 501}
    assert b'"success"' in answer


@pytest.mark.parametrize("path", ["/", "/predict", "*"])
def test_options_lists_only_the_methods(guarded: Guarded, path: str) -> None:
    request = f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()

    status, headers = answer_of(guarded.url, request)

    assert status in {200, 400, 404}
    assert set(dict(headers).get("allow", "").split(", ")) <= {"", "GET", "HEAD", "POST", "OPTIONS"}


# Privileges


def save_model(path: Path) -> None:
    """Save a model whose output is NaN if its input is NaN."""
    pixels = keras.Input((224, 224, 3))
    layers = keras.layers.Dense(5, activation="softmax")(keras.layers.GlobalAveragePooling2D()(pixels))
    keras.Model(pixels, layers).save(path)
    path.with_suffix(".labels.txt").write_text("a\nb\nc\nd\ne\n")


def job(name: str, image: object) -> str:
    return json.dumps({"id": name, "image": image, "deadline": time.time() + 60})


@pytest.mark.slow("copies Python and all its packages")
def test_model_server_started_by_root_drops_its_privileges(tmp_path: Path) -> None:
    """Code and Python are in a folder that only root may enter, so any later import or read of a file fails."""
    need_root()
    port, queue = free_port(), f"queue-{free_port()}"
    python, app, authority = tmp_path / "hidden/python", tmp_path / "hidden/app", make_certificates(tmp_path)
    for folder in (python / "bin", python / "lib", app):
        folder.mkdir(parents=True)
    (tmp_path / "hidden").chmod(0o700)
    # Python looks for its library next to its executable, which is inside the hidden folder.
    shutil.copy(Path(sys.executable).resolve(), python / "bin/python")
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    (python / "lib" / library.name).symlink_to(library)
    (python / "packages").symlink_to(packages)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, app)
    for package in ("image_queue", "model_server", "web"):
        shutil.copytree(ROOT / package, app / package)
    save_model(app / "own.keras")
    shutil.copy(authority["ca"], app / "ca.pem")
    command = ["env", "-C", str(app), str(python / "bin/python"), "run_model_server.py"]
    tls, key = free_port(), authority["key"]
    secured = ("--tls-port", str(tls), "--tls-cert-file", authority["certificate"], "--tls-key-file", key,
               "--tls-ca-cert-file", authority["ca"], "--tls-auth-clients", "no")  # fmt: skip
    settings = {
        "REDIS_URL": f"rediss://localhost:{tls}/0?ssl_ca_certs=ca.pem",
        "IMAGE_QUEUE": queue,
        "IMAGE_DTYPE": "float32",
        "MODEL": "own.keras",
        "LOG_FORMAT": "json",
        "PYTHONPATH": str(python / "packages"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    client = Redis(port=port, socket_timeout=60)

    def answer(name: str, pixels: bytes) -> dict[str, Any]:
        client.rpush(queue, job(name, base64.b64encode(pixels).decode()))
        _, text = client.blpop([f"{queue}:result:{name}"], 30) or pytest.fail(server.log)
        return dict(json.loads(text))

    gray, broken = (np.full((224, 224, 3), level, np.float32).tobytes() for level in (99, np.nan))
    with running(command, tmp_path / "log", **settings) as server:
        with run_redis(tmp_path / "redis", port, *secured):
            server.wait_for_log("* Model loaded")
            threads = [(each / "status").read_text() for each in Path(f"/proc/{server.popen.pid}/task").iterdir()]
            assert len(answer("good", gray)["predictions"]) == 5
            assert answer("broken", broken)["error"]["code"] == "model_failed"
            assert answer("short", b"short")["error"]["code"] == "model_failed"
        server.wait_for_log("does not answer")
        with run_redis(tmp_path / "redis", port, *secured):
            wait_until(lambda: answers(client), "Redis answers again")
            assert len(answer("later", gray)["predictions"]) == 5
            assert server.stop() == 0

    user = pwd.getpwnam("www-data")
    for status in threads:
        fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status, re.MULTILINE))
        assert fields["Uid"].split() == [str(user.pw_uid)] * 4
        assert fields["Gid"].split() == [str(user.pw_gid)] * 4
        assert fields["Groups"].strip() == ""
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert any("NoNewPrivs:\t1" in status for status in threads)  # for the main thread and its children
    assert "Root has become www-data" in server.log
    assert "ArithmeticError" in server.log  # the traceback of the broken image
    assert not re.search(r"ImportError|ModuleNotFound|LookupError|PermissionError|Permission denied", server.log)


def test_root_that_cannot_drop_privileges_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "setgroups", not_permitted)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(StartupError, match="start the model server as another user"):
        give_up_root()

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    give_up_root()


@pytest.mark.tools
def test_systemd_unit_is_hardened_and_valid() -> None:
    """Needs no running systemd. The exposure level ranges from 0 (safest) to 10; the threshold 15 means 1.5."""
    analyse, unit = need("systemd-analyze"), str(ROOT / "deploy/systemd/model-server@.service")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([analyse, *arguments, unit], capture_output=True, text=True, timeout=60, check=False)

    security = run("security", "--offline=true", "--threshold=15", "--no-pager")
    verified = run("verify")

    assert security.returncode == 0, security.stdout
    assert "exposure level" in security.stdout
    # The only warning may be that the service is not installed here.
    assert [line for line in verified.stderr.splitlines() if "is not executable: No such file" not in line] == []


# Known vulnerabilities

AUDITS = {
    "none": ("echo No known vulnerabilities found >&2", 0, "No known vulnerability in "),
    "some": (
        "echo Name Version; echo Found 2 known vulnerabilities in 1 package >&2; exit 1",
        1,
        "in 1 package: raise the versions",
    ),
    "offline": (
        "echo Traceback >&2; echo Failed to resolve it >&2; exit 1",
        1,
        "(Failed to resolve it): is there a network?",
    ),
    "skipped": ("echo ERROR: flask could not be audited >&2; exit 1", 1, "flask could not be audited"),
}


@pytest.mark.parametrize(("script", "code", "message"), AUDITS.values(), ids=AUDITS.keys())
def test_audit_reports_its_result_in_one_line(tmp_path: Path, script: str, code: int, message: str) -> None:
    """A stub replaces pip-audit, since real results need a network and change daily."""
    [version] = re.findall(r"pip-audit==(\S+)", (ROOT / "bin/audit").read_text())
    stub = tmp_path / "bin/pip-audit"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo pip-audit {version} && exit\n{script}\n')
    stub.chmod(0o755)

    ended = subprocess.run(
        [str(ROOT / "bin/audit")],
        env={**os.environ, "AUDIT_VENV": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == code
    line = (ended.stderr if code else ended.stdout).splitlines()
    assert len(line) == 1
    assert message in line[0]
