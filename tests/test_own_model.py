"""A user's own model, with its JSON and labels files: setting MODEL is enough, and it can be replaced under load."""

import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import pytest
import requests
from harness import (
    AS_INSTALLED,
    ROOT,
    Missing,
    Service,
    free_port,
    ready,
    run_apache,
    run_model_server,
    run_redis,
    run_service,
    running,
    wait_until,
)
from PIL import Image
from redis import Redis
from redis.exceptions import RedisError
from samples import colors, saved

import image_queue
import settings
from helpers import Shape, StartupError, base64_encode_image
from image_queue import Job, ServerQueue, WebQueue
from model_server import classifier
from model_server.loop import ModelServer, resized

LABELS = ["dark", "medium", "bright"]
SMALL: Shape = (64, 96, 1)  # height, width, channels
WEB_PROCESSES = 2  # of run_apache()
LEARN_LIMIT = 2  # seconds within which every web process learns the size of a new model

Record = Callable[[str, object], None]


def save_model(
    path: Path, shape: tuple[int | None, int | None, int] = SMALL, facts: Any = None, gain: float = 0.1
) -> Path:
    """Save a small network, and `facts` as its JSON file. With the default gain, pixels 0..255 do not saturate it."""
    layers = [keras.Input(shape),
              keras.layers.Conv2D(4, 5, strides=3, activation="relu", kernel_initializer=initializer(1)),
              keras.layers.GlobalAveragePooling2D(),
              keras.layers.Dense(3, activation="softmax", kernel_initializer=initializer(2))]  # fmt: skip
    model = keras.Sequential(layers)
    model.set_weights([each * (gain if each.ndim == 4 else 1) for each in model.get_weights()])
    model.save(path)
    if facts is not None:
        path.with_suffix(".json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return path


def initializer(seed: int) -> Any:
    return keras.initializers.GlorotUniform(seed)


def load(monkeypatch: pytest.MonkeyPatch, path: Path, **values: Any) -> classifier.Classifier:
    for name, value in {"MODEL": str(path), "BATCH_SIZE": 2, **values}.items():
        monkeypatch.setattr(settings, name, value)
    model = classifier.load()
    model.warm_up()
    return model


def pixels_of(shape: Shape, count: int = 2) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


# The JSON file


def test_the_json_file_gives_labels_top_and_description(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"labels": LABELS, "top": 2, "description": "how bright it is", "width": 96, "height": 64, "channels": 1}
    model = load(monkeypatch, save_model(tmp_path / "own.keras", facts=facts))

    [first, _] = model.classify(pixels_of(SMALL))

    assert not isinstance(first, Exception)
    assert len(model.decode(first)) == 2
    assert {label for label, _ in model.decode(first, 3)} == set(LABELS)
    assert model.about["shape"] == SMALL
    assert model.about["description"] == "how bright it is"


def test_the_json_file_may_name_a_labels_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\nc\n")
    (tmp_path / "own.labels.txt").write_text("not\nthese\nthree\n")

    model = load(monkeypatch, save_model(tmp_path / "own.keras", facts={"labels": "names"}))

    assert list(model.facts.labels) == ["a", "b", "c"]


def test_a_setting_overrides_the_file_and_the_file_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\nc\n")
    facts = {"labels": LABELS, "top": 2, "width": 50, "height": 40}
    path = save_model(tmp_path / "any.keras", (None, None, 3), facts)
    assert load(monkeypatch, path).shape == (40, 50, 3)

    model = load(monkeypatch, path, LABELS=str(tmp_path / "names"), TOP=1, IMAGE_WIDTH=60)

    assert model.shape == (40, 60, 3)
    assert list(model.facts.labels) == ["a", "b", "c"]
    assert len(model.decode(np.array([0.1, 0.2, 0.7]))) == 1


def test_a_model_for_any_size_gets_the_default_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save_model(tmp_path / "any.keras", (None, None, 3))
    path.with_suffix(".labels.txt").write_text("\n".join(LABELS))

    assert load(monkeypatch, path).shape == (224, 224, 3)


WRONG = [
    ({"colour": 1}, "colour=1 is invalid: the keys are width, height, "),
    ({"width": "96"}, "width=96 is invalid: it must be a whole number of pixels from 1 to 4096."),
    ({"width": 96.5}, "width=96.5 is invalid: it must be a whole number"),
    ({"height": 0}, "height=0 is invalid: it must be a whole number"),
    ({"height": None}, "height=null is invalid: it must be a whole number"),
    ({"channels": 2}, "channels=2 is invalid: it must be 3 (RGB) or 1 (gray)."),
    ({"channels": True}, "channels=true is invalid: it must be 3 (RGB) or 1 (gray)."),
    ({"width": 100}, "width=100 is invalid: it must be 96, which is what the model takes, or left out."),
    ({"channels": 3}, "channels=3 is invalid: it must be 1, which is what the model takes, or left out."),
    ({"preprocessing": "std"}, "preprocessing=std is invalid: it must be one of none, scale, tf, torch, caffe."),
    ({"preprocessing": ["tf"]}, 'preprocessing=["tf"] is invalid: it must be one of none'),
    ({"preprocessing": "caffe"}, "preprocessing=caffe is invalid: it must be none, scale or tf for a gray image."),
    ({"labels": []}, "labels=[] is invalid: it must be a list of strings, or the name of a file beside it"),
    ({"labels": ["a", 2, "c"]}, 'labels=["a", 2, "c"] is invalid: it must be a list of strings'),
    ({"labels": ["a", " ", "c"]}, "is invalid: it must be a list of strings"),
    ({"labels": ["a", "\x1b[31mb", "c"]}, "is invalid: it must be a list of strings"),
    ({"labels": "nowhere.txt"}, "labels=nowhere.txt is invalid: it must be a list of strings, or the name of a file"),
    ({"labels": ["a", "b"]}, "gives (3,) values per image, but there are 2 labels: `labels` in "),
    ({"top": 0}, "top=0 is invalid: it must be a whole number from 1 to 1000."),
    ({"description": "a\nb"}, "description=a?b is invalid: it must be one line of at most 500 characters."),
    ("[]", "holds [], but it needs an object such as"),
    ("{", "can't be read as JSON"),
    ("[" * 100_000, "can't be read as JSON"),
    ("", "can't be read as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "line"), WRONG, ids=[line[:40] for _, line in WRONG])
def test_an_invalid_json_file_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: Any, line: str
) -> None:
    facts = {"labels": LABELS} | facts if isinstance(facts, dict) else facts

    with pytest.raises(StartupError) as refusal:
        load(monkeypatch, save_model(tmp_path / "own.keras", facts=facts))

    assert line in str(refusal.value)
    assert str(tmp_path / "own.json") in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 600


def test_the_model_server_ends_with_code_2_and_that_line(tmp_path: Path) -> None:
    path = save_model(tmp_path / "own.keras", facts={"labels": LABELS, "tpo": 3})

    ended = subprocess.run(
        [sys.executable, "run_model_server.py"],
        cwd=ROOT, env={**os.environ, **AS_INSTALLED, "MODEL": str(path)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith(
        f"{tmp_path}/own.json: tpo=3 is invalid: the keys are width, height, channels, preprocessing, labels, top, "
        "description."
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_with_2_or_4_channels_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: int
) -> None:
    path = save_model(tmp_path / "own.keras", (64, 96, channels), {"labels": LABELS})

    with pytest.raises(StartupError, match="the service has 1 or 3 channels"):
        load(monkeypatch, path)


def test_a_setting_that_contradicts_the_model_size_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="another size: set IMAGE_WIDTH=96 and IMAGE_CHANS=1"):
        load(monkeypatch, save_model(tmp_path / "own.keras", facts={"labels": LABELS}), IMAGE_WIDTH=100, IMAGE_CHANS=3)


@pytest.mark.slow("serves a large network")
def test_a_keras_classifier_has_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "EfficientNetV2B1", "MODEL_WEIGHTS": "random"}.items():
        monkeypatch.setattr(settings, name, value)

    assert classifier.load().shape == (240, 240, 3)


# Preprocessing

PLAIN: dict[str, Callable[[Any], Any]] = {
    "none": lambda pixels: pixels,
    "scale": lambda pixels: pixels / 255,
    **{
        mode: partial(keras.applications.imagenet_utils.preprocess_input, mode=mode)
        for mode in ("tf", "torch", "caffe")
    },
}


def answers_of(paths: list[Path], backend: str, dtype: str, images: Any) -> Any:
    """The probabilities that each model gives for the images, computed twice, in a process with this backend."""
    np.save(paths[0].with_suffix(".npy"), images)
    code = (
        "import sys, json, numpy as np, settings\nfrom model_server import classifier\n"
        "images = np.load(sys.argv[1])\n"
        "for settings.MODEL in sys.argv[2:]:\n"
        "    model = classifier.load(); model.warm_up()\n"
        "    print(json.dumps([[each.tolist() for each in model.classify(images)] for _ in range(2)]))"
    )
    environment = {**os.environ, **AS_INSTALLED, "KERAS_BACKEND": backend, "IMAGE_DTYPE": dtype, "BATCH_SIZE": "4"}
    command = [sys.executable, "-c", code, str(paths[0].with_suffix(".npy")), *map(str, paths)]
    printed = subprocess.check_output(command, cwd=ROOT, env=environment, timeout=250)
    return [np.array(json.loads(line)) for line in printed.splitlines()]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("tensorflow", "uint8"),
        pytest.param("torch", "float32", marks=pytest.mark.backends),
        pytest.param("jax", "uint8", marks=pytest.mark.backends),
    ],
)
def test_every_preprocessing_equals_that_of_keras(tmp_path: Path, backend: str, dtype: str) -> None:
    """The pixels are not modified either: a batch that fails is computed again in halves."""
    if importlib.util.find_spec(backend) is None:
        raise Missing(f"{backend} is not installed")
    paths = [
        save_model(tmp_path / f"{mode}.keras", (20, 30, 3), {"labels": LABELS, "preprocessing": mode}) for mode in PLAIN
    ]
    images = pixels_of((20, 30, 3), 5).astype(dtype)

    answers = answers_of(paths, backend, dtype, images)

    model = keras.saving.load_model(paths[0])
    plain = [model.predict(prepare(images.astype(np.float32)), verbose=0) for prepare in PLAIN.values()]
    for mode, twice, expected in zip(PLAIN, answers, plain, strict=True):
        assert twice[0] == pytest.approx(expected, abs=1e-4), mode
        assert twice[1] == pytest.approx(expected, abs=1e-4), mode
    for one, other in itertools.combinations(plain, 2):
        assert np.abs(one - other).max() > 1e-3  # so that a mix-up would be noticed


