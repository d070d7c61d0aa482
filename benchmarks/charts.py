"""The charts of bench.py's report."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from targets import PHOTO, Figures, serial_limit

mpl.use("Agg")
import matplotlib.pyplot as plt


def throughput(figures: Figures, path: Path) -> None:
    """Draw throughput against clients: the service, the limit of the cores, and the tutorial's design."""
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
    """Draw the CPU time of a request by program, for each load, beside what the limit allows."""
    axes: Any
    rows = {name: row for name, row in figures["resnet50"].items() if name.endswith(" 64") or name.startswith(PHOTO)}
    drawing, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    places = range(len(rows))
    done = [0.0] * len(rows)
    for who in ("model server", "web", "Apache", "Redis"):
        ms = [row["cpu_ms"][who] for row in rows.values()]
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
