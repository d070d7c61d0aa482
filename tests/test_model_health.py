"""A model server's /livez and /readyz at METRICS_PORT follow its loop, not Redis."""

import signal
import sys
import threading
from pathlib import Path
from typing import cast

import pytest
import requests
from harness import Process, free_port, run_redis, running, wait_until
from redis import Redis
from stand_in_model import MEAN, MeanClassifier, push

from image_queue import ServerQueue
from model_server.classifier import Classifier
from model_server.health import Health, health
from model_server.loop import ModelServer


def status(port: int, page: str) -> int:
    """The status of a page; 0 if nobody listens yet."""
    try:
        return requests.get(f"http://127.0.0.1:{port}{page}", timeout=5).status_code
    except requests.ConnectionError:
        return 0


def states(process: Process, port: int, page: str, until: int) -> list[int]:
    """The different statuses of a page until it has the last one."""
    seen: list[int] = []

    def reached() -> bool:
        seen.append(status(port, page))
        return seen[-1] == until or not process.alive

    wait_until(reached, f"{page} is {until}: {process.log}", 120)
    return sorted(set(seen) - {0})


@pytest.mark.slow("starts a model server, and Redis three times")
def test_losing_redis_ends_readiness_but_not_liveness(tmp_path: Path) -> None:
    port, redis_port = free_port(), free_port()
    settings = {"METRICS_PORT": str(port), "REDIS_PORT": str(redis_port)}
    with running([sys.executable, "run_model_server.py"], tmp_path / "log", **settings) as process:
        assert states(process, port, "/livez", 200) == [200, 503]  # 503 while the model loads
        assert "* Model loaded" in process.log
        assert status(port, "/readyz") == 503
        with run_redis(tmp_path / "redis", redis_port) as redis:
            states(process, port, "/readyz", 200)
            redis.stop(signal.SIGKILL)
            states(process, port, "/readyz", 503)
            assert status(port, "/livez") == 200
        with run_redis(tmp_path / "redis", redis_port):
            states(process, port, "/readyz", 200)
        assert "keras_model_server_batch_size" in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text


def test_batch_that_never_ends_ends_liveness(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example when a GPU hangs: the thread that answers /livez still runs."""
    monkeypatch.setattr(health, "limit", 0.5)
    classifier, go_on = MeanClassifier(), threading.Event()
    classifier.before = lambda images: go_on.wait(60)
    server = ModelServer(cast(Classifier, classifier), ServerQueue(MEAN, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: not health.why_not_ready(), "it has joined")
    push(redis, *range(20, 120))
    try:
        wait_until(health.why_dead, "the hang is noticed")
        assert "has not made a step" in health.why_not_ready()
    finally:
        go_on.set()
    wait_until(lambda: not health.why_not_ready(), "it works again")
    server.stop(signal.SIGTERM, None)
    thread.join(20)
    assert "No jobs are taken" in health.why_not_ready()


def test_a_slow_step_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    slow = Health()
    assert slow.why_dead() == "The model is not loaded yet."
    slow.step()
    now[0] += 59
    assert slow.why_dead() == ""
    now[0] += 2
    assert slow.why_dead() == "The loop has not made a step for 61 s."
