"""Replacing a model server by one with another model, under load."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import run_model_server, run_service, wait_until
from own_model import LABELS, LEARN_LIMIT, photos, save_model
from redis import Redis

Record = Callable[[str, object], None]


@pytest.mark.slow("replaces a model under load")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_replacing_the_model_under_load_loses_no_request(
    redis: Redis, tmp_path: Path, end: signal.Signals, record_property: Record
) -> None:
    path = save_model(tmp_path / "gray.keras", facts={"labels": LABELS})
    images, answers, over = photos(16), [], threading.Event()

    def keep_asking(image: bytes) -> None:
        while not over.is_set():
            answers.append((time.monotonic(), service.post(image)))

    with run_service(tmp_path) as service, ThreadPoolExecutor(len(images)) as pool:
        clients = [pool.submit(keep_asking, image) for image in images]
        try:
            wait_until(lambda: len(answers) > 100, "the first model answers")
            service.servers[0].stop(end)
            gone = time.monotonic()
            with run_model_server(tmp_path / "gray", MODEL=str(path), IMAGE_QUEUE=service.queue) as server:
                wait_until(lambda: sum(at > gone + LEARN_LIMIT for at, _ in answers) > 300, "the second answers", 60)
                over.set()
                for client in clients:
                    client.result(60)
        finally:
            over.set()

    assert Counter(answer.status_code for _, answer in answers) == {200: len(answers)}
    labels = Counter(answer.json()["predictions"][0]["label"] for _, answer in answers)
    before, after = sum(labels[digit] for digit in "0123456789"), sum(labels[label] for label in LABELS)
    assert before > 100
    assert after > 300
    assert before + after == len(answers)
    assert "ERROR" not in server.log
    record_property("figures", f"{before} answers by the first model and {after} by the second, 0 lost")
