"""A real Apache behind proxies: the client's address, idle connections, and the health check of its container."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
from harness import ROOT, Missing, connect, free_port, run_apache, wait_until
from redis import Redis

IMAGE = (ROOT / "models/digits/three.png").read_bytes()
SHAPE: dict[str, Any] = {"IMAGE_WIDTH": "32", "IMAGE_HEIGHT": "32", "IMAGE_CHANS": "3"}


def post_nothing(url: str, forwarded: str) -> int:
    """The status of a request that RATE_LIMIT counts: 429 if it is used up, otherwise 400."""
    return requests.post(f"{url}/predict", headers={"X-Forwarded-For": forwarded}, timeout=60).status_code


def test_each_client_of_a_trusted_proxy_has_its_own_rate_limit(redis: Redis) -> None:
    queue = f"queue-{free_port()}"
    with run_apache(RATE_LIMIT="2/hour", IMAGE_QUEUE=queue, TRUSTED_PROXIES="192.0.2.7,127.0.0.0/8") as url:
        first = [post_nothing(url, "198.51.100.1") for _ in range(3)]
        second = [post_nothing(url, "198.51.100.2") for _ in range(3)]
        forged = [post_nothing(url, f"203.0.113.{i}, 198.51.100.3") for i in range(3)]  # the proxy adds the last one

    assert first == second == forged == [400, 400, 429]
    assert len(list(redis.scan_iter(f"{queue}:limit:*198.51.100.*"))) == 3


def test_addresses_from_other_proxies_are_ignored(redis: Redis) -> None:
    with run_apache(RATE_LIMIT="2/hour", IMAGE_QUEUE=f"queue-{free_port()}", TRUSTED_PROXIES="192.0.2.7") as url:
        assert [post_nothing(url, f"198.51.100.{i}") for i in range(3)] == [400, 400, 429]


def closed_after(url: str) -> float:
    """Seconds after which Apache closes an idle connection."""
    with connect(url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        begun = time.monotonic()
        while connection.recv(65536):
            begun = time.monotonic()
        return time.monotonic() - begun


def test_idle_connections_stay_open_for_keepalive_timeout() -> None:
    with run_apache(APACHE_DEFINES="WEB_PROCESSES=2 WEB_THREADS=320 KEEPALIVE_TIMEOUT=2") as url:
        assert 1.5 < closed_after(url) < 5
    assert "Define KEEPALIVE_TIMEOUT 75" in (ROOT / "deploy/apache/000-default.conf").read_text()


# The health check of the container


def health_error(port: str, **environment: str) -> str:
    """Return what deploy/container_health.py says about the web at `port`; empty if it is healthy."""
    done = subprocess.run(
        [sys.executable, "deploy/container_health.py", "web"],
        cwd=ROOT, env=os.environ | {"APP_PORT": port} | environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


@pytest.mark.slow("waits for the deadline of requests")
def test_busy_web_is_healthy(redis: Redis) -> None:
    """With all threads waiting for a model server, /livez is answered only when a request ends."""
    queue = f"queue-{free_port()}"
    limit: dict[str, Any] = {"REQUEST_TIMEOUT": "7"}
    site: dict[str, Any] = {"IMAGE_QUEUE": queue, "APACHE_DEFINES": "WEB_PROCESSES=1 WEB_THREADS=1"}
    with run_apache(**site, **SHAPE, **limit) as url, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests.post, f"{url}/predict", data=IMAGE, timeout=60)
        wait_until(lambda: redis.llen(queue) == 1, "the image is in the queue")
        begun = time.monotonic()
        error = health_error(url.rpartition(":")[2], **limit)
        seconds = time.monotonic() - begun

    assert error == ""
    assert seconds > 4
    assert waiting.result().status_code in (503, 504)  # only because there is no model server


@contextmanager
def stand_in(status: int, body: bytes) -> Iterator[str]:
    """Serve one answer to every request; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield str(server.server_port)
    finally:
        server.shutdown()
        server.server_close()


OURS = b'{"success": false, "error": {"code": "unavailable", "message": "Overloaded."}}'


@pytest.mark.parametrize(("status", "body", "healthy"), [(200, b"{}", True), (503, OURS, True), (504, OURS, True),
                                                         (500, OURS, False), (503, b"<html>", False)])  # fmt: skip
def test_errors_of_apache_count_as_life(status: int, body: bytes, healthy: bool) -> None:
    with stand_in(status, body) as port:
        assert bool(health_error(port)) != healthy


def test_web_that_never_answers_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "deploy")
    import container_health  # noqa: PLC0415 - a program, not a module

    monkeypatch.setattr(container_health, "GRACE", 0.5)
    monkeypatch.setenv("REQUEST_TIMEOUT", "0.5")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("APP_PORT", str(silent.getsockname()[1]))
        with pytest.raises(TimeoutError):
            container_health.web_lives()


def test_user_of_the_container_makes_run_dir() -> None:
    """An emptyDir of Kubernetes belongs to root, so Apache's user makes a folder of its own in it."""
    private = [str(ROOT / "deploy/apache/run-private")]
    become = ["setpriv", "--reuid=www-data", "--regid=www-data", "--clear-groups"]
    if os.getuid() or subprocess.run([*become, "test", "-r", str(ROOT / "settings.py")], check=False).returncode:
        raise Missing("this needs root, and a clone that www-data can read")
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o2777)
        log = Path(folder, "log")
        log.touch(0o666)
        log.chmod(0o666)
        with run_apache(command=[*become, *private], RUN_DIR=f"{folder}/web", log=log) as url:
            assert requests.get(f"{url}/livez", timeout=10).ok
