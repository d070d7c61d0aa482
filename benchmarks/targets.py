"""The targets of bench.py: ratios of figures within one run, each with its limit and its measured value."""

import math
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]
PHOTO = "png-432kB"  # the size of the tutorial's upload
BURST = 500  # requests


def ratios(figures: Figures) -> list[tuple[str, str, float]]:
    """Return each target: description, limit and measured value; NaN where its parts were not measured."""
    return [
        ("throughput at 64 clients / L", "at least 0.95", _value(lambda: _throughput_to_limit(figures))),
        ("the same for the tutorial's design", "", _value(lambda: _throughput_to_limit(figures, "tutorial"))),
        ("p50 of one idle request minus decode and predict, ms", "at most 5", _value(lambda: _idle(figures))),
        ("plumbing / decode only behind the same Apache", "at least 0.85", _value(lambda: _plumbing(figures))),
        ("plumbing / decode and resize alone", "at least 0.72", _value(lambda: _plumbing_alone(figures))),
        ("idle request to the costless model minus decode, ms", "at most 5", _value(lambda: _idle_plumbing(figures))),
        ("most resident memory of a web process, MB", "at most 90", _value(lambda: _web_memory(figures))),
        ("Redis traffic of a request, MB", "at most 0.45", _value(lambda: _redis_traffic(figures))),
        ("500 requests at 1.75 L or 20/s: p99 / unavoidable backlog", "at most 1.1", _value(lambda: _backlog(figures))),
        ("8 model servers / 1", "at least 7.5", _value(lambda: figures["servers"]["8"] / figures["servers"]["1"])),
        ("12-megapixel JPEG: web time / full decode", "at most 0.3", _value(lambda: _large_jpeg(figures))),
        ("start to first answer minus the model's own load, s", "at most 2", _value(lambda: _start(figures))),
    ]


def _value(measure: Any) -> float:
    try:
        return float(measure())
    except KeyError:
        return math.nan


def _throughput_to_limit(figures: Figures, part: str = "resnet50") -> float:
    limit = figures["L"] if part == "resnet50" else serial_limit(figures, PHOTO)
    return float(figures[part][f"{PHOTO} x 64"]["per_s"] / limit)


def _idle(figures: Figures) -> float:
    """Return the milliseconds by which an idle request is slower than the same work in one process."""
    return float(figures["resnet50"][f"{PHOTO} x 1"]["p50"] - figures["in_process_ms"])


def _plumbing(figures: Figures) -> float:
    rows = figures["plumbing"]
    return float(rows[f"service, {PHOTO} x 64"]["per_s"] / rows[f"decode only, {PHOTO} x 64"]["per_s"])


def _plumbing_alone(figures: Figures) -> float:
    return float(figures["plumbing"][f"service, {PHOTO} x 64"]["per_s"] / figures["prepare"][PHOTO]["per_s"])


def _idle_plumbing(figures: Figures) -> float:
    return float(figures["plumbing"][f"service, {PHOTO} x 1"]["p50"] - figures["decode_ms"])


def _web_memory(figures: Figures) -> float:
    rows = [*figures["resnet50"].values(), *figures["plumbing"].values()]
    return max(float(row["peak_mb"]["web"]) for row in rows if "peak_mb" in row)


def _redis_traffic(figures: Figures) -> float:
    return float(figures["resnet50"][f"{PHOTO} x 64"]["redis_mb_per_request"])


def _backlog(figures: Figures) -> float:
    """Return p99 of the fastest burst with an interval, over the unavoidable backlog.

    The clients run on the same cores, so a request takes (1/L + its client's CPU time / cores) seconds. Request n is
    answered after n times that at the earliest.
    """
    apart = [each for each in figures["bursts"].values() if each["interval_s"]]
    burst = min(apart, key=lambda each: each["interval_s"])
    client = burst["client_cpu_s"] / BURST / figures["machine"]["cores"]
    n = math.ceil(0.99 * BURST)
    unavoidable = n * (1 / serial_limit(figures, PHOTO) + client) - (n - 1) * burst["interval_s"]
    return float(burst["latency_ms"]["p99"] / 1000 / unavoidable) if not burst["failed"] else math.inf


def _large_jpeg(figures: Figures) -> float:
    """Return the web's CPU time for a request with the costless model, over the CPU time of a full decode."""
    row = figures["plumbing"]["service, jpeg-12MP x 64"]
    return float(row["cores"]["web"] / row["per_s"] * 1000 / figures["prepare"]["jpeg-12MP"]["full_ms"])


def _start(figures: Figures) -> float:
    start = figures["start"]
    return float(start["first_answer_s"] - start["import_s"] - start["load_s"] - start["warm_up_s"])


def serial_limit(figures: Figures, image: str) -> float:
    """Return L, the images/s when the same cores decode an image and compute it in the fastest way."""
    return in_series(max(figures["model"].values()), figures["prepare"][image]["per_s"])


def in_series(compute: float, prepare: float) -> float:
    """Return the images/s when the same cores do both, from the images/s of each alone."""
    return 1 / (1 / compute + 1 / prepare)
