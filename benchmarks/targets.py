"""The targets of bench.py: ratios of figures within one run, each with its limit and its measured value."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Figures = Mapping[str, Any]
PHOTO = "png-432kB"  # the size of the tutorial's upload
BURST = 500  # requests


class Target(NamedTuple):
    """What is measured, its limit ("at least 0.95", "at most 5", or "" without one), and its value.

    The value is NaN if its parts were not measured.
    """

    what: str
    limit: str
    value: float

    @property
    def verdict(self) -> str:
        """Whether the value reaches its limit, or "" without one."""
        if not self.limit:
            return ""
        *_, word, number = self.limit.split()
        reached = self.value >= float(number) if word == "least" else self.value <= float(number)
        return "reached" if reached else "missed"


def targets(figures: Figures) -> list[Target]:
    """Return every target."""
    rows: list[tuple[str, str, Callable[[Figures], float]]] = [
        ("web: CPU of a request beyond decoding / plain Pillow's decoding", "at most 0.25", _web_cost),
        ("decode and resize / plain Pillow, png-432kB", "at most 0.55", _decode("png-432kB")),
        ("decode and resize / plain Pillow, jpeg-90kB", "at most 0.55", _decode("jpeg-90kB")),
        ("decode and resize / plain Pillow, png-screenshot", "at most 0.42", _decode("png-screenshot")),
        ("requests/s with the costless model / mosec", "at least 1.0", _mosec),
        ("plumbing / decode and resize alone", "at least 0.75", _plumbing_alone),
        ("plumbing / decode only behind the same Apache", "at least 0.85", _plumbing),
        ("p50 of one idle request minus decode and predict, ms", "at most 5", _idle),
        ("idle request to the costless model minus decode, ms", "at most 5", _idle_plumbing),
        ("model server, 1 ms a batch: CPU of an image, ms", "at most 0.15", _intake_cost),
        ("model server, 1 ms a batch: images/s / redis-benchmark", "at least 0.8", _intake_rate),
        ("Redis: CPU of an image, pushed, taken and answered, ms", "at most 0.2", _redis_cost),
        ("4 model servers / 1, 2 ms an image", "at least 3.5", _scaling("4 on one queue")),
        ("2 cells / 1, 2 ms an image", "at least 1.9", _scaling("2 cells of one")),
        ("8 model servers / 1, 20 ms an image", "at least 7.5", lambda run: run["servers"]["8"] / run["servers"]["1"]),
        ("three models at once / each alone in turn", "at least 0.95", _at_once),
        ("peak memory of the model server with ResNet50, GB", "at most 1.8", _peak_memory),
        ("throughput at 64 clients / L", "at least 0.95", _throughput_to_limit),
        ("the same for the tutorial's design", "", _tutorial_to_limit),
        ("most resident memory of a web process, MB", "at most 90", _web_memory),
        ("Redis traffic of a request, MB", "at most 0.45", _redis_traffic),
        ("500 requests at 1.75 L or 20/s: p99 / unavoidable backlog", "at most 1.1", _backlog),
        ("12-megapixel JPEG: web time / full decode", "at most 0.3", _large_jpeg),
        ("start to first answer minus the model's own load, s", "at most 2", _start),
    ]
    return [Target(what, limit, _value(measure, figures)) for what, limit, measure in rows]


def _value(measure: Callable[[Figures], float], figures: Figures) -> float:
    try:
        return float(measure(figures))
    except (KeyError, ZeroDivisionError):  # not measured, or so slow that nothing was answered
        return math.nan


def _web_cost(run: Figures) -> float:
    """Return the web's CPU beyond decoding, as a share of what decoding costs with plain Pillow."""
    cost = run["web cost"]
    return float((cost["web_ms"] - cost["service_ms"]) / cost["plain_ms"])


def _decode(image: str) -> Callable[[Figures], float]:
    return lambda run: run["decode"][image]["service_ms"] / run["decode"][image]["plain_ms"]


def _mosec(run: Figures) -> float:
    rows = run["mosec"]
    return float(rows[f"service, {PHOTO} x 64"]["per_s"] / rows[f"mosec, {PHOTO} x 64"]["per_s"])


def _plumbing_alone(run: Figures) -> float:
    return float(run["plumbing"][f"service, {PHOTO} x 64"]["per_s"] / run["alone"][PHOTO]["per_s"])


