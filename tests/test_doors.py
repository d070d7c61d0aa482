"""Who gets in: keys, rate limits, TLS, what no URL leads to, and who the processes are."""

import base64
import hmac
import io
import json
import os
import pwd
import re
import shutil
import signal
import socket
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
from urllib.parse import quote, urlsplit

import flask
import keras
import numpy as np
import pytest
import requests
from conftest import (
    ROOT,
    Service,
    answers,
    assert_error,
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

import run_web_server
from helpers import StartupError
from run_model_server import give_up_root
from web import access

PNG = (ROOT / "models/digits/three.png").read_bytes()
OLD_KEY = "the-key-of-2026-is-this"
NEW_KEY = "the.key~of+2027/is-that=="


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def raw(url: str, request: bytes) -> bytes:
    """Send bytes that no client library would; return all that comes back until Apache closes."""
    where = urlsplit(url)
    with socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Keys


class Guarded(NamedTuple):
    """A service that wants one of two keys, with TLS beside the plain site, its certificates and its logs."""

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
def test_either_of_two_keys_opens_the_door(guarded: Guarded, authorization: str) -> None:
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
def test_whoever_has_no_key_is_refused_with_json(guarded: Guarded, header: bytes) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"Content-Length: 0\r\n\r\n"

    answer = raw(guarded.url, request)

    # Control characters are no HTTP, which Apache itself says.
    status, code = (b"400", b"bad_request") if b"\x01" in header else (b"401", b"unauthorized")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b'"code": "%s"' % code in answer.replace(b'":"', b'": "')
    assert b"content-type: application/json" in answer.lower()
    assert (b"www-authenticate: bearer\r\n" in answer.lower()) == (status == b"401")


def test_a_refusal_has_the_shape_of_every_error(guarded: Guarded) -> None:
    assert_error(guarded.service.post(PNG), 401, "unauthorized")
    assert_error(requests.get(f"{guarded.url}/predict", timeout=10), 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz"])
def test_health_needs_no_key(guarded: Guarded, path: str) -> None:
    assert requests.get(guarded.url + path, timeout=10).status_code == 200


def test_without_a_key_a_large_upload_is_refused_as_a_small_one(guarded: Guarded) -> None:
    """Apache hands on what nobody reads, which must not end in a broken pipe."""
    for _ in range(5):
        assert_error(guarded.service.post(b"x" * 10_000_000), 401, "unauthorized")


class Unreadable(io.RawIOBase):
    """An upload that nobody may touch."""

    def readinto(self, _buffer: object, /) -> int:
        raise AssertionError("the body was read")


def test_without_a_key_the_web_does_not_read_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "key_hashes", [access.key_hash(OLD_KEY)])
    upload = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "9999", "CONTENT_TYPE": "multipart/form-data; boundary=x"}

    refused = run_web_server.app.test_client().post("/predict", environ_overrides=upload)
    let_in = run_web_server.app.test_client().post("/predict", environ_overrides=upload, headers=bearer(OLD_KEY))

    assert (refused.status_code, let_in.status_code) == (401, 500)


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the comparison takes no time of its own is hmac's promise; that none is left out is ours."""
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


def test_no_log_has_a_key(guarded: Guarded) -> None:
    """After all of the tests above."""
    guarded.service.post(PNG, headers=bearer(OLD_KEY))

    for log in guarded.logs.iterdir():
        assert not re.search("|".join(map(re.escape, (OLD_KEY[:-1], NEW_KEY))), log.read_text(errors="replace"))


# Rate limits


def post_nothing(url: str, **headers: str) -> requests.Response:
    """A request that counts, and is then refused for want of an image: what passes is a 400."""
    return requests.post(f"{url}/predict", headers=headers, timeout=60)


