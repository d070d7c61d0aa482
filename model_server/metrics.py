"""A model server's metrics and health checks at METRICS_PORT. The web has its own in web/metrics.py, web/health.py."""

import socket
import threading
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

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

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

    `number` is added to the port, so that the model servers of several GPUs on one host can share their settings.
    """
    if not settings.METRICS_PORT:
        return
    host, port = settings.METRICS_HOST, settings.METRICS_PORT + number
    try:
        server_class = type("Server", (ThreadingWSGIServer,), {"address_family": address_family(host, port)})
        server: ThreadingWSGIServer = make_server(host, port, pages, server_class, SilentHandler)
    except (OSError, OverflowError) as error:
        raise StartupError(f"Port {port} of {host} can't be used ({error}): set METRICS_PORT.") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def address_family(host: str, port: int) -> socket.AddressFamily:
    """Return whether `host` has an IPv4 or an IPv6 address. Raises OSError."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
