"""What the model server reports to systemd. A socket of the test stands in for systemd."""

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
from fake_systemd import Systemd
from harness import Service, free_port, run_apache, run_redis, running, wait_until
from redis import Redis
from stand_in_model import MEAN, MeanClassifier, push

from image_queue import ServerQueue
from model_server.classifier import Classifier
from model_server.loop import WATCHDOG_EVERY, ModelServer
from model_server.systemd import notify_systemd


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    listener = Systemd()
    monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
    yield listener
    notify_systemd("")  # ends the thread


def serves(redis: Redis, name: str) -> bool:
    return bool(list(redis.scan_iter(f"{name}:server:*")))


@pytest.mark.slow("waits for several heartbeats")
def test_ready_is_reported_then_a_beat_until_it_hangs_or_stops(systemd: Systemd, redis: Redis, tmp_path: Path) -> None:
    name = f"queue-{free_port()}"
    command = [sys.executable, "run_model_server.py"]
    with running(command, tmp_path / "log", IMAGE_QUEUE=name) as process, run_apache(IMAGE_QUEUE=name) as url:
        messages = [systemd.hear(120)]
        while messages[-1] not in ("READY=1", ""):
            assert "* Model loaded" in process.log
            messages.append(systemd.hear())
        assert messages[-1] == "READY=1"
        assert serves(redis, name)

        assert [systemd.hear() for _ in range(6)] == 6 * ["WATCHDOG=1"]  # idle

        systemd.hear_all()
        service = Service(url, name)
        begun, three = time.monotonic(), Path("models/digits/three.png").read_bytes()
        wait_until(lambda: service.label(three) == "3" and time.monotonic() > begun + 2, "it was busy for 2 seconds")
        assert 3 <= systemd.hear_all().count("WATCHDOG=1") <= (time.monotonic() - begun) / WATCHDOG_EVERY + 1

        process.send(signal.SIGSTOP)
        systemd.hear_all()
        assert systemd.hear() == ""
        process.send(signal.SIGCONT)
        assert systemd.hear() == "WATCHDOG=1"

        assert process.stop(signal.SIGTERM) == 0
        wait_until(lambda: "STOPPING=1" in systemd.hear_all(), "it reports its end")
        assert requests.get(f"{url}/readyz", timeout=10).status_code == 503


def test_batch_that_never_ends_stops_the_beat(systemd: Systemd, redis: Redis) -> None:
    """For example when a GPU hangs: the process and its other threads keep running."""
    classifier, go_on = MeanClassifier(), threading.Event()
    classifier.before = lambda images: go_on.wait(60)
    server = ModelServer(cast(Classifier, classifier), ServerQueue(MEAN, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    push(redis, *range(20, 120))
    thread.start()
    try:
        wait_until(lambda: len(classifier.sizes) == 2, "two batches are being computed")
        wait_until(lambda: not systemd.hear(), "no more messages come")
        assert systemd.hear() == ""
    finally:
        go_on.set()
    assert systemd.hear() == "WATCHDOG=1"
    server.stop(signal.SIGTERM, None)
    thread.join(20)


def test_beat_goes_on_while_redis_is_away(systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise systemd would restart the model server again and again while Redis is away."""
    port = free_port()
    monkeypatch.setattr("settings.REDIS_PORT", port)
    server = ModelServer(cast(Classifier, MeanClassifier()), ServerQueue(MEAN, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    waiting = [systemd.hear(10) for _ in range(4)]
    with run_redis(tmp_path / "log", port):
        wait_until(lambda: systemd.hear(10) == "READY=1", "it has joined")
        server.stop(signal.SIGTERM, None)
        thread.join(20)

    assert waiting == 4 * ["WATCHDOG=1"]


@pytest.mark.parametrize("address", ["", "rubbish", "/nowhere/at/all", "@nobody-listens"])
def test_invalid_notify_socket_is_ignored(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    notify_systemd("READY=1")


def test_notify_socket_may_be_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)

        notify_systemd("READY=1")

        assert listener.recv(100) == b"READY=1"
