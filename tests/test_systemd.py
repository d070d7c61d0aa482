"""What the model server tells systemd, with a socket of the test's own in systemd's place."""

import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import requests
from conftest import Service, free_port, run_apache, run_redis, running, wait_until
from redis import Redis
from test_model_server import MeanClassifier, push

from image_queue import ServerQueue
from model_server.classifier import Classifier
from model_server.loop import ModelServer, notify_systemd

LONG = 2.0  # seconds without a word that count as silence: idle there are four in each


class Systemd:
    """What was said to an abstract socket, in its order; read at once, since a full one would hold up who speaks."""

    def __init__(self) -> None:
        self.address = f"@keras-rest-api-test-{time.monotonic_ns()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address.replace("@", "\0"))
        self.said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while message := self.socket.recv(1000):
            self.said.put(message.decode())

    def hear(self, seconds: float = LONG) -> str:
        """The next message; nothing when none comes."""
        try:
            return self.said.get(timeout=seconds)
        except queue.Empty:
            return ""

    def heard_all(self) -> list[str]:
        """What has been said and not been heard yet."""
        return [self.said.get() for _ in range(self.said.qsize())]


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    listener = Systemd()
    monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
    yield listener
    notify_systemd("")  # which ends the listening


def serves(redis: Redis, name: str) -> bool:
    return bool(list(redis.scan_iter(f"{name}:server:*")))


def test_ready_comes_when_it_serves_and_a_beat_until_it_hangs_or_stops(
    systemd: Systemd, redis: Redis, tmp_path: Path
) -> None:
    name = f"queue-{free_port()}"
    command = [sys.executable, "run_model_server.py"]
    with running(command, tmp_path / "log", IMAGE_QUEUE=name) as process, run_apache(IMAGE_QUEUE=name) as url:
        said = [systemd.hear(120)]
        while said[-1] not in ("READY=1", ""):
            assert "* Model loaded" in process.log
            said.append(systemd.hear())
        assert said[-1] == "READY=1"
        assert serves(redis, name)

        assert [systemd.hear() for _ in range(6)] == 6 * ["WATCHDOG=1"]  # idle

        systemd.heard_all()
        service = Service(url, name)
        busy = [service.label(Path("models/digits/three.png").read_bytes()) for _ in range(20)]
        assert busy == 20 * ["3"]
        assert systemd.heard_all().count("WATCHDOG=1") >= 20

        process.send(signal.SIGSTOP)
        systemd.heard_all()
        assert systemd.hear() == ""
        process.send(signal.SIGCONT)
        assert systemd.hear() == "WATCHDOG=1"

        assert process.stop(signal.SIGTERM) == 0
        wait_until(lambda: "STOPPING=1" in systemd.heard_all(), "the end is told")
        assert requests.get(f"{url}/readyz", timeout=10).status_code == 503


def test_a_batch_that_never_ends_silences_the_beat(systemd: Systemd, redis: Redis) -> None:
    """As on a GPU that hangs: the process lives, and its other threads too."""
    classifier, go_on = MeanClassifier(), threading.Event()
    classifier.before = lambda images: go_on.wait(60)
    server = ModelServer(cast(Classifier, classifier), ServerQueue({"model": "mean", "weights": "none"}, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    push(redis, *range(20, 120))
    thread.start()
    try:
        wait_until(lambda: len(classifier.sizes) == 2, "two batches are being computed")
        wait_until(lambda: not systemd.hear(), "nothing more is said")
        assert systemd.hear() == ""
    finally:
        go_on.set()
    assert systemd.hear() == "WATCHDOG=1"
    server.stop(signal.SIGTERM, None)
    thread.join(20)


def test_a_wait_for_redis_is_no_hang(systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else systemd would start again what can't but wait, for as long as Redis is away."""
    port = free_port()
    monkeypatch.setattr("settings.REDIS_PORT", port)
    server = ModelServer(cast(Classifier, MeanClassifier()), ServerQueue({"model": "mean", "weights": "none"}, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    waiting = [systemd.hear(10) for _ in range(4)]
    with run_redis(tmp_path / "log", port):
        wait_until(lambda: systemd.hear(10) == "READY=1", "it has joined")
        server.stop(signal.SIGTERM, None)
        thread.join(20)

    assert waiting == 4 * ["WATCHDOG=1"]


@pytest.mark.parametrize("address", ["", "rubbish", "/nowhere/at/all", "@nobody-listens"])
def test_where_nobody_listens_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    notify_systemd("READY=1")


def test_a_socket_in_a_file_is_reached_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)

        notify_systemd("READY=1")

        assert listener.recv(100) == b"READY=1"