def _plumbing(run: Figures) -> float:
    rows = run["plumbing"]
    return float(rows[f"service, {PHOTO} x 64"]["per_s"] / rows[f"decode only, {PHOTO} x 64"]["per_s"])


def _idle(run: Figures) -> float:
    """Return the milliseconds by which an idle request is slower than the same work in one process."""
    return float(run["resnet50"][f"{PHOTO} x 1"]["p50"] - run["in_process_ms"])


def _idle_plumbing(run: Figures) -> float:
    return float(run["plumbing"][f"service, {PHOTO} x 1"]["p50"] - run["alone"][PHOTO]["one_ms"])


def _intake_cost(run: Figures) -> float:
    return float(run["intake"]["server"]["cpu_ms"]["model server"])


def _intake_rate(run: Figures) -> float:
    return float(run["intake"]["server"]["per_s"] / run["intake"]["redis-benchmark"]["per_s"])


def _redis_cost(run: Figures) -> float:
    return float(run["intake"]["clients"]["cpu_ms"]["Redis"])


def _scaling(servers: str) -> Callable[[Figures], float]:
    kind = "2 ms an image"
    return lambda run: (
        run["scaling"][f"{servers}, {kind}"]["per_s"] / run["scaling"][f"1 on one queue, {kind}"]["per_s"]
    )


def _at_once(run: Figures) -> float:
    """Return the sum of the models' rates, each as a share of its rate alone.

    If each is loaded alone for a part of the time, the shares of the time add up to 1.
    """
    rows = run["models"]
    names = {row.partition(",")[0] for row in rows}
    return float(sum(rows[f"{name}, with the others"]["per_s"] / rows[f"{name}, alone"]["per_s"] for name in names))


def _peak_memory(run: Figures) -> float:
    return max(float(row["peak_mb"]["model server"]) for row in run["resnet50"].values()) / 1024


def _throughput_to_limit(run: Figures) -> float:
    return float(run["resnet50"][f"{PHOTO} x 64"]["per_s"] / run["L"])


def _tutorial_to_limit(run: Figures) -> float:
    return float(run["tutorial"][f"{PHOTO} x 64"]["per_s"] / serial_limit(run, PHOTO))


def _web_memory(run: Figures) -> float:
    rows = [*run["resnet50"].values(), *run["plumbing"].values()]
    return max(float(row["peak_mb"]["web"]) for row in rows if "peak_mb" in row)


def _redis_traffic(run: Figures) -> float:
    return float(run["resnet50"][f"{PHOTO} x 64"]["redis_mb_per_request"])


def _backlog(run: Figures) -> float:
    """Return p99 of the fastest burst with an interval, over the unavoidable backlog.

    The clients run on the same cores, so a request takes (1/L + its client's CPU time / cores) seconds. Request n is
    answered after n times that at the earliest.
    """
    apart = [each for each in run["bursts"].values() if each["interval_s"]]
    burst = min(apart, key=lambda each: each["interval_s"])
    client = burst["client_cpu_s"] / BURST / run["machine"]["cores"]
    n = math.ceil(0.99 * BURST)
    unavoidable = n * (1 / serial_limit(run, PHOTO) + client) - (n - 1) * burst["interval_s"]
    return float(burst["latency_ms"]["p99"] / 1000 / unavoidable) if not burst["failed"] else math.inf


def _large_jpeg(run: Figures) -> float:
    """Return the web's CPU time for a request with the costless model, over the CPU time of a full decode."""
    row = run["plumbing"]["service, jpeg-12MP x 64"]
    return float(row["cpu_ms"]["web"] / run["alone"]["jpeg-12MP"]["full_ms"])


def _start(run: Figures) -> float:
    start = run["start"]
    return float(start["first_answer_s"] - start["import_s"] - start["load_s"] - start["warm_up_s"])


def serial_limit(figures: Figures, image: str) -> float:
    """Return L, the images/s when the same cores decode an image and compute it in the fastest way."""
    return in_series(max(figures["model"].values()), figures["prepare"][image]["per_s"])


def in_series(compute: float, prepare: float) -> float:
    """Return the images/s when the same cores do both, from the images/s of each alone."""
    return 1 / (1 / compute + 1 / prepare)
