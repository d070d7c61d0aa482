"""Model servers die, freeze, run out of memory or get an image that breaks them: no request is lost.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    Process,
    Serve,
    Service,
    assert_error,
    free_port,
    run_apache,
    run_model_server,
    run_service,
    running,
    wait_until,
)
from load import Load, Record, ask, freeze_in_mid_batch, in_flight, known_images, name_of
from PIL import Image
from redis import Redis
from samples import saved

pytestmark = pytest.mark.fault


@contextmanager
def second_server(service: Service, log: Path) -> Iterator[Process]:
    """Run another model server on the queue of `service`."""
    with run_model_server(log, IMAGE_QUEUE=service.queue) as process:
        process.wait_for_log("* Joined the queue")
        yield process


def test_a_model_server_killed_ten_times_loses_nothing(served: Serve, record_property: Record) -> None:
    caught = []
    with Load(served.url) as load:
        for _ in range(10):
            load.wait_for(64)
            pid = served.model_server
            caught.append(freeze_in_mid_batch(pid, served.redis, served.queue))
            os.kill(pid, signal.SIGKILL)
        load.wait_for(64)

    assert load.failures == {}
    record_property("figures", f"{load.figures}, {sum(caught)} in flight when killed")


def test_when_one_of_two_model_servers_dies_the_other_takes_over(
    redis: Redis, service: Service, tmp_path: Path, record_property: Record
) -> None:
    with second_server(service, tmp_path / "second") as killed, Load(service.url) as load:
        load.wait_for(100)
        freeze_in_mid_batch(killed.popen.pid, redis, service.queue, name_of(killed))
        killed.send(signal.SIGKILL)
        died = time.monotonic()
        load.wait_for(200)

    assert load.failures == {}
    waited = [o.started + o.seconds - died for o in load.outcomes if o.started < died]
    assert max(waited) < 10
    record_property("figures", f"{load.figures}, taken over after {max(waited):.1f} s")


def test_sigterm_in_mid_batch_loses_nothing(redis: Redis, tmp_path: Path, record_property: Record) -> None:
    """The model server answers its batch and exits; the next one answers as soon as it has loaded its model."""
    with run_service(tmp_path) as service, ExitStack() as stack:
        load = stack.enter_context(Load(service.url))
        load.wait_for(100)
        first = service.servers[0]
        freeze_in_mid_batch(first.popen.pid, redis, service.queue)
        first.send(signal.SIGTERM)
        first.send(signal.SIGCONT)

        assert first.popen.wait(30) == 0
        assert in_flight(redis, service.queue) == 0
        assert redis.keys(f"{service.queue}:server:*") == []
        answered = len(load.outcomes)
        with run_model_server(tmp_path / "next", IMAGE_QUEUE=service.queue):
            loaded = time.monotonic()
            wait_until(lambda: len(load.outcomes) > answered, "the next model server answers", 2)
            took = time.monotonic() - loaded
            load.wait_for(100)
            stack.close()

    assert load.failures == {}
    record_property("figures", f"{load.figures}, the next model server answers {took:.2f} s after loading")


def test_late_answers_of_a_frozen_model_server_are_harmless(
    redis: Redis, service: Service, tmp_path: Path, record_property: Record
) -> None:
    with second_server(service, tmp_path / "second") as frozen, Load(service.url) as load:
        load.wait_for(100)
        jobs = freeze_in_mid_batch(frozen.popen.pid, redis, service.queue, name_of(frozen))
        wait_until(lambda: len(redis.keys(f"{service.queue}:server:*")) == 1, "the heartbeat has expired")
        wait_until(lambda: f"{name_of(frozen)} died:" in service.servers[0].log, "the other server requeues its jobs")
        load.wait_for(200)
        frozen.send(signal.SIGCONT)
        frozen.wait_for_log("joining again")
        batches = len(frozen.batches)
        load.wait_for(200)
        wait_until(lambda: len(frozen.batches) > batches, "it computes again")

    assert load.failures == {}
    record_property("figures", f"{load.figures}, with {jobs} jobs in the frozen one")


def test_an_image_that_breaks_the_model_fails_alone(redis: Redis, tmp_path: Path, record_property: Record) -> None:
    """The fault is real: the model's lookup table has no row for the brightness of the last image."""
    pixels = keras.Input((4, 4, 1))
    level = keras.layers.GlobalAveragePooling2D()(pixels)
    found = keras.layers.Embedding(200, 10, embeddings_initializer=lookup_table())(level)
    keras.Model(pixels, keras.layers.Flatten()(found)).save(tmp_path / "table.keras")
    (tmp_path / "table.labels.txt").write_text("\n".join("abcdefghij"))
    sizes = {"IMAGE_WIDTH": "4", "IMAGE_HEIGHT": "4", "IMAGE_CHANS": "1"}
    images = [flat(level) for level in [*range(100, 131), 250]]
    with (
        run_service(tmp_path, 1, MODEL=str(tmp_path / "table.keras"), **sizes) as service,
        ThreadPoolExecutor(32) as pool,
    ):
        service.servers[0].send(signal.SIGSTOP)
        asked = [pool.submit(service.post, image) for image in images]
        wait_until(lambda: redis.llen(service.queue) + in_flight(redis, service.queue) == 32, "all are queued")
        service.servers[0].send(signal.SIGCONT)
        responses = [each.result() for each in asked]
        server = service.servers[0]

    assert_error(responses[-1], 500, "model_failed")
    for level, response in zip(range(100, 131), responses, strict=False):
        assert response.json()["predictions"][0]["label"] == "abcdefghij"[level % 10]
    assert "Traceback" in server.log
    record_property(
        "figures", f"1 x model_failed, the other 31 images answered correctly, in batches of {server.batches}"
    )


def lookup_table() -> Any:
    """Return probabilities for a mean brightness of 0 to 199, whose last digit is the most probable class."""
    rows = np.full((200, 10), 0.01)
    rows[np.arange(200), np.arange(200) % 10] = 0.91
    return keras.initializers.Constant(rows)


def flat(level: int) -> bytes:
    return saved(Image.new("L", (4, 4), level), "PNG")


SUPERVISED = """
[supervisord]
nodaemon = true
logfile = /dev/null
logfile_maxbytes = 0
pidfile = {directory}/supervisord.pid

[program:deadly]
command = {python} tests/deadly_server.py
autorestart = unexpected
stdout_logfile = {directory}/deadly.log
redirect_stderr = true
"""


def test_poison_image_that_kills_the_model_server_fails_alone(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    queue, log = f"queue-{free_port()}", tmp_path / "deadly.log"
    (tmp_path / "conf").write_text(SUPERVISED.format(directory=tmp_path, python=sys.executable))
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(tmp_path / "conf")]
    with (
        running(command, tmp_path / "log", IMAGE_QUEUE=queue),
        run_apache(IMAGE_QUEUE=queue) as url,
        Load(url) as load,
    ):
        load.wait_for(100)
        response = Service(url).post(saved(Image.new("RGB", (224, 224), "white"), "PNG"))
        load.wait_for(200)

    assert_error(response, 500, "model_failed")
    assert load.failures == {}
    crashes = log.read_text().count("died:")
    assert crashes == 3
    record_property("figures", f"1 x model_failed after {crashes} crashes; the others: {load.figures}")


def test_a_batch_too_big_for_memory_is_split_and_the_limit_is_remembered(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    """As if another program took the GPU's memory after the warm-up. The stand-in raises TensorFlow's own error."""
    queue, images = f"queue-{free_port()}", known_images()[:32]
    command = [sys.executable, "tests/deadly_server.py"]
    with (
        run_apache(IMAGE_QUEUE=queue) as url,
        running(command, tmp_path / "log", IMAGE_QUEUE=queue, IMAGES_THAT_FIT="1") as server,
        ThreadPoolExecutor(32) as pool,
    ):
        server.wait_for_log("* Joined the queue")
        for _ in range(3):
            server.send(signal.SIGSTOP)
            asked = [pool.submit(ask, url, image) for image in images]
            wait_until(lambda: redis.llen(queue) + in_flight(redis, queue) == 32, "all are queued")
            server.send(signal.SIGCONT)
            assert all(each.result().right for each in asked)
        limits = [int(size) for size in re.findall(r"does not fit in memory: computing at most (\d+)", server.log)]

    assert limits
    assert limits == sorted(set(limits), reverse=True)
    lowered = ", then ".join(map(str, limits))
    record_property("figures", f"3 x 32 answered correctly; batch limit lowered to {lowered}")
