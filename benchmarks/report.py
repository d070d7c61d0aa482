"""Write the figures of bench.py as JSON, Markdown tables and charts."""

import json
import math
from pathlib import Path
from typing import Any

import charts
import targets
from targets import PHOTO, Figures, serial_limit

LOADS = {
    "resnet50": "ResNet50",
    "tutorial": "The tutorial's design",
    "plumbing": "Plumbing",
    "mosec": "The costless model, beside mosec",
    "models": "Three models, alone in turn and at once",
}
PROGRAMS = ("web", "Apache", "Redis", "model server", "mosec")
BUNDLED = {
    "alone_per_s": "images/s alone, as the model server computes it",
    "batch_size": "batch size found at warm-up",
    "limit_per_s": "L: decoding and computing in series, images/s",
    "service_per_s": "images/s through the service, 64 clients",
    "p50_of_one_ms": "one idle request (p50), ms",
    "memory_mb": "memory of the model server after the load, MB",
    "peak_memory_mb": "its peak, MB",
    "first_answer_s": "start of bin/serve to the first answer, s",
    "ready_s": "start of bin/serve to its ready line, s",
    "failed": "failed",
}


def write(figures: Figures, directory: Path) -> None:
    """Write bench.json, bench.md and the charts of the measured parts to `directory`."""
    (directory / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    (directory / "bench.md").write_text(markdown(figures))
    if {"model", "prepare", "resnet50"} <= figures.keys():
        charts.throughput(figures, directory / "throughput.png")
        charts.costs(figures, directory / "cpu.png")


def markdown(figures: Figures) -> str:
    """Return the report as Markdown."""
    on = figures["machine"]
    parts = [f"# Benchmarks\n\n{on['cpu']}, {on['cores']} cores, Python {on['python']}. Latencies in ms.\n"]
    parts += [reached(figures)]
    if "model" in figures:
        parts += ["## Limits\n", table(["alone", "images/s"], limits(figures))]
    parts += [cpu_costs(figures)]
    for name, heading in LOADS.items():
        if name in figures:
            parts += [f"## {heading}\n", loads(figures[name])]
    if "decode" in figures:
        parts += ["## CPU of decoding and resizing\n", decoding(figures["decode"])]
    if "bundled" in figures:
        parts += ["## The bundled model beside ResNet50\n", bundled(figures["bundled"])]
    if "bursts" in figures:
        parts += ["## Bursts of stress_test.py\n", bursts(figures["bursts"])]
    if "servers" in figures:
        one = figures["servers"]["1"]
        rows = [[count, rate, rate / one] for count, rate in figures["servers"].items()]
        parts += ["## Model servers of 20 ms a batch of one\n", table(["servers", "images/s", "ratio"], rows)]
    if "intake" in figures:
        parts += ["## Redis and one model server of 1 ms a batch\n", queues(figures["intake"])]
    if "scaling" in figures:
        parts += ["## Several model servers and cells\n", queues(figures["scaling"])]
    if "precision" in figures:
        parts += ["## Precision\n", precision(figures["precision"])]
    if "start" in figures:
        rows = [[name.removesuffix("_s").replace("_", " "), seconds] for name, seconds in figures["start"].items()]
        parts += ["## Start-up\n", table(["", "s"], rows)]
    return "\n".join(parts)


def limits(figures: Figures) -> list[list[Any]]:
    """Return the rows for the model alone and for decoding alone."""
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


def reached(figures: Figures) -> str:
    """Return the table of the targets whose parts were measured."""
    rows = [[*each, each.verdict] for each in targets.targets(figures) if not math.isnan(each.value)]
    return f"## Targets\n\n{table(['what', 'target', 'measured', ''], rows)}" if rows else ""


def cpu_costs(figures: Figures) -> str:
    """Return the table of the CPU of a request by program, for every load of the service, and for mosec."""
    rows: dict[str, Figures] = {}
    for part in LOADS:
        rows |= {f"{part}: {name}": row for name, row in figures.get(part, {}).items() if "cpu_ms" in row}
    costs = [
        [name, *(row["cpu_ms"].get(who, "") for who in PROGRAMS), sum(row["cpu_ms"].values())]
        for name, row in rows.items()
    ]
    head = ["ms of a request", *PROGRAMS, "all"]
    return f"## Where the CPU goes\n\n{table(head, costs)}" if costs else ""


def decoding(rows: Figures) -> str:
    """Return the table of the ms of CPU to decode and resize each image."""
    body = [
        [name, row["service_ms"], row["plain_ms"], row["service_ms"] / row["plain_ms"]] for name, row in rows.items()
    ]
    return table(["", "the service, ms", "plain Pillow, ms", "ratio"], body)


def loads(rows: Figures) -> str:
    """Return the table of closed-loop loads."""
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
    """Return the table that compares the bundled model with ResNet50; the last column is the ratio."""
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


def queues(rows: Figures) -> str:
    """Return the table of model servers that only sleep, of redis-benchmark, and of clients of the queue."""
    body = []
    for name, row in rows.items():
        sizes, cores, cost = (row.get(key, {}) for key in ("batches", "cores", "cpu_ms"))
        body.append([
            name, row["per_s"], sizes.get("mean", ""), cores.get("Redis", ""), cores.get("model server", ""),
            cost.get("Redis", ""), cost.get("model server", ""),
        ])  # fmt: skip
    head = ["", "images/s", "mean batch", "cores: Redis", "model servers", "ms an image: Redis", "model servers"]
    return table(head, body)


def precision(rows: Figures) -> str:
    """Return the table of number formats, with and without XLA."""
    head = ["", "images/s", "held-out digits recognized", "largest difference of a probability from float32"]
    body = [
        [name, row["per_s"], f"{row['right']:.2%}" if "right" in row else "", row.get("difference", "")]
        for name, row in rows.items()
    ]
    return table(head, body)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table; numbers have three significant digits."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
