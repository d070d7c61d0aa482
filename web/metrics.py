"""The web's metrics: for Prometheus at /metrics, and as JSON for the page at /stats.

Any web process can report for all of them: each keeps its values in memory-mapped files in a shared folder, and
prometheus_client adds them up. The figures about batches come from the model servers' answers. Each model server has
more metrics (model_server/metrics.py).
"""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

import flask
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import GaugeMetricFamily, Metric, Sample
from prometheus_client.multiprocess import MultiProcessCollector
from redis.exceptions import RedisError

from image_queue import UnusableRedis
from web.process import METRICS_FOLDER, shared_folder
from web.served_models import ServedModels, State

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240)
STAGE_SECONDS = (0.01, 0.05, 0.25, 1, 2.5, 10, 30, 120)  # fewer: each model has three such histograms
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FILE_SIZE = 2**18  # bytes: what the series of ten models take
PREDICT, CLASSIFIED = "/predict", "classified"  # label values


class Metrics:
    """The counters and histograms of one web process. Create it once per process, since it claims files."""

    def __init__(self) -> None:
        self._lock = share_values()  # before the first metric is created
        # Descriptions are short, because prometheus_client keeps a copy for each series, and each model has 70.
        self.requests = Counter(
            "keras_rest_api_requests",
            "Responses by path, model and HTTP status.",
            ["endpoint", "model", "status"],
            registry=None,
        )
        self.duration = Histogram(
            "keras_rest_api_request_duration_seconds",
            "Seconds for a response with predictions.",
            ["model"], buckets=SECONDS, registry=None,
        )  # fmt: skip
        self.images = Counter(
            "keras_rest_api_images", "Images by model and outcome: classified, or the error code.",
            ["model", "outcome"], registry=None,
        )  # fmt: skip
        self.stages = Histogram(
            "keras_rest_api_stage_seconds", "Seconds of an image in a stage.",
            ["model", "stage"], buckets=STAGE_SECONDS, registry=None,
        )  # fmt: skip
        self.batches = Histogram(
            "keras_rest_api_batch_size", "Batch size of each image.", ["model"], buckets=IMAGES,
            registry=None,
        )  # fmt: skip
        self.jobs = Counter(
            "keras_rest_api_jobs", "Jobs queued, and queued again (retried) because Redis may have lost them.",
            ["model", "event"], registry=None,
        )  # fmt: skip
        self._counted: set[str] = set()  # models whose series exist
        self.all = (self.requests, self.duration, self.images, self.stages, self.batches, self.jobs)

    def start(self, model: str) -> None:
        """Start the counts of a model's jobs at 0, so that Prometheus sees the first one as an increase."""
        if model not in self._counted:
            self._counted.add(model)
            for event in ("queued", "retried"):
                self.jobs.labels(model, event)

    def count_jobs(self, model: str, event: str, times: int = 1) -> None:
        """Count an event that happened to `times` jobs of a model; WebQueue calls this."""
        self.start(model)
        self.jobs.labels(model, event).inc(times)

    def count_request(self, endpoint: str, model: str, status: int, seconds: float, images: int) -> None:
        """Count a response that took `seconds` and has predictions for `images` images.

        `model` is "" if the path names none.

        The duration counts only if there are any: a 401 takes a millisecond, and many of them would hide how long
        images take.
        """
        self.requests.labels(endpoint, model, str(status)).inc()
        if images:
            self.duration.labels(model).observe(seconds)

    def count_classified(self, model: str, batch: int, seconds: dict[str, float]) -> None:
        """Count a classified image: the size of its batch, and the `seconds` spent in each stage."""
        self.images.labels(model, CLASSIFIED).inc()
        if batch:  # older model servers do not report it
            self.batches.labels(model).observe(batch)
        for stage, taken in seconds.items():
            self.stages.labels(model, stage).observe(taken)

    def count_failed(self, model: str, code: str) -> None:
        """Count an image whose result was the error `code`."""
        self.images.labels(model, code).inc()

    def registry(self) -> CollectorRegistry:
        """Return the registry with the values of all web processes."""
        registry = CollectorRegistry()
        if self._lock:
            MultiProcessCollector(registry, os.environ[METRICS_FOLDER])  # type: ignore[no-untyped-call]
        else:
            for metric in self.all:
                registry.register(metric)
        return registry


def share_values() -> IO[str] | None:
    """Make prometheus_client keep this process's values in the shared folder, and return the lock on its files.

    If there are no other processes or the folder can't be written, keep the values in this process and return None.
    """
    if not (os.environ.get(METRICS_FOLDER) or "mod_wsgi" in sys.modules):
        return None
    try:
        folder = shared_folder()
        lock, number = claim_number(folder)
        for kind in ("counter", "histogram"):
            reserve(folder / f"{kind}_{number}.db")
    except OSError as error:
        log.warning("/metrics covers this web process only, since the shared files can't be written (%s)", error)
        os.environ.pop(METRICS_FOLDER, None)
        values.ValueClass = values.MutexValue
        return None
    os.environ[METRICS_FOLDER] = str(folder)  # prometheus_client reads it for each new metric
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
    return lock