def test_a_limit_holds_across_processes_and_machines(redis: Redis) -> None:
    """Two Apaches of two processes each count together, and believe nobody's word for an address."""
    queue, before = f"queue-{free_port()}", set(redis.scan_iter("*:limit:*"))  # those of other tests, which expire
    with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        apaches = [run_apache(RATE_LIMIT="1000/day;20/hour", IMAGE_QUEUE=queue) for _ in range(2)]
        urls = [stack.enter_context(apache) for apache in apaches]
        asked = [pool.submit(post_nothing, urls[i % 2], **{"X-Forwarded-For": f"192.0.2.{i}"}) for i in range(120)]
        responses = [each.result() for each in asked]
        open_doors = [requests.get(url + path, timeout=10).status_code for url in urls for path in ("/", "/livez")]

    assert Counter(response.status_code for response in responses) == {400: 20, 429: 100}
    refused = next(response for response in responses if response.status_code == 429)
    assert "20/hour" in assert_error(refused, 429, "rate_limited")
    assert 3000 < int(refused.headers["Retry-After"]) <= 3601
    assert open_doors == [200] * 4
    counters = set(redis.scan_iter("*:limit:*")) - before
    assert len(counters) == 2
    assert all(counter.startswith(f"{queue}:".encode()) and redis.ttl(counter) > 0 for counter in counters)


def test_a_limit_counts_each_key_by_itself_and_keeps_it_to_itself(redis: Redis, tmp_path: Path) -> None:
    queue, log = f"queue-{free_port()}", tmp_path / "log"
    with run_apache(RATE_LIMIT="2/hour", API_KEYS=f"{OLD_KEY},{NEW_KEY}", IMAGE_QUEUE=queue, log=log) as url:
        keyless = [post_nothing(url).status_code for _ in range(4)]
        old = [post_nothing(url, **bearer(OLD_KEY)).status_code for _ in range(3)]
        new = [post_nothing(url, **bearer(NEW_KEY)).status_code for _ in range(3)]

    assert (keyless, old, new) == ([401] * 4, [400, 400, 429], [400, 400, 429])
    counters = [key.decode() for key in redis.scan_iter(f"{queue}*")]
    assert len(counters) == 2
    assert not any(OLD_KEY in counter or NEW_KEY in counter for counter in counters)
    assert "exceeded" not in log.read_text()  # a line for each refusal would let strangers fill the disk


def test_a_used_up_limit_says_when_it_ends_and_then_lets_in_again(redis: Redis) -> None:
    with run_apache(RATE_LIMIT="1/2seconds", IMAGE_QUEUE=f"queue-{free_port()}") as url:
        assert post_nothing(url).status_code == 400
        refused = post_nothing(url)
        while refused.status_code == 400:  # this machine is slow: a new window had begun
            refused = post_nothing(url)
        assert refused.headers["Retry-After"] in {"1", "2", "3"}
        time.sleep(int(refused.headers["Retry-After"]))  # what a client is told to do

        assert post_nothing(url).status_code == 400


def test_when_redis_is_away_a_limit_lets_everybody_pass(tmp_path: Path) -> None:
    """The queue waits for its Redis, and so no request is lost by a restart of it."""
    nobody = str(free_port())
    with run_apache(RATE_LIMIT="1/hour", REDIS_PORT=nobody, REDIS_TIMEOUT="0.5", log=tmp_path / "log") as url:
        assert [post_nothing(url).status_code for _ in range(3)] == [400] * 3
        assert_error(Service(url).post(PNG), 503, "redis_down")

    log = (tmp_path / "log").read_text()
    assert "RATE_LIMIT lets everybody pass" in log
    assert "Traceback" not in log


# Redis with a user, a password and TLS

PASSWORD = "pass/word@of:redis"


