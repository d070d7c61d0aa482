"""The web's metrics: for Prometheus at /metrics, and as JSON at /stats for the page.

Whichever web process is asked answers for all of them: each keeps its figures in a memory-mapped file of a common
directory, which prometheus_client adds up. What they know of a model server is what its answers say; each model server
has metrics of its own besides (server_metrics.py).
"""

import fcntl
import logging
import os
import sys
import tempfile
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

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FILE_SIZE = 2**16  # bytes, of which all the series here take a third
PREDICT, CLASSIFIED = "/predict", "classified"  # values of labels
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's name for it


def share_values() -> list[IO[str]]:
    """Have prometheus_client keep this process' figures where its siblings find them; return the lock on its files.

    Where there are no siblings, or no directory can be had, they stay in the process.
    """
    if not (os.environ.get(DIRECTORY) or "mod_wsgi" in sys.modules):
        return []
    try:
        directory = common_directory()
        lock, number = claim_number(directory)
        for kind in ("counter", "histogram"):
            reserve(directory / f"{kind}_{number}.db")
    except OSError as error:
        log.warning("/metrics is of one web process alone, since its files can't be written (%s)", error)
        os.environ.pop(DIRECTORY, None)
        values.ValueClass = values.MutexValue
        return []
    os.environ[DIRECTORY] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
    return [lock]


def common_directory() -> Path:
    """Return the directory that the processes of one Apache share. Raises OSError.

    It is named after Apache's process, their parent, unless the environment names another. In a folder that everybody
    may write to it counts only if it is ours.
    """
    if os.environ.get(DIRECTORY):
        return Path(os.environ[DIRECTORY])
    directory = Path(tempfile.gettempdir(), f"keras-rest-api-metrics-{os.geteuid()}-{os.getppid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
        raise PermissionError(f"{directory} is somebody else's")
    return directory


def claim_number(directory: Path) -> tuple[IO[str], int]:
    """Return the least number that no live process has, and the lock that holds it. Raises OSError.

    A process that takes the place of another goes on with its files, so that their number does not grow with each
    restart, nor the time of a scrape.
    """
    for number in count():
        lock = open(directory / f"{number}.lock", "a", encoding="ascii")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return lock, number
    raise AssertionError


def reserve(file: Path) -> None:
    """Take the space for `file` on the disk. Raises OSError.

    A disk that fills up later would end the process at its next write to the mapped memory.
    """
    with file.open("ab") as opened:
        os.posix_fallocate(opened.fileno(), 0, FILE_SIZE)


_lock = share_values()  # before the first metric is made

REQUESTS = Counter(
    "keras_rest_api_requests", "Answers by the address asked for and the HTTP status.", ["endpoint", "status"],
    registry=None,
)  # fmt: skip
DURATION = Histogram(
    "keras_rest_api_request_duration_seconds",
    "Of an answer of /predict with predictions, from the headers to the answer.", buckets=SECONDS, registry=None,
)  # fmt: skip
OUTCOMES = Counter(
    "keras_rest_api_images", "Images by outcome: classified, or the code of the error.", ["outcome"], registry=None
)
STAGES = Histogram(
    "keras_rest_api_stage_seconds", "Of a classified image: prepared, in the queue, computed with its batch.",
    ["stage"], buckets=SECONDS, registry=None,
)  # fmt: skip
BATCHES = Histogram(
    "keras_rest_api_batch_size", "Images in the batch that a classified image was in.", buckets=IMAGES, registry=None
)
JOBS = Counter(
    "keras_rest_api_jobs", "Jobs queued, and queued once more (retried) because Redis may have lost them.", ["event"],
    registry=None,
)  # fmt: skip
for _event in ("queued", "retried"):
    JOBS.labels(_event)  # there from the start, so that the first one is an increase
OWN = (REQUESTS, DURATION, OUTCOMES, STAGES, BATCHES, JOBS)


def count_jobs(event: str, times: int = 1) -> None:
    """Count what happens to jobs: the web's side of image_queue calls this."""
    JOBS.labels(event).inc(times)


def count_request(endpoint: str, status: int, seconds: float, images: int) -> None:
    """Count an answer, which took so many `seconds` and has predictions for so many `images`.

    The durations are those of answers with predictions: a 401 takes a millisecond, and would hide how long images take.
    """
    REQUESTS.labels(endpoint, str(status)).inc()
    if images:
        DURATION.observe(seconds)


def count_classified(batch: int, stages: dict[str, float]) -> None:
    """Count an image that was classified in a batch of so many, each of whose `stages` took so many seconds."""
    OUTCOMES.labels(CLASSIFIED).inc()
    if batch:  # a model server that is yet to be upgraded does not say
        BATCHES.observe(batch)
    for stage, seconds in stages.items():
        STAGES.labels(stage).observe(seconds)


def count_refused(code: str) -> None:
    """Count an image that was answered with the error of this code."""
    OUTCOMES.labels(code).inc()


class QueueCollector:
    """What Redis knows, looked up when somebody asks."""

    def __init__(self, queue: WebQueue) -> None:
        self.queue = queue

    def collect(self) -> Iterator[Metric]:
        """Yield the length of the queue and the live model servers, or that Redis can't be used."""
        try:
            self.queue.check()
            servers, waiting = self.queue.live_servers(), self.queue.waiting()
        except (RedisError, UnusableRedis):
            yield GaugeMetricFamily("keras_rest_api_redis_up", "Whether Redis answers and takes writes.", 0)
            return
        yield GaugeMetricFamily("keras_rest_api_redis_up", "Whether Redis answers and takes writes.", 1)
        yield GaugeMetricFamily("keras_rest_api_queue_length", "Images that wait.", waiting)
        yield GaugeMetricFamily("keras_rest_api_model_servers", "Model servers that are alive.", len(servers))


def process_registry() -> CollectorRegistry:
    """Return what gives the figures of all web processes."""
    registry = CollectorRegistry()
    if _lock:
        MultiProcessCollector(registry, os.environ[DIRECTORY])  # type: ignore[no-untyped-call]
    else:
        for metric in OWN:
            registry.register(metric)
    return registry


def add_metrics_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add /metrics and /stats to `app`."""
    counted, looked_up = process_registry(), CollectorRegistry()
    looked_up.register(QueueCollector(queue))

    @app.get("/metrics")
    def metrics() -> flask.Response:
        """Give the metrics of all web processes in Prometheus' text format."""
        return flask.Response(generate_latest(counted) + generate_latest(looked_up), content_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        """Give what the page shows: who is there now, and counts since the start."""
        try:
            servers, waiting = queue.live_servers(), queue.waiting()
        except RedisError:
            servers, waiting = {}, None
        return {"model_servers": servers, "queue_length": waiting, **totals(counted)}


def totals(registry: CollectorRegistry) -> dict[str, Any]:
    """Return the counts that a person would ask for: the answers of /predict, the images, how long and in what batches.

    Histograms have Prometheus' cumulative buckets, each by its upper bound.
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
    """Return the histogram called `name`; zeros where nothing was observed yet."""
    buckets = {bound(each): int(each.value) for each in samples if each.name == f"{name}_bucket"}
    total = sum(each.value for each in samples if each.name == f"{name}_sum")
    return {"count": buckets.get("+Inf", 0), "sum": total, "buckets": buckets}


def bound(bucket: Sample) -> str:
    """Return the upper bound of a bucket as people write it: 0.25, 16, +Inf."""
    return bucket.labels["le"].removesuffix(".0")