def claim_number(folder: Path) -> tuple[IO[str], int]:
    """Return the lowest number that no live process has, and the lock that holds it. Raises OSError.

    So a process continues the files of a dead one. Otherwise each restart would add files, and scrapes would become
    slower and slower.
    """
    for number in count():
        lock = open(folder / f"{number}.lock", "a", encoding="ascii")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return lock, number
    raise AssertionError


def reserve(file: Path) -> None:
    """Allocate the disk space of `file`. Raises OSError.

    Otherwise writing to the mapped memory would kill the process once the disk is full.
    """
    with file.open("ab") as opened:
        os.posix_fallocate(opened.fileno(), 0, FILE_SIZE)


class QueueCollector:
    """Reads metrics from Redis at each scrape."""

    def __init__(self, models: ServedModels) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """Yield each model's queue length, pending images and live model servers, or only that Redis is down."""
        up = GaugeMetricFamily("keras_rest_api_redis_up", "Whether Redis answers and accepts writes.")
        lengths = GaugeMetricFamily("keras_rest_api_queue_length", "Images in the queue.", labels=["model"])
        pending = GaugeMetricFamily(
            "keras_rest_api_images_pending", "Images in the queue or in flight.", labels=["model"]
        )
        live = GaugeMetricFamily("keras_rest_api_model_servers", "Live model servers.", labels=["model"])
        try:
            self.models.check()
            states = self.models.states()
            in_all = self.models.pending(states)
            for name, state in states.items():
                pending.add_metric([name], in_all[name])
                lengths.add_metric([name], state.waiting)
                live.add_metric([name], len(state.servers))
        except (RedisError, UnusableRedis):
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield from (up, lengths, pending, live)


def add_metrics_routes(app: flask.Flask, models: ServedModels, metrics: Metrics) -> None:
    """Add /metrics and /stats to `app`."""
    counted, from_redis = metrics.registry(), CollectorRegistry()
    from_redis.register(QueueCollector(models))

    @app.get("/metrics")
    def prometheus() -> flask.Response:
        """Return the metrics of all web processes in Prometheus' text format."""
        for name in models.names():
            metrics.start(name)
        return flask.Response(generate_latest(counted) + generate_latest(from_redis), content_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        """Return the figures for the page: the live model servers, and counts since the start, also by model."""
        try:
            states = models.states()
        except RedisError:
            states = None
        return stats_of(models, states, [each for metric in counted.collect() for each in metric.samples])


def stats_of(models: ServedModels, states: dict[str, State] | None, samples: list[Sample]) -> dict[str, Any]:
    """Return the figures for /stats. `states` is None if Redis does not answer."""
    live = states or {}
    by_model = {}
    for name, about in sorted(models.known().items()):
        state = live.get(name)
        by_model[name] = {
            **{key: about.get(key) for key in ("description", "version", "shape", "classes")},
            "ready": bool(state and state.servers),
            "model_servers": len(state.servers) if state else 0,
            "queue_length": state.waiting if state else None,
            **counts([each for each in samples if each.labels.get("model") == name]),
        }
    answers = [each for each in samples if each.name == "keras_rest_api_requests_total"]
    requests: dict[str, int] = {}
    for each in answers:
        if each.labels["endpoint"].startswith(PREDICT):
            status = each.labels["status"]
            requests[status] = requests.get(status, 0) + int(each.value)
    return {
        "model_servers": {server: about for state in live.values() for server, about in state.servers.items()},
        "queue_length": None if states is None else sum({each.key: each.waiting for each in live.values()}.values()),
        "requests": requests,
        **counts(samples),
        "default_model": models.default(),
        "models": by_model,
    }


def counts(samples: list[Sample]) -> dict[str, Any]:
    """Return the numbers of classified images, their latency and the sizes of their batches.

    The buckets of histograms are cumulative, by their upper bound, as in Prometheus.
    """
    images = [each for each in samples if each.name == "keras_rest_api_images_total"]
    return {
        "images": int(sum(each.value for each in images if each.labels["outcome"] == CLASSIFIED)),
        "latency": histogram(samples, "keras_rest_api_request_duration_seconds"),
        "batch_size": histogram(samples, "keras_rest_api_batch_size"),
    }


def histogram(samples: list[Sample], name: str) -> dict[str, Any]:
    """Return the histogram `name`, of all models in `samples` together; zeros if nothing was observed yet."""
    buckets: dict[str, int] = {}
    for each in samples:
        if each.name == f"{name}_bucket":
            buckets[bound(each)] = buckets.get(bound(each), 0) + int(each.value)
    total = sum(each.value for each in samples if each.name == f"{name}_sum")
    return {"count": buckets.get("+Inf", 0), "sum": total, "buckets": buckets}


def bound(bucket: Sample) -> str:
    """Return the upper bound of a bucket in short form: 0.25, 16, +Inf."""
    return bucket.labels["le"].removesuffix(".0")
