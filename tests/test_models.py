"""Several models in one service: queues, names, the default model, the list of models."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import requests
from harness import (
    ROOT,
    Service,
    assert_error,
    free_port,
    resident_bytes,
    run_apache,
    running,
    wait_until,
    web_processes,
)
from prometheus_client import CollectorRegistry, generate_latest
from queue_fixtures import ANSWER, IMAGE, answer, ask_in_background, die, in_background
from redis import Redis

import settings
from helpers import StartupError, default_model, model_name
from image_queue import NoModelServer, QueueFull, RedisDown, ServerQueue, WebQueue, announced, queue_key
from run_web_server import create_app
from web.metrics import QueueCollector
from web.served_models import ServedModels, UnknownModel

pytest_plugins = ["queue_fixtures"]

CATS = {"model": "cats", "weights": "cats.keras", "version": "c1", "shape": [10, 20, 3], "classes": 2}
DIGITS = {"model": "digits", "weights": "digits.keras", "version": "d1", "shape": [32, 32, 1], "classes": 10}


@pytest.fixture(autouse=True)
def refresh_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("image_queue.web_queue", "web.served_models"):
        monkeypatch.setattr(f"{module}.REFRESH_EVERY", 0.0)


@pytest.fixture
def serve(redis: Redis) -> Iterator[Callable[..., ServerQueue]]:
    """A function that lets a model server join."""
    joined: list[ServerQueue] = []

    def join(about: dict[str, Any], **more: Any) -> ServerQueue:
        joined.append(ServerQueue(about | more, 5))
        joined[-1].join()
        return joined[-1]

    yield join
    for server in joined:
        server._slot_socket.close()


Join = Callable[..., ServerQueue]


@pytest.fixture
def models(redis: Redis) -> ServedModels:
    return ServedModels(WebQueue(), lambda model, event, times: None)


def use(monkeypatch: pytest.MonkeyPatch, model: str = "", models: str = "", default: str = "") -> None:
    """Let the settings have these values."""
    monkeypatch.setenv("MODEL", model)
    monkeypatch.setattr(settings, "MODELS", models)
    monkeypatch.setattr(settings, "DEFAULT_MODEL", default)


@pytest.mark.parametrize(
    ("model", "models", "default", "name"),
    [
        ("", "", "", ""),
        ("a/digits.keras", "", "", "digits"),
        ("VGG16", "x/cats.keras, y/dogs.h5", "", "cats"),
        ("VGG16", "x/cats.keras,y/dogs.h5", "dogs", "dogs"),
    ],
)
def test_the_settings_name_the_default_model(
    monkeypatch: pytest.MonkeyPatch, model: str, models: str, default: str, name: str
) -> None:
    use(monkeypatch, model, models, default)

    assert default_model() == name


@pytest.mark.parametrize(
    ("model", "name"), [("ResNet50", "ResNet50"), ("/a b/my cats (2).v1.keras", "my-cats-2-.v1"), ("käfer.h5", "k-fer")]
)
def test_names_are_safe_in_urls_and_keys(model: str, name: str) -> None:
    assert model_name(model) == name


def test_only_the_default_model_has_the_keys_of_a_single_one(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, models="x/cats.keras,y/dogs.keras")

    assert (queue_key("cats"), queue_key("dogs")) == ("image_queue", "image_queue:dogs")


@pytest.mark.parametrize("name", ["taken", "server", "models", "shape"])
def test_a_model_with_the_name_of_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use(monkeypatch, default="cats")

    with pytest.raises(StartupError, match="rename its file"):
        ServerQueue({"model": name, "weights": ""}, 5)


def test_each_model_gets_its_own_images_only(serve: Join, models: ServedModels) -> None:
    digits, cats = serve(DIGITS), serve(CATS)

    asked = [ask_in_background(models.queue(name), request=name) for name in ("cats", "digits", "cats", "")]
    wait_until(lambda: models.queue("cats").waiting() == models.queue("digits").waiting() == 2, "all wait")
    batches = {server: server.take(32) for server in (digits, cats)}

    assert [job.request for job in batches[cats].jobs] == ["cats", "cats"]
    assert sorted(job.request for job in batches[digits].jobs) == ["", "digits"]
    for server, batch in batches.items():
        answer(server, batch)
    assert [each.result(10) for each in asked] == [ANSWER] * 4


def test_each_model_has_its_own_image_size(serve: Join, models: ServedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "IMAGE_WIDTH", 50)  # the default model's
    serve(DIGITS)
    serve(CATS)

    assert models.queue("cats").shape() == (10, 20, 3)
    assert models.queue().shape() == models.queue("digits").shape() == (32, 50, 1)


def test_a_full_queue_is_only_its_models(serve: Join, models: ServedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_QUEUE", 1)
    digits, cats = serve(DIGITS), serve(CATS)
    queue = models.queue("cats")
    in_background(lambda: queue.ask(IMAGE, time.time() + 2))
    wait_until(lambda: queue.waiting() == 1, "the queue of cats is full")

    with pytest.raises(QueueFull, match="1 images are waiting for cats already"):
        models.queue("cats").ask(IMAGE, time.time() + 20)
    cats.leave()
    with pytest.raises(NoModelServer, match="no model server for cats is alive"):
        models.queue("cats").ask(IMAGE, time.time() + 20)
    asked = in_background(lambda: models.queue("digits").ask(IMAGE, time.time() + 20))
    answer(digits, digits.take(1, wait=10))
    assert asked.result(10) == ANSWER


def test_jobs_of_a_dead_server_stay_with_its_model(serve: Join, models: ServedModels, redis: Redis) -> None:
    serve(DIGITS)
    cats, second = serve(CATS), serve(CATS)
    queue = models.queue("cats")
    in_background(lambda: queue.ask(IMAGE, time.time() + 5))
    assert len(cats.take(1, wait=10).jobs) == 1
    die(cats)

    second.reclaim()

    assert redis.llen("image_queue:cats") == 1
    assert redis.llen("image_queue") == 0
    assert second.take(1).jobs[0].crashes == 1


def test_pending_images_are_those_in_the_queue_and_in_all_taken_lists_of_the_model(
    serve: Join, models: ServedModels, redis: Redis
) -> None:
    """Those of a dead server too, since they will be requeued."""
    dead, live, _ = serve(CATS), serve(CATS), serve(DIGITS)
    redis.rpush(live.key, *[f'{{"id": "{n}", "image": "", "deadline": {time.time() + 60}}}' for n in range(7)])
    redis.rpush(f"{live.key}:limit:taken:x", "no taken list of this queue")
    assert [len(server.take(most).jobs) for server, most in ((dead, 3), (live, 2))] == [3, 2]
    die(dead)

    text = generate_latest(registry_of(QueueCollector(models))).decode()

    assert 'keras_rest_api_images_pending{model="cats"} 7.0' in text
    assert 'keras_rest_api_images_pending{model="digits"} 0.0' in text
    assert 'keras_rest_api_queue_length{model="cats"} 2.0' in text


def registry_of(collector: QueueCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def test_servers_of_one_model_share_its_queue_whatever_their_version(serve: Join, models: ServedModels) -> None:
    old, new = serve(CATS), serve(CATS, version="c2", weights="new.keras")

    assert old.key == new.key == "image_queue:cats"
    assert {about["version"] for about in models.servers("cats").values()} == {"c1", "c2"}
    assert models.about("cats")["version"] == "c2"  # the last that joined


def test_default_model_may_be_replaced_by_one_of_another_name(
    serve: Join, models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a rolling update would wait for ever: the new server ended while the old one was alive."""
    old = serve(DIGITS)
    use(monkeypatch, "cats.keras")
    new = serve(CATS)
    assert (old.key, new.key) == ("image_queue", "image_queue")
    assert models.names() == ["cats", "digits"]

    old.leave()
    new._next_beat = 0
    new.beat()

    assert (models.names(), models.default()) == (["cats"], "cats")
    with pytest.raises(UnknownModel, match="There is no model digits, so ask for another one: the models are cats"):
        models.queue("digits")


