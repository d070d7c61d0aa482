"""The model server: step by step with a stand-in for the classifier, and as a process with the digits model."""

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import harness
import numpy as np
import pytest
import requests
from harness import Process, free_port, run_redis, running, wait_until
from PIL import Image
from redis import Redis
from stand_in_model import MEAN, POISON, MeanClassifier, push, stepped_server

import run_model_server
import settings
from helpers import StartupError, base64_encode_image
from image_queue import Batch, ServerQueue, WebQueue
from model_server import startup
from model_server.batching import BATCHES_AT_ONCE
from model_server.classifier import Classifier
from model_server.loop import GATHER, ModelServer


@pytest.fixture
def server(redis: Redis) -> Iterator[ModelServer]:
    yield from stepped_server(MeanClassifier(), MEAN)


@pytest.fixture
def classifier(server: ModelServer) -> MeanClassifier:
    return cast(MeanClassifier, server.classifier)


def answer(redis: Redis, level: int) -> Any:
    reply = redis.blpop([f"{settings.IMAGE_QUEUE}:result:job{level}"], 10)
    assert reply is not None, f"no answer to {level}"
    return json.loads(reply[1])


def label(redis: Redis, level: int) -> str:
    text: str = answer(redis, level)["predictions"][0]["label"]
    return text


def test_each_image_gets_its_own_answer(redis: Redis, server: ModelServer) -> None:
    push(redis, *range(5))

    server.step()

    assert [label(redis, level) for level in range(5)] == ["0", "1", "2", "3", "4"]


def test_an_image_that_breaks_the_model_does_not_affect_its_batch(redis: Redis, server: ModelServer) -> None:
    push(redis, 1, POISON, 2)

    server.step()

    assert answer(redis, POISON)["error"]["code"] == "model_failed"
    assert [label(redis, 1), label(redis, 2)] == ["1", "2"]


@pytest.mark.parametrize("image", ["AAAA", "not base64!", "é"])
def test_an_undecodable_image_does_not_affect_its_batch(redis: Redis, server: ModelServer, image: str) -> None:
    push(redis, 1)
    push(redis, 2, image=image)
    push(redis, 3)

    server.step()

    assert answer(redis, 2)["error"]["code"] == "model_failed"
    assert [label(redis, 1), label(redis, 3)] == ["1", "3"]


@contextmanager
def held_up(server: ModelServer, batches: int = BATCHES_AT_ONCE) -> Iterator[None]:
    """Run the server, its model held up until the block ends. The block begins once `batches` are being computed."""
    classifier = cast(MeanClassifier, server.classifier)
    go_on = threading.Event()
    classifier.before = lambda images: go_on.wait(30)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: len(classifier.sizes) == batches, f"{batches} batches are being computed")
        yield
    finally:
        go_on.set()
    wait_until(lambda: server.queue.redis.llen(server.queue.taken) == 0, "all images are answered")
    server.stop(signal.SIGTERM, None)
    thread.join(20)


def test_two_batches_are_computed_while_a_third_is_taken(redis: Redis, server: ModelServer) -> None:
    push(redis, *range(20, 120))

    with held_up(server):
        wait_until(lambda: redis.llen(server.queue.taken) == 96, "three batches are taken")
        assert redis.llen(settings.IMAGE_QUEUE) == 4


def test_a_waiting_batch_is_filled_up_with_new_jobs(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    push(redis, *range(20, 92))

    with held_up(server):
        wait_until(lambda: redis.llen(settings.IMAGE_QUEUE) == 0, "the last eight are taken")
        push(redis, *range(100, 140))

    assert classifier.sizes == [32, 32, 32, 16]
    levels = [*range(20, 92), *range(100, 140)]
    assert [label(redis, level) for level in levels] == [str(level) for level in levels]


def test_jobs_that_come_while_another_is_computed_are_computed_together(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    sleep = time.sleep

    def sleep_or_push(seconds: float) -> None:
        if seconds == GATHER:
            push(redis, 22, 23)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep_or_push)
    push(redis, 20)

    with held_up(server, 1):
        push(redis, 21)
        wait_until(lambda: len(classifier.sizes) == 2, "a second batch is computed")

    assert classifier.sizes == [1, 3]
    assert [label(redis, level) for level in range(20, 24)] == ["20", "21", "22", "23"]


def test_a_job_that_comes_alone_is_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, server: ModelServer
) -> None:
    monkeypatch.setattr("model_server.loop.GATHER", "to wait is an error")
    for level in range(20, 23):
        push(redis, level)
        server.step()
        assert label(redis, level) == str(level)
        wait_until(lambda: all(each.done() for each in server._in_flight), "the server has sent the answer")