# Jobs of another shape


class Shaped:
    """A classifier of 4x6 RGB images that labels each with its mean, rounded to tens."""

    shape = (4, 6, 3)
    batch_size = 32

    def classify(self, images: Any) -> list[Any]:
        return [image.mean() for image in images]

    def decode(self, mean: float, _top: int) -> list[tuple[str, float]]:
        return [(str(round(mean / 10) * 10), 1.0)]


@pytest.fixture
def server(redis: Redis) -> Iterator[ModelServer]:
    queue = ServerQueue({"model": "shaped", "weights": "none", "shape": Shaped.shape}, 5)
    model_server = ModelServer(cast(classifier.Classifier, Shaped()), queue)
    queue.join()
    yield model_server
    model_server._computing.shutdown()
    model_server._answering.shutdown()
    queue._slot_socket.close()


def queued(redis: Redis, level: int, pixels: Shape, **others: Any) -> Callable[[], Any]:
    """Queue a flat image of this shape, with `others` in its job; return a function that waits for the answer."""
    image = base64_encode_image(np.full(pixels, level, settings.IMAGE_DTYPE))
    job = {"id": f"job{level}", "image": image, "deadline": time.time() + 60, "shape": pixels} | others
    redis.rpush(settings.IMAGE_QUEUE, json.dumps({name: value for name, value in job.items() if value is not None}))

    def answer() -> Any:
        reply = redis.blpop([f"{settings.IMAGE_QUEUE}:result:job{level}"], 10)
        assert reply is not None
        return json.loads(reply[1])

    return answer


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_jobs_of_other_shapes_are_resized_in_one_batch(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, server: ModelServer, dtype: str
) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", dtype)
    shapes: list[Shape] = [(4, 6, 3), (224, 224, 3), (64, 96, 1), (1, 1, 3), (6, 4, 3)]
    asked = [queued(redis, 10 * (i + 1), shape) for i, shape in enumerate(shapes)]

    server.step()

    assert [answer()["predictions"][0]["label"] for answer in asked] == ["10", "20", "30", "40", "50"]