class Vault(NamedTuple):
    """A Redis that lets in by TLS only, and only who has a name and a password; its certificates."""

    port: int
    certificates: dict[str, str]
    admin: Redis

    def url(self, password: str = PASSWORD, ca: str = "") -> str:
        trust = ca or self.certificates["ca"]
        return f"rediss://keras-rest-api:{quote(password, safe='')}@127.0.0.1:{self.port}/0?ssl_ca_certs={trust}"


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that Apache's user may read, as pytest's own are not when root runs it."""
    with tempfile.TemporaryDirectory(prefix="test-doors-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def vault(public: Path) -> Iterator[Vault]:
    """The user is the line of docs/operations.md, as it stands there."""
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
        yield Vault(port, files, admin)


def test_the_service_works_with_a_redis_that_wants_a_user_a_password_and_tls(vault: Vault, tmp_path: Path) -> None:
    settings = {"REDIS_URL": vault.url(), "IMAGE_QUEUE": "image_queue", "RATE_LIMIT": "100/hour"}
    with run_service(tmp_path, 1, **settings) as service:
        labels = [service.label(PNG) for _ in range(3)]
        service.servers[0].stop(signal.SIGKILL)
        with run_model_server(tmp_path / "again", **settings) as again:
            labels.append(service.label(PNG))
            again.stop()

    assert labels == ["3"] * 4
    assert vault.admin.acl_log() == []
    assert not any("Traceback" in log.read_text() for log in tmp_path.iterdir())


def test_the_user_of_the_readme_may_do_nothing_else(vault: Vault) -> None:
    with Redis.from_url(vault.url(), protocol=2) as client:
        for command in (
            ["KEYS", "*"],
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["GET", "other"],
            ["EVAL", "return 1", "0"],
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


WRONG = {
    "password": "refuses the password, so check the user and the password in REDIS_URL",
    "certificate": "shows a certificate that we do not trust, so check ssl_ca_certs",
    "rights": "does not give this user the rights it needs, so set those in docs/operations.md",
}


def weak_user(vault: Vault) -> str:
    """The URL of a user that may ask what Redis is, and nothing else."""
    vault.admin.acl_setuser(
        "weak", enabled=True, reset=True, passwords="+the-wrong-one", keys=["image_queue*"], commands=["+ping", "+info"]
    )
    return vault.url("the-wrong-one").replace("keras-rest-api", "weak")


@pytest.mark.slow("starts both programs for each case")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_redis_that_can_not_be_used_is_told_in_one_line_without_the_password(
    vault: Vault, public: Path, tmp_path: Path, wrong: str
) -> None:
    other = make_certificates(public, "other")["ca"]
    urls = {"password": vault.url("the-wrong-one"), "certificate": vault.url(ca=other), "rights": weak_user(vault)}
    url = urls[wrong]
    logs = [tmp_path / "server.log", tmp_path / "apache.log"]
    with (
        running([sys.executable, "run_model_server.py"], logs[0], REDIS_URL=url) as server,
        run_apache(log=logs[1], REDIS_URL=url, REDIS_TIMEOUT="1") as site,
    ):
        answered = [Service(site).post(PNG), requests.get(f"{site}/readyz", timeout=10)]
        server.wait_for_log(WRONG[wrong])
        told = [log.read_text() for log in logs] + [response.text for response in answered]

    assert [response.status_code for response in answered] == [503, 503]
    assert WRONG[wrong] in told[1]
    assert WRONG[wrong] in answered[1].json()["error"]["message"]
    for text in told:
        assert "Traceback" not in text
        assert not any(secret in text for secret in (PASSWORD, quote(PASSWORD, safe=""), "the-wrong-one"))


# TLS


def test_a_prediction_comes_over_tls_too(guarded: Guarded) -> None:
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


def test_tls_refuses_the_keyless_as_the_plain_site_does(guarded: Guarded) -> None:
    answer = requests.post(f"{guarded.tls_url}/predict", verify=guarded.certificates["ca"], timeout=60)

    assert_error(answer, 401, "unauthorized")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_of_tls_are_refused(guarded: Guarded, version: ssl.TLSVersion) -> None:
    """By the site: this client would speak them."""
    context = ssl.create_default_context(cafile=guarded.certificates["ca"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    where = urlsplit(guarded.tls_url)
    plain = socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=60)
    with plain, pytest.raises(ssl.SSLError) as refusal:
        context.wrap_socket(plain, server_hostname="localhost")

    assert refusal.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


def test_plain_http_on_the_port_of_tls_is_refused_with_json(guarded: Guarded) -> None:
    assert_error(requests.get(guarded.tls_url.replace("https", "http"), timeout=60), 400, "bad_request")


# Headers


def answer_of(url: str, request: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Return the status and the headers that come, each as often as it comes, names in lower case."""
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
        (b"GET /%2e%2e%2fetc HTTP/1.1", 404),  # Apache's own
        (b"NONSENSE", 400),
        (b"TRACE / HTTP/1.1", 405),
    ],
)
def test_every_answer_has_the_security_headers_once_and_no_version(
    guarded: Guarded, request_line: bytes, status: int
) -> None:
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


