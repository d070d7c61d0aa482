"""What bench.py measured, as people read it: tables, charts, and the targets with what was reached."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Figures = Mapping[str, Any]
BUNDLED = {
    "alone_per_s": "images/s alone, as the model server computes it",
    "batch_size": "images in a batch, by warm-up",
    "limit_per_s": "L: decoding and computing in series, images/s",
    "service_per_s": "images/s through the service, 64 clients",
    "p50_of_one_ms": "one idle request (p50), ms",
    "memory_mb": "memory of the model server after the load, MB",
    "peak_memory_mb": "the most that it had, MB",
    "first_answer_s": "start of bin/serve to the first answer, s",
    "ready_s": "start of bin/serve to its line that it is ready, s",
    "failed": "failed",
}
PHOTO = "png-432kB"
BURST = 500  # requests


def write(figures: Figures, directory: Path) -> None:
    """Write bench.json, bench.md and the charts of the parts that were measured to `directory`."""
    (directory / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    (directory / "bench.md").write_text(markdown(figures))
    if {"model", "prepare", "resnet50"} <= figures.keys():
        throughput(figures, directory / "throughput.png")
        costs(figures, directory / "cpu.png")


def markdown(figures: Figures) -> str:
    """Return the report."""
    on = figures["machine"]
    parts = [f"# Benchmarks\n\n{on['cpu']}, {on['cores']} cores, Python {on['python']}. Latencies in ms.\n"]
    parts += [targets(figures)]
    if "model" in figures:
        parts += ["## Limits\n", table(["alone", "images/s"], limits(figures))]
    for name, heading in (("resnet50", "ResNet50"), ("tutorial", "The tutorial's design"), ("plumbing", "Plumbing")):
        if name in figures:
            parts += [f"## {heading}\n", loads(figures[name])]
    if "bundled" in figures:
        parts += ["## The bundled model beside ResNet50\n", bundled(figures["bundled"])]
    if "bursts" in figures:
        parts += ["## Bursts of stress_test.py\n", bursts(figures["bursts"])]
    if "servers" in figures:
        one = figures["servers"]["1"]
        rows = [[count, rate, rate / one] for count, rate in figures["servers"].items()]
        parts += ["## Model servers of 20 ms a batch of one\n", table(["servers", "images/s", "ratio"], rows)]
    if "fast server" in figures:
        parts += ["## A model server of 2 ms a batch of 32\n", fast_server(figures["fast server"])]
    if "precision" in figures:
        parts += ["## Precision\n", precision(figures["precision"])]
    if "start" in figures:
        rows = [[name.removesuffix("_s").replace("_", " "), seconds] for name, seconds in figures["start"].items()]
        parts += ["## Start-up\n", table(["", "s"], rows)]
    return "\n".join(parts)


def limits(figures: Figures) -> list[list[Any]]:
    """Return the rows of what each part gives by itself."""
    model = ((*name.split(), rate) for name, rate in figures["model"].items())
    rows: list[list[Any]] = [[f"ResNet50, {way}, batch of {size}", rate] for way, size, rate in model]
    if "L" in figures:
        rows.append([f"L, {PHOTO}, right before and after 64 clients", figures["L"]])
    if "in_process_ms" in figures:
        rows.append([f"ResNet50 and {PHOTO}, one after the other in one process", 1000 / figures["in_process_ms"]])
    for name, each in figures["prepare"].items():
        rows.append([f"decode and resize, {name}, all cores", each["per_s"]])
        rows.append([f"L: both in series, {name}", serial_limit(figures, name)])
    return rows


def serial_limit(figures: Figures, image: str) -> float:
    """Return the images/s of cores that do both: 1 / (1/R_model + 1/R_prepare), with the best call of all."""
    best: float = max(figures["model"].values())
    prepare: float = figures["prepare"][image]["per_s"]
    return 1 / (1 / best + 1 / prepare)


def targets(figures: Figures) -> str:
    """Return the table of the ratios that count, as far as they were measured."""
    rows = [[what, wanted, value] for what, wanted, value in ratios(figures) if not math.isnan(value)]
    return f"## Targets\n\n{table(['what', 'target', 'reached'], rows)}" if rows else ""


def ratios(figures: Figures) -> list[tuple[str, str, float]]:
    """Return each target: what it is, the limit, and what was reached; NaN where its parts were not measured."""
    return [
        ("throughput at 64 clients / L", "at least 0.95", _value(lambda: _throughput_to_limit(figures))),
        ("the same of the tutorial's design", "", _value(lambda: _throughput_to_limit(figures, "tutorial"))),
        ("p50 of one idle request minus decode and predict, ms", "at most 5", _value(lambda: _idle(figures))),
        ("plumbing / decode only behind the same Apache", "at least 0.85", _value(lambda: _plumbing(figures))),
        ("plumbing / decode and resize alone", "at least 0.72", _value(lambda: _plumbing_alone(figures))),
        ("idle request to the costless model minus decode, ms", "at most 5", _value(lambda: _idle_plumbing(figures))),
        ("most resident memory of a web process, MB", "at most 90", _value(lambda: _web_memory(figures))),
        ("Redis traffic of a request, MB", "at most 0.45", _value(lambda: _redis_traffic(figures))),
        ("500 at 1.75 L or 20 a second: p99 / unavoidable backlog", "at most 1.1", _value(lambda: _backlog(figures))),
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
    """Milliseconds of an idle request beyond what the same takes in one process."""
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
    """p99 of the burst over the wait that no service could spare its last clients.

    The cores run the clients too, so that they answer one in 1/L + a client's CPU time / cores seconds at most, and the
    n-th client is done after n times that at the earliest. Of the bursts with an interval the fastest counts.
    """
    apart = [each for each in figures["bursts"].values() if each["interval_s"]]
    burst = min(apart, key=lambda each: each["interval_s"])
    client = burst["client_cpu_s"] / BURST / figures["machine"]["cores"]
    n = math.ceil(0.99 * BURST)
    unavoidable = n * (1 / serial_limit(figures, PHOTO) + client) - (n - 1) * burst["interval_s"]
    return float(burst["latency_ms"]["p99"] / 1000 / unavoidable) if not burst["failed"] else math.inf


def _large_jpeg(figures: Figures) -> float:
    """CPU seconds of the web for a request with the costless model, over those of a full decode."""
    row = figures["plumbing"]["service, jpeg-12MP x 64"]
    return float(row["cores"]["web"] / row["per_s"] * 1000 / figures["prepare"]["jpeg-12MP"]["full_ms"])


def _start(figures: Figures) -> float:
    start = figures["start"]
    return float(start["first_answer_s"] - start["import_s"] - start["load_s"] - start["warm_up_s"])


def loads(rows: Figures) -> str:
    """Return the table of closed loops."""
    head = ["", "per s", "p50", "p95", "p99", "failed", "batches", "cores used", "peak MB", "Redis MB/request"]
    body = []
    for name, row in rows.items():
        sizes = row.get("batches") or {}
        body.append([
            name, row["per_s"], row.get("p50", math.nan), row.get("p95", math.nan), row.get("p99", math.nan),
            row["failed"],
            f"{sizes['mean']:.1f} (at most {sizes['most']})" if sizes else "",
            ", ".join(f"{who} {cores:.2f}" for who, cores in row.get("cores", {}).items()),
            ", ".join(f"{who} {mb:.0f}" for who, mb in row.get("peak_mb", {}).items()),
            row.get("redis_mb_per_request", ""),
        ])  # fmt: skip
    return table(head, body)


def bundled(models: Figures) -> str:
    """Return the table of the bundled model beside ResNet50, the last column their ratio."""
    ours, other = models.values()
    rows = [[what, ours[key], other[key], _ratio(ours[key], other[key])] for key, what in BUNDLED.items()]
    rows.insert(
        4, ["through the service / L", *(each["service_per_s"] / each["limit_per_s"] for each in (ours, other))]
    )
    rows[4].append("")
    return table(["", *models, "ratio"], rows)


def _ratio(value: float, other: float) -> float:
    return value / other if other else math.nan


def bursts(rows: Figures) -> str:
    """Return the table of stress_test.py's figures."""
    head = ["", "answered", "failed", "s", "p50", "p95", "p99", "batches"]
    body = []
    for name, row in rows.items():
        latency = row["latency_ms"] or dict.fromkeys(("p50", "p95", "p99"), math.nan)
        mean = row["batches"].get("mean", math.nan)
        body.append([
            name, row["answered"], row["failed"], row["duration_s"],
            latency["p50"], latency["p95"], latency["p99"], mean,
        ])  # fmt: skip
    return table(head, body)


