"""A model server's metrics and health checks at METRICS_PORT. The web has its own in web/metrics.py, web/health.py."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    Metric,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.exposition import ThreadingWSGIServer

import settings
from helpers import StartupError, model_name
from model_server.health import health
from model_server.systemd import REPLACES

log = logging.getLogger(__name__)

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TAKE_OVER_EVERY = 0.5  # seconds between two attempts to use the port of a model server that is being replaced

disable_created_metrics()  # type: ignore[no-untyped-call] # drop the unused `_created` series

BATCHES = Histogram("keras_model_server_batch_size", "Images in a batch.", buckets=IMAGES)
COMPUTE = Histogram("keras_model_server_compute_seconds", "Computing a batch.", buckets=SECONDS)
OUTCOMES = Counter(
    "keras_model_server_images", "Images by outcome: classified, unreadable, or model_failed.", ["outcome"]
)
JOBS = Counter(
    "keras_model_server_jobs",
    "Jobs by event: taken; expired before they were computed; recovered from a server that died; given_up, since they "
    "killed several servers; dropped, since they were invalid.",
    ["event"],
)
for _event in ("taken", "expired", "recovered", "given_up", "dropped"):
    JOBS.labels(_event)  # create each series at 0, so that Prometheus sees the first job as an increase
for _outcome in ("classified", "unreadable", "model_failed"):
    OUTCOMES.labels(_outcome)
ABOUT = Info("keras_model_server", "What is served.")


def count_jobs(event: str, times: int = 1) -> None:
    """Count an event of jobs; ServerQueue calls this."""
    JOBS.labels(event).inc(times)


class WithModel(CollectorRegistry):
    """All metrics of this process, each with the label `model`."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        model = {"model": model_name(settings.MODEL)}
        for metric in REGISTRY.collect():
            metric.samples = [each._replace(labels=model | each.labels) for each in metric.samples]
            yield metric


class SilentHandler(WSGIRequestHandler):
    """Logs no requests."""

    timeout = 10  # seconds, so that a client that sends nothing does not keep its thread

    def log_message(self, *_: object) -> None:
        """Log nothing."""


metrics_page: Callable[..., Iterable[bytes]] = make_wsgi_app(WithModel())


def pages(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Answer /livez, for a supervisor that restarts this process, and /readyz; the metrics at any other path."""
    checks = {"/livez": health.why_dead, "/readyz": health.why_not_ready}
    check = checks.get(environ.get("PATH_INFO", ""))
    if check is None:
        return metrics_page(environ, start)
    reason = check()
    start("503 Service Unavailable" if reason else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{reason or 'ok'}\n".encode()]


def serve_metrics(number: int) -> None:
    """Serve the metrics and the health checks from a thread if METRICS_PORT is set. Raises StartupError.

    `number` is added to the port, so that the model servers of several GPUs on one host can share their settings. A
    model server that replaces another one takes the port over once that one has ended.
    """
    if not settings.METRICS_PORT:
        return
    port = settings.METRICS_PORT + number
    try:
        _serve(port)
    except (OSError, OverflowError) as error:
        if replaced := int(os.environ.get(REPLACES, "0")):
            threading.Thread(target=_take_over, args=[port, replaced], daemon=True).start()
            return
        raise StartupError(
            f"Port {port} of {settings.METRICS_HOST} can't be used ({error}): set METRICS_PORT."
        ) from None


def _serve(port: int) -> None:
    """Serve on `port` from a thread. Raises OSError and OverflowError if the port can't be used."""
    host = settings.METRICS_HOST
    [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    server_class = type("Server", (ThreadingWSGIServer,), {"address_family": family})  # IPv4 or IPv6
    server: ThreadingWSGIServer = make_server(host, port, pages, server_class, SilentHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _take_over(port: int, replaced: int) -> None:
    """Serve the metrics on `port` as soon as the process `replaced` has ended."""
    ended = False
    while True:
        try:
            _serve(port)
            return
        except OSError as error:
            if ended:
                log.error(
                    "Port %d of %s can't be used (%s), so there are no metrics", port, settings.METRICS_HOST, error
                )
                return
        ended = not os.path.exists(f"/proc/{replaced}")
        time.sleep(TAKE_OVER_EVERY)