def test_a_suspect_is_not_added_to_a_batch_that_waits(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    """The batches before it may be answered while it waits, but it is not empty."""
    push(redis, 1)
    batch = server._take(Batch())
    push(redis, 2)
    suspect = json.loads(cast(bytes, redis.rpop(settings.IMAGE_QUEUE)))
    redis.rpush(settings.IMAGE_QUEUE, json.dumps(suspect | {"crashes": 1}))

    server._fill_up(batch)

    assert [job.id for job in batch.jobs] == ["job1"]
    assert redis.llen(settings.IMAGE_QUEUE) == 1


def test_answers_go_out_in_the_order_of_the_taken_list(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    """Otherwise a crash would lose an unanswered batch, and requeue an answered one."""
    push(redis, *range(20, 84))
    first = threading.Event()
    second = threading.Event()

    def computing(images: Any) -> None:
        if images[0].flat[0] == 20:
            first.wait(30)
        else:
            second.set()

    classifier.before = computing
    for _ in range(2):
        server.step()
    assert second.wait(10)

    assert redis.llen(server.queue.taken) == 64
    first.set()
    server.settle()
    assert redis.llen(server.queue.taken) == 0
    assert [label(redis, level) for level in range(20, 84)] == [str(level) for level in range(20, 84)]


def test_a_job_that_expires_while_it_waits_is_not_computed(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    push(redis, *range(20, 84))
    gone = time.time() + 0.5
    push(redis, 1, seconds=0.5)
    push(redis, 2)

    with held_up(server):
        wait_until(lambda: redis.llen(settings.IMAGE_QUEUE) == 0, "both are taken")
        wait_until(lambda: time.time() > gone + 0.1, "the job has expired")

    assert classifier.sizes == [32, 32, 1]
    assert label(redis, 2) == "2"


def test_a_suspect_is_computed_alone_with_nothing_else_in_flight(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    push(redis, *range(3))
    first = json.loads(cast(bytes, redis.lpop(settings.IMAGE_QUEUE)))
    redis.lpush(settings.IMAGE_QUEUE, json.dumps(first | {"crashes": 1}))
    in_flight = []
    classifier.before = lambda images: in_flight.append(redis.llen(server.queue.taken))

    for _ in range(2):
        server.step()
    server.settle()

    assert classifier.sizes == [1, 2]
    assert in_flight[0] == 1


def test_a_suspect_waits_until_nothing_else_is_in_flight(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    push(redis, 1, 2)
    last = json.loads(cast(bytes, redis.rpop(settings.IMAGE_QUEUE)))
    redis.rpush(settings.IMAGE_QUEUE, json.dumps(last | {"crashes": 1}))
    in_flight = []
    classifier.before = lambda images: in_flight.append(redis.llen(server.queue.taken))

    while len(in_flight) < 2:
        server.step()

    assert classifier.sizes == [1, 1]
    assert in_flight[1] == 1  # in_flight[0] may include the suspect, before take() puts it back
    assert [label(redis, 1), label(redis, 2)] == ["1", "2"]


def test_answered_jobs_leave_the_taken_list(redis: Redis, server: ModelServer) -> None:
    push(redis, *range(70))

    for _ in range(3):
        server.step()
    server.settle()

    assert redis.llen(server.queue.taken) == 0


def test_stopping_answers_what_is_computed_and_requeues_the_rest(redis: Redis, server: ModelServer) -> None:
    push(redis, *range(20, 120))

    with held_up(server):
        wait_until(lambda: redis.llen(server.queue.taken) == 96, "three batches are taken")
        server.stop(signal.SIGTERM, None)

    assert [label(redis, level) for level in range(20, 84)] == [str(level) for level in range(20, 84)]
    assert [json.loads(job)["id"] for job in redis.lrange(settings.IMAGE_QUEUE, 0, -1)] == [
        f"job{level}" for level in range(84, 120)
    ]
    assert server.queue.live_servers() == {}


def test_a_server_whose_heartbeat_expired_joins_again(
    redis: Redis, server: ModelServer, classifier: MeanClassifier
) -> None:
    """Its heartbeat expires while it computes, as in a long freeze."""
    push(redis, 1)
    classifier.before = lambda images: redis.delete(server.queue.heartbeat)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert label(redis, 1) == "1"
    classifier.before = lambda images: None

    push(redis, 2)

    assert label(redis, 2) == "2"
    server.stop(signal.SIGTERM, None)
    thread.join(10)
    assert not thread.is_alive()


def test_answers_outlive_a_restart_of_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Redis is killed while a batch is computed and comes back empty; the answers still reach their clients."""
    port = free_port()
    monkeypatch.setattr(settings, "REDIS_PORT", port)
    web, classifier = WebQueue(), MeanClassifier()
    computing, go_on = threading.Event(), threading.Event()
    classifier.before = lambda images: computing.set() or go_on.wait(30)  # type: ignore[func-returns-value]
    with run_redis(tmp_path / "log", port) as process:
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        server = ModelServer(cast(Classifier, classifier), ServerQueue(MEAN, 5))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        image = base64_encode_image(np.full((2, 2, 3), 7, np.uint8))
        asked = ThreadPoolExecutor(1).submit(web.ask, image, time.time() + 30)
        assert computing.wait(10)
        process.stop(signal.SIGKILL)
    classifier.classify = lambda images: time.sleep(1) or [8]  # type: ignore
    go_on.set()
    with run_redis(tmp_path / "log2", port):
        assert asked.result(30)["predictions"][0]["label"] == "7"
        server.stop(signal.SIGTERM, None)
        thread.join(20)


@pytest.mark.parametrize(("visible", "number", "chosen"), [("4,7", 0, "4"), ("4,7", 1, "7"), ("4,7", 2, "4"),
                                                           ("GPU-1a", 3, "GPU-1a"), ("", 1, "")])  # fmt: skip
def test_each_model_server_gets_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str, number: int, chosen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    run_model_server.pin_gpu(number)

    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_the_gpu_number_is_ignored_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    run_model_server.pin_gpu(1)

    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_sigterm_ends_with_code_0_and_removes_the_heartbeat(redis: Redis, tmp_path: Path) -> None:
    with harness.run_model_server(tmp_path / "log") as process:
        heartbeats = wait_until(lambda: redis.keys(f"{settings.IMAGE_QUEUE}:server:*"), "the heartbeat is there")

        assert process.stop(signal.SIGTERM) == 0

    assert len(heartbeats) == 1
    assert redis.keys(f"{settings.IMAGE_QUEUE}:server:*") == []
    for line in ("* Loading model...", "* Model loaded"):
        assert line in process.log


@pytest.mark.backends
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_torch_and_jax_answer_several_clients_at_once(redis: Redis, tmp_path: Path, backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        raise harness.Missing(f"{backend} is not installed")
    web = WebQueue()
    images = []
    for name, digit in [("three.png", "3"), ("seven.jpg", "7")]:
        pixels = Image.open(harness.ROOT / "models/digits" / name).convert("RGB").resize((224, 224))
        images.append((base64_encode_image(np.asarray(pixels)), digit))
    with harness.run_model_server(tmp_path / "log", KERAS_BACKEND=backend, BATCH_SIZE="4") as process:
        with ThreadPoolExecutor(8) as clients:
            asked = [(clients.submit(web.ask, image, time.time() + 60), digit) for image, digit in images * 40]
        for answering, digit in asked:
            assert answering.result()["predictions"][0]["label"] == digit
        assert process.stop() == 0

    assert "Traceback" not in process.log
    assert "ERROR" not in process.log


def test_the_model_server_logs_a_missing_redis_and_recovers(tmp_path: Path) -> None:
    port = free_port()
    with running([sys.executable, "run_model_server.py"], tmp_path / "log", REDIS_PORT=str(port)) as process:
        process.wait_for_log("* Model loaded")
        process.wait_for_log(f"WARNING Redis at 127.0.0.1:{port} does not answer", times=3)
        assert "Traceback" not in process.log
        with run_redis(tmp_path / "redis", port):
            redis = Redis(port=port)
            wait_until(lambda: "Ready" in (tmp_path / "redis").read_text(), "Redis is up")
            wait_until(lambda: redis.keys(f"{settings.IMAGE_QUEUE}:server:*"), "the model server is alive")
            assert process.stop() == 0


def test_the_web_logs_a_missing_redis_and_recovers(tmp_path: Path) -> None:
    redis_port, port = free_port(), free_port()
    command = [sys.executable, "run_web_server.py", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, tmp_path / "log", REDIS_PORT=str(redis_port)) as process:
        process.wait_for_log(f"WARNING Redis at 127.0.0.1:{redis_port} does not answer", times=2)
        assert requests.get(url, timeout=10).text == "Welcome to the PyImageSearch Keras REST API!"
        not_ready = requests.get(f"{url}/readyz", timeout=10)
        assert not_ready.json()["error"]["code"] == "redis_down"
        assert not_ready.headers["Retry-After"] == "5"
        with run_redis(tmp_path / "redis", redis_port):
            wait_until(lambda: "Ready" in (tmp_path / "redis").read_text(), "Redis is up")
            assert requests.get(f"{url}/readyz", timeout=10).json()["error"]["code"] == "no_model_server"


def test_a_redis_that_is_too_old_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("image_queue.diagnosis.OLDEST_REDIS", 999)
    monkeypatch.setattr(sys, "argv", ["run_model_server.py"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep the test run's own handlers

    assert run_model_server.main() == 2

    assert "999 or newer is needed" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("MODEL", "ResNet51", "MODEL=ResNet51 is invalid"),
        ("MODEL", "no/such.keras", "MODEL=no/such.keras does not exist"),
        ("IMAGE_WIDTH", "100", "set IMAGE_WIDTH=224."),
    ],
)
def test_an_invalid_model_ends_with_code_2(tmp_path: Path, name: str, value: str, line: str) -> None:
    process = Process([sys.executable, "run_model_server.py"], tmp_path / "log", **{name: value})

    assert process.popen.wait(120) == 2
    [error] = [each for each in process.log.splitlines() if "ERROR" in each]
    assert line in error
    assert "Traceback" not in process.log


def checked(model: str, *image: str) -> subprocess.CompletedProcess[str]:
    """The result of --check without Redis, with another MODEL in the environment."""
    environment = {**os.environ, **harness.AS_INSTALLED, "REDIS_PORT": str(free_port()), "MODEL": "elsewhere.keras"}
    command = [sys.executable, "run_model_server.py", "--model", model, "--check", *image]
    return subprocess.run(
        command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow("measures the speed of the bundled model")
def test_check_prints_the_predictions_and_the_speed() -> None:
    done = checked("models/efficientnet_lite0.keras")

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\S+ \S+ INFO \* Loading model\.\.\.\n", done.stderr)  # and nothing from TensorFlow
    summary, image, speed = done.stdout.splitlines()
    assert summary == (
        "models/efficientnet_lite0.keras: input 224x224 RGB, preprocessing none, 1000 labels, "
        "1,000 ImageNet classes: animals, plants, food, vehicles, things"
    )
    assert re.match(r".*images/cat\.jpg: Egyptian_cat 0\.7\d{3}, tiger_cat 0\.\d{4}, ", image)
    found = re.fullmatch(r"models/efficientnet_lite0\.keras: ([\d.]+) images/s in batches of \d+, 2 at once", speed)
    assert found is not None
    assert float(found[1]) > 10


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["nowhere.keras"], "nowhere.keras does not exist"),
     (["models/digits.keras", "README.md"], "README.md can't be read as an image")],
)  # fmt: skip
def test_a_failed_check_says_why(arguments: list[str], reason: str) -> None:
    done = checked(*arguments)

    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]


def test_importing_the_model_server_changes_nothing() -> None:
    code = (
        "import os, sys, threading\n"
        "before = dict(os.environ), threading.active_count()\n"
        "import run_model_server\n"
        "assert (dict(os.environ), threading.active_count()) == before\n"
        "assert 'keras' not in sys.modules"
    )

    bare = {"PATH": os.environ["PATH"]}  # without what this process has imported and set
    subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, env=bare, check=True, timeout=60)


@pytest.mark.parametrize("error", [None, StartupError("no such model")])
def test_garbage_is_collected_once_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: StartupError | None
) -> None:
    collecting: list[bool] = []
    loaded: list[weakref.ref[Mock]] = []

    def load() -> Mock:
        weights = Mock()
        weights.itself = weights  # a cycle, which only the garbage collector frees
        loaded.append(weakref.ref(weights))
        collecting.append(gc.isenabled())
        if error:
            raise error
        return Mock()

    monkeypatch.setitem(sys.modules, "model_server.classifier", cast(types.ModuleType, Mock(load=load)))

    with pytest.raises(StartupError) if error else nullcontext():
        startup.load_model()

    assert collecting == [False]
    assert gc.isenabled()
    if not error:
        assert loaded[0]() is None