def fast_server(row: Figures) -> str:
    """Return the table of a model server whose model is as fast as a GPU."""
    cores = ", ".join(f"{who} {used:.2f}" for who, used in row["cores"].items())
    body = [["the model alone", 16_000.0, "", ""], ["fed from Redis", row["per_s"], row["batches"]["mean"], cores]]
    return table(["", "images/s", "mean batch", "cores used"], body)


def precision(rows: Figures) -> str:
    """Return the table of ways to compute."""
    head = ["", "images/s", "held-out digits read right", "largest difference of a probability to float32"]
    body = [
        [name, row["per_s"], f"{row['right']:.2%}" if "right" in row else "", row.get("difference", "")]
        for name, row in rows.items()
    ]
    return table(head, body)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table; numbers with three significant digits."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def throughput(figures: Figures, path: Path) -> None:
    """Draw throughput over clients: the service, the limit, and the tutorial's design."""
    axes: Any
    drawing, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for part, label in (("resnet50", "this service"), ("tutorial", "the tutorial's design")):
        rows = {name: row for name, row in figures.get(part, {}).items() if name.startswith(PHOTO)}
        clients = [int(name.rpartition(" ")[2]) for name in rows]
        axes.plot(clients, [row["per_s"] for row in rows.values()], "o-", label=label)
    axes.axhline(serial_limit(figures, PHOTO), ls="--", color="black", lw=1, label="limit of the cores")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients in a closed loop")
    axes.set_ylabel("images a second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def costs(figures: Figures, path: Path) -> None:
    """Draw what a request costs in CPU time, by program and load, beside what the limit allows."""
    axes: Any
    rows = {name: row for name, row in figures["resnet50"].items() if name.endswith(" 64") or name.startswith(PHOTO)}
    drawing, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    places = range(len(rows))
    done = [0.0] * len(rows)
    for who in ("model server", "web", "Apache", "Redis"):
        ms = [1000 * row["cores"][who] / row["per_s"] for row in rows.values()]
        axes.barh(places, ms, left=done, label=who)
        done = [sum(pair) for pair in zip(done, ms, strict=True)]
    cores = figures["machine"]["cores"]
    allowed = [1000 * cores / serial_limit(figures, name.partition(" ")[0]) for name in rows]
    axes.scatter(allowed, places, marker="|", s=300, color="black", label="what the limit allows", zorder=3)
    axes.set_yticks(places, rows)
    axes.invert_yaxis()
    axes.set_xlabel("ms of CPU a request")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)