@pytest.mark.parametrize(("path", "status"), [("/predict/digits", 503), ("/predict", 200)])
def test_only_a_named_model_must_answer_itself(serve: Join, path: str, status: int) -> None:
    """While the default model is replaced by cats, servers of both take images from its queue."""
    digits, client = serve(DIGITS), create_app().test_client()
    asked = in_background(lambda: client.post(path, data=(ROOT / "models/digits/three.png").read_bytes()))

    answer(digits, digits.take(1, wait=10), ANSWER | {"model": "cats", "version": "c1"})

    response = asked.result(20)
    assert response.status_code == status
    if status == 200:
        assert response.headers["X-Model"] == "cats"
    else:
        assert response.json
        assert response.json["error"]["code"] == "model_replaced"
        assert response.headers["Retry-After"] == "5"


def test_without_settings_the_first_model_is_the_default_and_others_join_beside_it(
    serve: Join, models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    serve(CATS)
    serve(DIGITS)

    assert {name: about["queue"] for name, about in models.known().items()} == {
        "cats": "image_queue", "digits": "image_queue:digits",
    }  # fmt: skip
    assert models.default() == "cats"


def test_the_only_model_is_the_default_wherever_its_queue_is(
    serve: Join, models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(CATS)  # joins as one of several
    use(monkeypatch)  # the web's settings name no model

    assert (models.default(), models.queue().key) == ("cats", "image_queue:cats")


def test_server_of_an_older_version_is_found_by_its_heartbeat(redis: Redis, models: ServedModels) -> None:
    about = {"model": "own model", "weights": "own.keras", "shape": [20, 30, 3]}
    redis.set("image_queue:server:host-1.a", json.dumps(about), ex=60)

    assert models.names() == ["own-model"]
    assert models.queue("own-model").key == "image_queue"


def test_model_is_known_for_a_day_after_its_last_heartbeat(serve: Join, redis: Redis, models: ServedModels) -> None:
    """So requests wait while its only server restarts, and the metrics show that none is alive."""
    digits, cats = serve(DIGITS), serve(CATS)
    cats.leave()
    assert models.names() == ["cats", "digits"]
    assert models.servers("cats") == {}
    assert redis.ttl("image_queue:model:cats") == pytest.approx(86400, abs=5)

    redis.delete("image_queue:model:cats")  # as after a day
    digits._next_beat = 0
    digits.beat()

    assert models.names() == ["digits"]


def test_model_announced_a_moment_ago_is_not_called_unknown(
    serve: Join, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the list of models was read before, and is not yet out of date."""
    monkeypatch.setattr("web.served_models.REFRESH_EVERY", 5.0)
    use(monkeypatch, model="digits.keras")
    models = ServedModels(WebQueue(), lambda model, event, times: None)
    with pytest.raises(UnknownModel):
        models.queue("cats")
    serve(CATS)
    time.sleep(0.5)  # a tenth of REFRESH_EVERY, within which the list is not read twice

    assert models.queue("cats").model == "cats"


def test_default_model_of_the_settings_is_not_looked_for_again(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it has no server, each look scans all keys of Redis."""
    looks: list[Redis] = []

    def noted(redis: Redis) -> dict[str, dict[str, Any]]:
        looks.append(redis)
        return {}

    monkeypatch.setattr("web.served_models.REFRESH_EVERY", 5.0)
    monkeypatch.setattr("web.served_models.announced", noted)
    use(monkeypatch, model="digits.keras")
    models = ServedModels(WebQueue(), lambda model, event, times: None)
    for _ in range(2):
        assert models.queue().model == models.queue("digits").model == "digits"
        time.sleep(0.5)  # a tenth of REFRESH_EVERY, within which the list is not read twice anyway

    assert len(looks) == 1


def test_first_request_after_the_only_model_was_announced_counts_as_its(
    serve: Join, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the settings name no model, and the list of models was empty when it was read before."""
    monkeypatch.setattr("web.served_models.REFRESH_EVERY", 5.0)
    use(monkeypatch)
    models = ServedModels(WebQueue(), lambda model, event, times: None)
    assert models.queue().model == ""
    serve(CATS)
    time.sleep(0.5)  # a tenth of REFRESH_EVERY, within which the list is not read twice

    assert models.queue().model == "cats"


@pytest.mark.parametrize("rubbish", [b"", b"[]", b"{", b'{"cats": 7, "a": {"queue": 1}}', b'{"a": {"queue": "other"}}'])
def test_invalid_list_in_redis_is_ignored_and_replaced(
    serve: Join, redis: Redis, models: ServedModels, rubbish: bytes
) -> None:
    digits = serve(DIGITS)
    redis.set("image_queue:models", rubbish)
    assert announced(redis) == {}

    digits._next_beat = 0
    digits.beat()

    assert models.names() == ["digits"]


def test_before_redis_answers_no_model_is_called_unknown(models: ServedModels) -> None:
    models._base.redis.connection_pool.connection_kwargs["port"] = 1

    with pytest.raises(RedisDown):
        models.queue("cats")


def test_lost_redis_leaves_the_models_known(serve: Join, redis: Redis, models: ServedModels) -> None:
    serve(CATS)
    assert models.queue("cats").key == "image_queue:cats"
    models._base.redis.connection_pool.connection_kwargs["port"] = 1

    assert models.queue("cats").key == "image_queue:cats"


# The whole service

PHOTO = (ROOT / "images/photographer.png").read_bytes()
THREE = (ROOT / "models/digits/three.png").read_bytes()


@pytest.fixture(scope="module")
def two_models(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with digits, the default, and a copy of it called figures, with other labels."""
    folder = tmp_path_factory.mktemp("two-models")
    figures = copy_of_digits(folder, "figures", [f"number {digit}" for digit in range(10)])
    where: Any = {"IMAGE_QUEUE": f"queue-{free_port()}", "MODELS": f"{ROOT}/models/digits.keras,{figures}"}
    command = ["/usr/bin/env", str(ROOT / ".venv/bin/python"), "run_model_server.py"]
    with (
        running(command, folder / "digits.log", **where) as digits,
        running([*command, "--model", "figures"], folder / "figures.log", **where) as second,
        run_apache(log=folder / "apache", **where) as url,
    ):
        for server in (digits, second):
            server.wait_for_log("* Joined the queue")
        wait_until(lambda: both_processes_know(url, {"digits", "figures"}), "both models are known")
        yield Service(url, where["IMAGE_QUEUE"], [digits, second])


def copy_of_digits(folder: Path, name: str, labels: list[str]) -> Path:
    """Copy the digits model under another name and with other labels, and return its path."""
    path = folder / f"{name}.keras"
    path.write_bytes((ROOT / "models/digits.keras").read_bytes())
    path.with_suffix(".labels.txt").write_text("\n".join(labels))
    path.with_suffix(".json").write_text('{"description": "numbers", "top": 2, "preprocessing": "none"}')
    return path


def both_processes_know(url: str, names: set[str]) -> bool:
    """Whether each of ten requests finds these models: a web process learns of a model within a second."""
    return all(set(state(url)) == names for _ in range(10))


def state(url: str) -> dict[str, Any]:
    models: dict[str, Any] = requests.get(f"{url}/readyz", timeout=10).json().get("models", {})
    return models


def ask(service: Service, path: str, **options: Any) -> requests.Response:
    return requests.post(service.url + path, files={"image": THREE}, timeout=60, **options)


def test_predict_asks_the_model_in_its_path(two_models: Service) -> None:
    default, digits, figures = (ask(two_models, path) for path in ("/predict", "/predict/digits", "/predict/figures"))

    assert [each.json()["predictions"][0]["label"] for each in (default, digits, figures)] == ["3", "3", "number 3"]
    assert len(figures.json()["predictions"]) == 2  # what figures.json says
    assert [each.headers["X-Model"] for each in (default, digits, figures)] == ["digits", "digits", "figures"]
    versions = [each.headers["X-Model-Version"] for each in (default, digits, figures)]
    assert versions[0] == versions[1] != versions[2]


def test_all_forms_of_predict_work_for_each_model(two_models: Service) -> None:
    url = f"{two_models.url}/predict/figures"
    body = requests.post(url, THREE, headers={"Content-Type": "image/png"}, params={"top": 1}, timeout=60)
    both = requests.post(url, files=[("image", THREE), ("image", b"no image")], timeout=60)

    assert [each["label"] for each in body.json()["predictions"]] == ["number 3"]
    assert [each["success"] for each in both.json()["results"]] == [True, False]
    assert both.headers["X-Model"] == "figures"


@pytest.mark.parametrize("path", ["/predict/cats", "/predict/digits%20", "/predict/..%2Fdigits"])
def test_unknown_model_is_404_and_names_those_that_there_are(two_models: Service, path: str) -> None:
    error = assert_error(ask(two_models, path), 404, "unknown_model")

    assert "the models are digits, figures" in error


def test_readiness_names_each_model(two_models: Service) -> None:
    all_models, figures = (requests.get(f"{two_models.url}{path}", timeout=10) for path in
                           ("/readyz", "/readyz/figures"))  # fmt: skip

    assert all_models.json()["model"] == "digits"
    one = {"ready": True, "model_servers": 1, "queue_length": 0}
    assert all_models.json()["models"] == {"digits": one, "figures": one}
    assert (figures.json()["ready"], figures.json()["model"], figures.json()["queue_length"]) == (True, "figures", 0)
    [about] = figures.json()["model_servers"].values()
    assert about["model"] == "figures"
    assert_error(requests.get(f"{two_models.url}/readyz/cats", timeout=10), 404, "unknown_model")


def test_figures_are_counted_by_model(two_models: Service) -> None:
    def counted() -> dict[str, Any]:
        answer = requests.get(f"{two_models.url}/stats", timeout=10).json()
        assert answer["default_model"] == "digits"
        assert answer["images"] == sum(each["images"] for each in answer["models"].values())
        models: dict[str, Any] = answer["models"]
        return models

    before = counted()
    for path in ("/predict", "/predict/figures", "/predict/figures"):
        ask(two_models, path)
    after = counted()

    grown = {name: after[name]["images"] - before[name]["images"] for name in after}
    assert grown == {"digits": 1, "figures": 2}
    assert after["figures"]["latency"]["count"] - before["figures"]["latency"]["count"] == 2
    assert after["figures"]["description"] == "numbers"
    text = requests.get(f"{two_models.url}/metrics", timeout=10).text
    assert f'keras_rest_api_images_total{{model="figures",outcome="classified"}} {after["figures"]["images"]}.0' in text
    assert 'keras_rest_api_requests_total{endpoint="/predict/<name>",model="figures",status="200"}' in text
    assert 'keras_rest_api_model_servers{model="figures"} 1.0' in text
    assert 'keras_rest_api_queue_length{model="digits"} 0.0' in text


@pytest.mark.slow("1,000 requests to three models")
def test_a_thousand_requests_to_three_models_get_their_own_answers(
    redis_port: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Each model has labels of its own, so an answer of another one, or of a mixed batch, has a wrong label."""
    names = ["first", "second", "third"]
    paths = [copy_of_digits(tmp_path, name, [f"{name} {digit}" for digit in range(10)]) for name in names]
    where: Any = {"IMAGE_QUEUE": f"queue-{free_port()}", "MODELS": ",".join(map(str, paths))}
    images = {digit: (ROOT / f"models/digits/{name}.png").read_bytes() for digit, name in ((3, "three"),)}
    images[7] = (ROOT / "models/digits/seven.jpg").read_bytes()

    def wrong(number: int) -> str:
        name, digit = names[number % 3], (3, 7)[number % 2]
        answer = requests.post(f"{url}/predict/{name}", files={"image": images[digit]}, timeout=60)
        label = answer.json()["predictions"][0]["label"]
        return "" if (label, answer.headers["X-Model"]) == (f"{name} {digit}", name) else answer.text

    with ExitStack() as stack:
        servers = []
        for name in names:
            command = [sys.executable, "run_model_server.py", "--model", name]
            servers.append(stack.enter_context(running(command, tmp_path / f"{name}.log", **where)))
        url = stack.enter_context(run_apache(wait=True, log=tmp_path / "apache", **where))
        for server in servers:
            server.wait_for_log("* Joined the queue")
        wait_until(lambda: set(state(url)) == set(names), "all models are known")
        with ThreadPoolExecutor(32) as pool:
            assert list(filter(None, pool.map(wrong, range(1000)))) == []

    batches = [sum(server.batches) for server in servers]
    assert batches == [334, 333, 333]  # each server got its own images only
    record_property("batches", str([len(server.batches) for server in servers]))


@pytest.mark.slow("starts two web processes three times")
def test_ten_models_take_less_than_2_mb_in_a_web_process(redis_port: int, tmp_path: Path) -> None:
    """The process is asked for all models and for its metrics, after it has served photos, as any that is in use."""

    def grown(count: int) -> float:
        queue = f"queue-{free_port()}"
        keys = {"IMAGE_QUEUE": queue, "APACHE_DEFINES": "WEB_PROCESSES=1 WEB_THREADS=20"}
        names = [f"model{number}" for number in range(count)]
        code = ANSWERING.format(models=names)
        with (
            running([sys.executable, "-c", code], tmp_path / f"{count}.log", **keys) as servers,
            run_apache(log=tmp_path / f"apache-{count}", **keys) as url,  # type: ignore[arg-type]
        ):
            servers.wait_for_log("all joined")
            wait_until(
                lambda: set(requests.get(f"{url}/stats", timeout=9).json()["models"]) == {*names}, "all are known"
            )
            for _ in range(20):
                assert requests.post(f"{url}/predict/{names[0]}", PHOTO, timeout=60).status_code == 200
            for name in islice(cycle(names), 22):  # as many requests for one model as for eleven
                assert requests.post(f"{url}/predict/{name}", THREE, timeout=60).status_code == 200
                requests.get(f"{url}/metrics", timeout=60)
            [process] = web_processes(url)
            return resident_bytes(process) / 2**20

    ones, tens = zip(*((grown(1), grown(11)) for _ in range(3)), strict=True)
    assert median(tens) - median(ones) < 2, (ones, tens)


# Model servers that answer without a model, all in one process.
ANSWERING = """
import sys, threading, time
from image_queue import ServerQueue
names = {models!r}
servers = [ServerQueue({{"model": name, "weights": name, "version": "1", "shape": [32, 32, 3], "classes": 10,
                       "description": 100 * "d"}}, 60) for name in names]
def serve(server):
    while True:
        server.beat()
        batch = server.take(8, 0.2)
        if batch.entries:
            predictions = [{{"label": "3", "probability": 1.0}}]
            answer = {{"predictions": predictions, "model": server.about["model"], "version": "1", "batch": 1}}
            server.answer(batch.jobs, [answer] * len(batch.jobs), batch.entries)
for server in servers:
    server.join()
    threading.Thread(target=serve, args=[server], daemon=True).start()
print("all joined", flush=True)
time.sleep(600)
"""
