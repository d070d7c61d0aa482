"""A model server's metrics, for Prometheus at METRICS_PORT. The web has its own (web_metrics.py)."""

from prometheus_client import Counter, Histogram, Info, disable_created_metrics, start_http_server

import settings
from helpers import StartupError

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for each, which nobody looks at

BATCHES = Histogram("keras_model_server_batch_size", "Images in a batch.", buckets=IMAGES)
COMPUTE = Histogram("keras_model_server_compute_seconds", "Computing a batch.", buckets=SECONDS)
OUTCOMES = Counter(
    "keras_model_server_images", "Images by outcome: classified, unreadable, or model_failed.", ["outcome"]
)
JOBS = Counter(
    "keras_model_server_jobs",
    "Jobs taken; expired before that; recovered from a server that died; given_up, as they killed several; dropped, as "
    "they were no jobs.",
    ["event"],
)
for _event in ("taken", "expired", "recovered", "given_up", "dropped"):
    JOBS.labels(_event)  # there from the start, so that the first one is an increase
for _outcome in ("classified", "unreadable", "model_failed"):
    OUTCOMES.labels(_outcome)
ABOUT = Info("keras_model_server", "What is served.")


def count_jobs(event: str, times: int = 1) -> None:
    """Count what happens to jobs: the model server's side of image_queue calls this."""
    JOBS.labels(event).inc(times)


def serve_metrics(number: int) -> None:
    """Serve the metrics, from a thread, where METRICS_PORT is set. Raises StartupError when the port is taken.

    `number` is added to the port, so that several model servers on one host, each on a GPU, share the settings.
    """
    if not settings.METRICS_PORT:
        return
    port = settings.METRICS_PORT + number
    try:
        start_http_server(port, settings.METRICS_HOST)
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"Port {port} of {settings.METRICS_HOST} can't be had ({error}): set METRICS_PORT."
        ) from None
