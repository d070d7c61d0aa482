"""A fake service for the clients' tests, and functions that run the clients as a user does.

The fake service gives answers and faults that the real service can't be made to give on demand.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

IMAGE = bytes(range(256)) * 40
PREDICTIONS = [
    {"label": "beagle", "probability": 0.9461532831},
    {"label": "bluetick", "probability": 0.03195896},
]
LIMIT = 60  # seconds that a test waits at most
BAD_ADDRESSES = [
    "",
    "nonsense",
    "localhost:8080",
    "http://",
    "ftp://localhost/",
    "http://[::1",
    "http://localhost:99999",
]


class Reply(NamedTuple):
    """An answer of the fake service.

    Content-Length counts `missing` bytes that are never sent; if `silent`, the connection then stays open.
    `retry_after` and `model` are the values of the headers Retry-After and X-Model.
    """

    status: int
    body: bytes
    missing: int = 0
    silent: bool = False
    retry_after: str = ""
    model: str = ""


def as_reply(status: int, answer: object) -> Reply:
    return Reply(status, json.dumps(answer).encode())


def error_reply(status: int, code: str, message: str = "Try again in a moment.") -> Reply:
    return as_reply(status, {"success": False, "error": {"code": code, "message": message}})


OK = as_reply(200, {"success": True, "predictions": PREDICTIONS})
HTML = Reply(200, b"<html><body>It works!</body></html>")
HANG_UP = None

Behavior = Callable[["FakeService", int], Reply | None]
Serve = Callable[[Behavior], "FakeService"]


def always(reply: Reply | None) -> Behavior:
    return lambda _service, _number: reply


def first_then_hang(answered: int) -> Behavior:
    return lambda service, number: OK if number <= answered else service.hang()


class FakeService(ThreadingHTTPServer):
    """Sends the answer that behavior(service, number) returns for each request; the first one has number 1."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, behavior: Behavior) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behavior = behavior
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []
        self.connections = self.in_flight = self.most_in_flight = 0

    def arrive(self, path: str, body: bytes, key: str | None) -> int:
        with self.changed:
            self.paths.append(path)
            self.keys.append(key)
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.changed.notify_all()
            return len(self.bodies)

    def leave(self) -> None:
        with self.changed:
            self.in_flight -= 1

    def wait_for(self, arrivals: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bodies) >= arrivals, LIMIT)

    def hang(self) -> None:
        self.closing.wait(LIMIT)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing, since some tests make clients disconnect."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        reply = self.server.behavior(self.server, self.server.arrive(self.path, body, key))
        self.server.leave()  # before the client can send its next request
        if reply is None:
            self.close_connection = True
        else:
            self.send(reply)

    def send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply.body) + reply.missing))
        if reply.retry_after:
            self.send_header("Retry-After", reply.retry_after)
        if reply.model:
            self.send_header("X-Model", reply.model)
        self.end_headers()
        self.wfile.write(reply.body)
        if reply.silent:
            self.server.hang()
        self.close_connection = reply.missing > 0

    def log_message(self, *_: object) -> None:
        pass


def environment() -> dict[str, str]:
    without_key = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    return without_key | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def run(script: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment() | variables, timeout=LIMIT, check=False,
        cwd=script.anchor,
    )  # fmt: skip


def run_with_closed_output(*command: object, errors_too: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a client whose standard output is a closed pipe, as after `| head -1`; with `errors_too`, its stderr too."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *map(str, command)], stdout=writing, stderr=writing if errors_too else subprocess.PIPE,
            text=True, env=environment(), timeout=LIMIT, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr
