"""Fixtures of the clients' tests, which load this module through pytest_plugins."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_service import IMAGE, Behavior, FakeService, Serve


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a fake service with a behavior; all are stopped afterwards."""
    services: list[FakeService] = []

    def start(behavior: Behavior) -> FakeService:
        services.append(FakeService(behavior))
        threading.Thread(target=services[-1].serve_forever, args=(0.01,), daemon=True).start()
        return services[-1]

    yield start
    for service in services:
        service.closing.set()
        service.shutdown()
        service.server_close()


@pytest.fixture
def unused_url() -> Iterator[str]:
    """A URL that refuses connections; the port stays bound, so that no other program can listen there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "some image.png"
    path.write_bytes(IMAGE)
    return path