def test_a_job_without_a_shape_has_the_shape_of_the_model(redis: Redis, server: ModelServer) -> None:
    """An older web server sends jobs without a shape."""
    right, wrong = queued(redis, 10, (4, 6, 3), shape=None), queued(redis, 20, (224, 224, 3), shape=None)

    server.step()

    assert right()["predictions"][0]["label"] == "10"
    assert wrong()["error"]["code"] == "model_failed"


@pytest.mark.parametrize("shape", [[4, 6], [4, 6, 2], [0, 6, 3], [4.0, 6, 3], "4x6", [10**9, 6, 3], [6, 6, 3], {}])
def test_a_job_with_an_invalid_shape_does_not_affect_its_batch(redis: Redis, server: ModelServer, shape: Any) -> None:
    wrong, right = queued(redis, 20, (4, 6, 3), shape=shape), queued(redis, 10, (4, 6, 3))

    server.step()

    assert wrong()["error"]["code"] == "model_failed"
    assert right()["predictions"][0]["label"] == "10"


def test_a_job_longer_than_the_largest_image_is_refused(redis: Redis, server: ModelServer) -> None:
    largest, longer = queued(redis, 10, image_queue.LARGEST_SHAPE), queued(redis, 20, (700, 700, 3))

    server.step()

    assert largest()["predictions"][0]["label"] == "10"
    assert longer()["error"]["code"] == "model_failed"


def test_a_job_keeps_its_shape_when_its_server_dies() -> None:
    job = Job("a", "aW1hZ2U=", time.time() + 5, shape=(4, 6, 3))

    assert Job.parse(job.dump()) == job


def test_resizing_is_bicubic_and_swaps_neither_sides_nor_colors() -> None:
    pixels = colors(0, (90, 60))
    expected = np.asarray(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC))

    assert (resized(pixels, (20, 30, 3)) == expected).all()
    gray = np.asarray(Image.fromarray(pixels).convert("L").resize((30, 20), Image.Resampling.BICUBIC))
    assert (resized(pixels, (20, 30, 1))[:, :, 0] == gray).all()


# How the web learns the size


def live_server(shape: Any) -> ServerQueue:
    """A live model server for images of this shape."""
    server = ServerQueue({"model": "own", "weights": "own.keras", "shape": shape}, 5)
    server.join()
    return server


@pytest.fixture
def refresh_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_queue.web_queue.SHAPE_REFRESH", 0.0)


@pytest.mark.usefixtures("refresh_at_once")
def test_the_web_takes_the_size_from_the_last_model_server(redis: Redis) -> None:
    web = WebQueue()
    assert web.shape() == (224, 224, 3)

    server = live_server(SMALL)
    assert web.shape() == SMALL
    server.leave()
    assert web.shape() == WebQueue().shape() == SMALL  # another process learns it too
    redis.delete(web.shape_key)
    assert web.shape() == SMALL
    assert WebQueue().shape() == (224, 224, 3)


@pytest.mark.usefixtures("refresh_at_once")
def test_a_live_server_of_an_older_version_overrides_a_dead_one(redis: Redis) -> None:
    """An older version writes only a heartbeat."""
    web = WebQueue()
    live_server(SMALL).leave()
    redis.set(web.server_key("older.1"), json.dumps({"model": "a", "weights": "b", "shape": [20, 30, 3]}), ex=60)

    assert web.shape() == (20, 30, 3)


@pytest.mark.usefixtures("refresh_at_once")
@pytest.mark.parametrize("rubbish", [b"", b"[]", b"{", b'{"shape": [1, 2]}', b'{"shape": "SMALL", "server": 7}'])
def test_invalid_sizes_in_redis_are_ignored(redis: Redis, rubbish: bytes) -> None:
    web = WebQueue()
    redis.set(web.shape_key, rubbish, ex=60)
    redis.set(web.server_key("odd"), rubbish, ex=60)

    assert web.shape() == (224, 224, 3)