# The source tree

SPELLINGS = [
    "/{}", "//{}", "/./{}", "/a/../{}", "/%2e/{}", "/a/%2e%2e/{}", "/..%2f{}", "/%2e%2e%2f{}", "/a%2f..%2f{}",
    "/..%5c{}", "/..\\{}", "/%c0%ae%c0%ae/{}", "/%252e%252e/{}", "/..%252f{}", "/.%00./{}", "/../{}", "/../../{}",
    "/static/{}", "/static/../{}", "/static/%2e%2e/{}", "/images/{}", "/images/../{}", "/cgi-bin/../{}", "/~root/{}",
    "/{}/", "/{}.", "/{}%20", "/{}~", "/{}%00", "/{}%00.png", "/{}.bak", "/{}::$DATA", "/{};x", "/{}?x", "/{}/x",
]  # fmt: skip


def targets() -> list[tuple[str, list[str]]]:
    """Every file of the project, and what must never be seen, each with the addresses that it might be at."""
    tracked = subprocess.check_output([need("git"), "-c", "safe.directory=*", "ls-files"], cwd=ROOT, text=True).split()
    hidden = [".env", ".git", ".git/config", ".git/HEAD", ".venv/pyvenv.cfg", ".ruff_cache/CACHEDIR.TAG", "bin"]
    absolute = [f"{each}{ROOT}/{{}}" for each in ("", "/", "/..", "/file:", "/static/")]
    return [(name, [spelling.format(name) for spelling in [*SPELLINGS, *absolute]]) for name in [*tracked, *hidden]]


def distinctive(name: str) -> bytes:
    """The longest line of a file, which no other answer has by chance."""
    path = ROOT / name
    longest = max(path.read_bytes().splitlines(), key=len) if path.is_file() else b""
    return longest if len(longest) > 12 else b"no such line"


def test_no_url_leads_to_a_file_of_the_project(guarded: Guarded) -> None:
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
def test_no_other_method_does_anything(guarded: Guarded, method: str, path: str) -> None:
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()

    answer = raw(guarded.url, request)

    assert int(answer.split()[1]) in {400, 403, 404, 405, 501}
    assert b'"success"' in answer


@pytest.mark.parametrize("path", ["/", "/predict", "*"])
def test_options_says_no_more_than_which_methods_there_are(guarded: Guarded, path: str) -> None:
    request = f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()

    status, headers = answer_of(guarded.url, request)

    assert status in {200, 400, 404}
    assert set(dict(headers).get("allow", "").split(", ")) <= {"", "GET", "HEAD", "POST", "OPTIONS"}


# Who the processes are


def save_model(path: Path) -> None:
    """Save a model that a NaN goes through, and breaks."""
    pixels = keras.Input((224, 224, 3))
    layers = keras.layers.Dense(5, activation="softmax")(keras.layers.GlobalAveragePooling2D()(pixels))
    keras.Model(pixels, layers).save(path)
    path.with_suffix(".labels.txt").write_text("a\nb\nc\nd\ne\n")


def job(name: str, image: object) -> str:
    return json.dumps({"id": name, "image": image, "deadline": time.time() + 60})


