"""A service with API keys and TLS, for tests that name this module in pytest_plugins, and helpers for raw HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, Service, connect, free_port, make_certificates, run_service

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


def answer_of(url: str, request: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Return the status and all headers, repeated ones included, with names in lower case."""
    head = raw(url, request).split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in head[1:]]
    return int(head[0].split()[1]), [(name.lower(), value) for name, value in pairs]
