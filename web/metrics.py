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

from image_queue import UnusableRedis, WebQueue
from web.process import METRICS_FOLDER, shared_folder

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FILE_SIZE = 2**16  # bytes: three times what all series here take
PREDICT, CLASSIFIED = "/predict", "classified"  # label values


class Metrics:
    """The counters and histograms of one web process. Create it once per process, since it claims files."""

    def __init__(self) -> None:
        self._lock = share_values()  # before the first metric is created
        self.requests = Counter(
            "keras_rest_api_requests", "Responses by path and HTTP status.", ["endpoint", "status"], registry=None
        )
        self.duration = Histogram(
            "keras_rest_api_request_duration_seconds",
            "Time for a response of /predict with predictions, from the request's headers to the response.",
            buckets=SECONDS, registry=None,
        )  # fmt: skip
        self.images = Counter(
            "keras_rest_api_images", "Images by outcome: classified, or the error code.", ["outcome"], registry=None
        )
        self.stages = Histogram(
            "keras_rest_api_stage_seconds", "Time of a classified image in each stage: prepare, queue, compute.",
            ["stage"], buckets=SECONDS, registry=None,
        )  # fmt: skip
        self.batches = Histogram(
            "keras_rest_api_batch_size", "Size of the batch of each classified image.", buckets=IMAGES, registry=None
        )
        self.jobs = Counter(
            "keras_rest_api_jobs", "Jobs queued, and queued again (retried) because Redis may have lost them.",
            ["event"], registry=None,
        )  # fmt: skip
        for event in ("queued", "retried"):
            self.jobs.labels(event)  # start at 0, so that Prometheus sees the first one as an increase
        self.all = (self.requests, self.duration, self.images, self.stages, self.batches, self.jobs)

    def count_jobs(self, event: str, times: int = 1) -> None:
        """Count an event that happened to `times` jobs; WebQueue calls this."""
        self.jobs.labels(event).inc(times)

    def count_request(self, endpoint: str, status: int, seconds: float, images: int) -> None:
        """Count a response that took `seconds` and has predictions for `images` images.

        The duration counts only if there are any: a 401 takes a millisecond, and many of them would hide how long
        images take.
        """
        self.requests.labels(endpoint, str(status)).inc()
        if images:
            self.duration.observe(seconds)

    def count_classified(self, batch: int, seconds: dict[str, float]) -> None:
        """Count a classified image: the size of its batch, and the `seconds` spent in each stage."""
        self.images.labels(CLASSIFIED).inc()
        if batch:  # older model servers do not report it
            self.batches.observe(batch)
        for stage, taken in seconds.items():
            self.stages.labels(stage).observe(taken)

    def count_failed(self, code: str) -> None:
        """Count an image whose result was the error `code`."""
        self.images.labels(code).inc()

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

    def __init__(self, queue: WebQueue) -> None:
        self.queue = queue

    def collect(self) -> Iterator[Metric]:
        """Yield the length of the queue and the number of live model servers, or only that Redis is down."""
        try:
            self.queue.check()
            servers, waiting = self.queue.live_servers(), self.queue.waiting()
        except (RedisError, UnusableRedis):
            yield GaugeMetricFamily("keras_rest_api_redis_up", "Whether Redis answers and accepts writes.", 0)
            return
        yield GaugeMetricFamily("keras_rest_api_redis_up", "Whether Redis answers and accepts writes.", 1)
        yield GaugeMetricFamily("keras_rest_api_queue_length", "Images in the queue.", waiting)
        yield GaugeMetricFamily("keras_rest_api_model_servers", "Live model servers.", len(servers))


def add_metrics_routes(app: flask.Flask, queue: WebQueue, metrics: Metrics) -> None:
    """Add /metrics and /stats to `app`."""
    counted, from_redis = metrics.registry(), CollectorRegistry()
    from_redis.register(QueueCollector(queue))

    @app.get("/metrics")
    def prometheus() -> flask.Response:
        """Return the metrics of all web processes in Prometheus' text format."""
        return flask.Response(generate_latest(counted) + generate_latest(from_redis), content_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        """Return the figures for the page: the live model servers, and counts since the start."""
        try:
            servers, waiting = queue.live_servers(), queue.waiting()
        except RedisError:
            servers, waiting = {}, None
        return {"model_servers": servers, "queue_length": waiting, **totals(counted)}


def totals(registry: CollectorRegistry) -> dict[str, Any]:
    """Return the counts for /stats: responses of /predict by status, images, latency and batch sizes.

    The buckets of histograms are cumulative, by their upper bound, as in Prometheus.
    """
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    answers = [each for each in samples if each.name == "keras_rest_api_requests_total"]
    images = [each for each in samples if each.name == "keras_rest_api_images_total"]
    return {
        "requests": {each.labels["status"]: int(each.value) for each in answers if each.labels["endpoint"] == PREDICT},
        "images": int(sum(each.value for each in images if each.labels["outcome"] == CLASSIFIED)),
        "latency": histogram(samples, "keras_rest_api_request_duration_seconds"),
        "batch_size": histogram(samples, "keras_rest_api_batch_size"),
    }


def histogram(samples: list[Sample], name: str) -> dict[str, Any]:
    """Return the histogram `name`; zeros if nothing was observed yet."""
    buckets = {bound(each): int(each.value) for each in samples if each.name == f"{name}_bucket"}
    total = sum(each.value for each in samples if each.name == f"{name}_sum")
    return {"count": buckets.get("+Inf", 0), "sum": total, "buckets": buckets}


def bound(bucket: Sample) -> str:
    """Return the upper bound of a bucket in short form: 0.25, 16, +Inf."""
    return bucket.labels["le"].removesuffix(".0")