@pytest.mark.usefixtures("refresh_at_once")
def test_settings_override_the_size_of_the_model_server(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    live_server(SMALL)
    web = WebQueue()

    monkeypatch.setattr(settings, "IMAGE_WIDTH", 50)
    assert web.shape() == (64, 50, 1)


def test_with_all_sizes_set_the_web_does_not_ask_redis(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGE_WIDTH", "IMAGE_HEIGHT", "IMAGE_CHANS"):
        monkeypatch.setattr(settings, name, 3)
    web = WebQueue()
    monkeypatch.setattr(web, "redis", None)

    assert web.shape() == (3, 3, 3)


class SlowRefresh:
    """Refreshes that block until `go_on`; the n-th finds the shape n x n."""

    def __init__(self, web: WebQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.go_on = threading.Event()
        monkeypatch.setattr(web, "_served_shape", self.look)

    def look(self) -> Shape:
        self.count += 1
        assert self.go_on.wait(10)
        return self.count, self.count, 1


def test_one_thread_refreshes_the_size_and_others_use_the_cached_one(
    redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = WebQueue()
    web._next_refresh = time.monotonic()
    slow = SlowRefresh(web, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(web.shape)
        wait_until(lambda: slow.count, "the refresh has begun")
        assert {web.shape() for _ in range(8)} == {(224, 224, 3)}
        slow.go_on.set()

        assert looking.result(10) == web.shape() == (1, 1, 1)
    assert slow.count == 1


def test_after_an_idle_time_all_wait_for_the_refresh(redis_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first requests to a web process that was idle would get a size that is an hour old."""
    web = WebQueue()
    slow = SlowRefresh(web, monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        looking = pool.submit(web.shape)
        wait_until(lambda: slow.count, "the refresh has begun")
        assert web.shape() == (224, 224, 3)  # the wait is limited, since Redis may be down
        crowd = [pool.submit(web.shape) for _ in range(7)]
        slow.go_on.set()

        assert {each.result(10) for each in [looking, *crowd]} == {(1, 1, 1)}
    assert slow.count == 1


@pytest.mark.usefixtures("refresh_at_once")
def test_a_failed_refresh_keeps_the_cached_size(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    server, web = live_server(SMALL), WebQueue()
    assert web.shape() == SMALL
    server.leave()

    def broken() -> None:
        raise RedisError

    monkeypatch.setattr(web, "_served_shape", broken)
    assert web.shape() == SMALL


# The whole service


def photos(count: int) -> list[bytes]:
    """Pictures of several sizes, each darker than the one before, that the model can tell apart."""
    pixels = [colors(i, (150 + i, 100 + 2 * i)) * (1 - i / count) for i in range(count)]
    return [saved(Image.fromarray(each.astype(np.uint8)), "PNG") for each in pixels]


def plain_answers(path: Path, images: list[bytes], prepare: Callable[[Any], Any]) -> Any:
    """The probabilities that plain Keras gives for these files."""
    opened = [Image.open(io.BytesIO(data)).convert("L").resize((96, 64), Image.Resampling.BICUBIC) for data in images]
    pixels = np.stack([np.asarray(each, np.float32)[:, :, np.newaxis] for each in opened])
    return keras.saving.load_model(path).predict(prepare(pixels), verbose=0)


def test_a_gray_model_of_another_size_needs_only_its_path(redis_port: int, tmp_path: Path) -> None:
    facts = {"labels": LABELS, "preprocessing": "scale", "top": 3}
    path = save_model(tmp_path / "gray.keras", facts=facts, gain=5)
    images = photos(12)
    with run_service(tmp_path, MODEL=str(path)) as service:
        with ThreadPoolExecutor(12) as pool:
            answered = list(pool.map(service.predictions, images))
        metadata = requests.get(f"{service.url}/v2/models/gray", timeout=10).json()
        [server] = ready(service.url)["model_servers"].values()

    plain = plain_answers(path, images, PLAIN["scale"])
    for got, expected in zip(answered, plain, strict=True):
        assert {each["label"]: each["probability"] for each in got} == pytest.approx(
            dict(zip(LABELS, map(float, expected), strict=True)), abs=1e-4
        )
    assert np.ptp(plain, axis=0).max() > 1e-2  # so that a mix-up would be noticed
    assert metadata["inputs"][0]["shape"] == [-1, *SMALL]
    assert server["shape"] == list(SMALL)


def queued_shapes(url: str, redis: Redis, queue: str, count: int) -> set[tuple[int, ...]]:
    """The shapes in which the web processes at `url` queue `count` images, while no model server takes them."""
    image = photos(1)[0]
    before = redis.llen(queue)
    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(Service(url).post, image, timeout=20)
        wait_until(lambda: redis.llen(queue) == before + count, "the images are queued")
        shapes = {tuple(json.loads(job)["shape"]) for job in redis.lrange(queue, before, -1)}
        redis.delete(queue)
    return shapes


@pytest.mark.slow("waits for heartbeats to expire")
def test_web_processes_learn_and_remember_the_size(redis: Redis, tmp_path: Path) -> None:
    """Running processes learn it within seconds. Those started while no model server is alive know it at once."""
    path = save_model(tmp_path / "gray.keras", facts={"labels": LABELS})
    queue = f"queue-{free_port()}"
    limits: Any = {"IMAGE_QUEUE": queue, "REQUEST_TIMEOUT": "3"}
    with run_apache(**limits) as url:
        assert queued_shapes(url, redis, queue, 16) == {(224, 224, 3)}
        with running([sys.executable, "run_model_server.py"], tmp_path / "log", MODEL=str(path), IMAGE_QUEUE=queue):
            wait_until(lambda: redis.exists(f"{queue}:shape"), "the model server has joined", 120)
            joined = time.monotonic()
        wait_until(lambda: time.monotonic() > joined + LEARN_LIMIT, "the web has had time to learn it")
        assert redis.keys(f"{queue}:server:*") == []
        assert queued_shapes(url, redis, queue, 16) == {SMALL}
    with run_apache(**limits) as url:
        assert queued_shapes(url, redis, queue, 16) == {SMALL}


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


def commands(redis: Redis) -> Counter[str]:
    """How often the web has sent each command to Redis."""
    stats = cast(dict[str, dict[str, int]], redis.info("commandstats"))
    calls = Counter({name.removeprefix("cmdstat_"): about["calls"] for name, about in stats.items()})
    calls["exists"] -= calls["ltrim"]  # the model server checks its heartbeat with each answered batch
    return Counter({name: calls[name] for name in ("rpush", "multi", "exec", "blpop", "get", "exists", "mget")})


def asked_of_redis(redis: Redis, url: str, images: list[bytes]) -> tuple[Counter[str], float]:
    """The commands that these requests cause, and the seconds that they take."""
    service = Service(url)
    before, begun = commands(redis), time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(service.post, images)} == {200}
    return commands(redis) - before, time.monotonic() - begun


@pytest.mark.slow("starts the service twice, for 400 requests")
def test_learning_the_size_costs_no_command_per_request(tmp_path: Path, record_property: Record) -> None:
    """Each web process looks it up only once a second."""
    port, images = free_port(), photos(20) * 20
    where: Any = {"REDIS_PORT": str(port), "IMAGE_QUEUE": "queue-of-its-own"}
    size: Any = {"IMAGE_WIDTH": "224", "IMAGE_HEIGHT": "224", "IMAGE_CHANS": "3"}
    with (
        run_redis(tmp_path / "redis", port) as process,
        Redis(port=port, socket_timeout=5) as redis,
    ):
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        with run_service(tmp_path, **where) as service, run_apache(**where, **size) as url:
            with_size, _ = asked_of_redis(redis, url, images)
            without, seconds = asked_of_redis(redis, service.url, images)

    extra = without - with_size
    assert with_size["rpush"] >= len(images)
    assert 2 <= extra["get"] <= WEB_PROCESSES * (seconds + 2)
    assert extra.total() <= 2 * WEB_PROCESSES * (seconds + 2)
    assert len(images) > 4 * WEB_PROCESSES * (seconds + 2)  # so that one command per request would be noticed
    record_property("figures", f"{extra.total()} more commands for {len(images)} requests in {seconds:.1f} s")