@pytest.mark.slow("copies Python and all its packages")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_a_model_server_that_root_starts_gives_root_up_and_needs_nothing_of_it_any_more(tmp_path: Path) -> None:
    """From a folder that nobody else can enter, Python itself in it: whatever is imported or read late fails."""
    port, queue = free_port(), f"queue-{free_port()}"
    python, app, authority = tmp_path / "hidden/python", tmp_path / "hidden/app", make_certificates(tmp_path)
    for folder in (python / "bin", python / "lib", app):
        folder.mkdir(parents=True)
    (tmp_path / "hidden").chmod(0o700)
    # Python finds its library beside itself, so through a folder that root alone may enter.
    shutil.copy(Path(sys.executable).resolve(), python / "bin/python")
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    (python / "lib" / library.name).symlink_to(library)
    (python / "packages").symlink_to(packages)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, app)
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

    grey, broken = (
        np.full((224, 224, 3), 99, np.float32).tobytes(),
        np.full((224, 224, 3), np.nan, np.float32).tobytes(),
    )
    with running(command, tmp_path / "log", **settings) as server:
        with run_redis(tmp_path / "redis", port, *secured):
            server.wait_for_log("* Model loaded")
            threads = [(each / "status").read_text() for each in Path(f"/proc/{server.popen.pid}/task").iterdir()]
            assert len(answer("good", grey)["predictions"]) == 5
            assert answer("broken", broken)["error"]["code"] == "model_failed"
            assert answer("short", b"short")["error"]["code"] == "model_failed"
        server.wait_for_log("does not answer")
        with run_redis(tmp_path / "redis", port, *secured):
            wait_until(lambda: answers(client), "Redis answers again")
            assert len(answer("later", grey)["predictions"]) == 5
            assert server.stop() == 0

    user = pwd.getpwnam("www-data")
    for status in threads:
        fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status, re.MULTILINE))
        assert fields["Uid"].split() == [str(user.pw_uid)] * 4
        assert fields["Gid"].split() == [str(user.pw_gid)] * 4
        assert fields["Groups"].strip() == ""
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert any("NoNewPrivs:\t1" in status for status in threads)  # the main thread's, and what it starts
    assert "Root has become www-data" in server.log
    assert "ArithmeticError" in server.log  # the traceback of the broken image
    assert not re.search(r"ImportError|ModuleNotFound|LookupError|PermissionError|Permission denied", server.log)


def test_root_that_can_not_give_itself_up_is_refused_and_others_have_nothing_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_permitted(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "setgroups", not_permitted)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(StartupError, match="start the model server as another user"):
        give_up_root()

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    give_up_root()


@pytest.mark.tools
def test_the_systemd_unit_is_hardened_and_says_nothing_that_systemd_does_not_know() -> None:
    """Without a systemd that runs: the figure goes from 0, as safe as can be, to 10; 8.5 is an ordinary unit's."""
    analyse, unit = need("systemd-analyze"), str(ROOT / "deploy/systemd/model-server@.service")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([analyse, *arguments, unit], capture_output=True, text=True, timeout=60, check=False)

    judged = run("security", "--offline=true", "--threshold=15", "--no-pager")
    verified = run("verify")

    assert judged.returncode == 0, judged.stdout
    assert "exposure level" in judged.stdout
    # That the service is not installed here is all there is to say.
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


@pytest.mark.parametrize(("script", "code", "said"), AUDITS.values(), ids=AUDITS.keys())
def test_the_audit_says_in_one_line_how_it_ended(tmp_path: Path, script: str, code: int, said: str) -> None:
    """With a stand-in for pip-audit, since what is known differs from day to day, and takes a network."""
    [version] = re.findall(r"pip-audit==(\S+)", (ROOT / "bin/audit").read_text())
    stand_in = tmp_path / "bin/pip-audit"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo pip-audit {version} && exit\n{script}\n')
    stand_in.chmod(0o755)

    ended = subprocess.run(
        [str(ROOT / "bin/audit")],
        env={**os.environ, "AUDIT_VENV": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == code
    line = (ended.stderr if code else ended.stdout).splitlines()
    assert len(line) == 1
    assert said in line[0]
