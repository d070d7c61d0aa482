"""One run of bench.py: its images, its figures, and the loads that every part uses."""

import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from system import Measured, child
from tqdm import tqdm

from images import image as file_of

ALONE_SECONDS = 8.0  # at most, for measuring decoding alone

Figures = dict[str, Any]


class Bench:
    """One run: the length of each load, and the figures so far."""

    def __init__(self, scratch: Path, seconds: float, progress: "tqdm[Any]") -> None:
        self.seconds = seconds
        self.scratch = scratch
        self.figures: Figures = {}
        self._progress = progress

    def show(self, what: str) -> None:
        """Show what is being measured now."""
        self._progress.set_description(what)
        self._progress.update()

    def leave_out(self, part: str, why: str) -> None:
        """Say that a part is left out."""
        self._progress.write(f"* {part} is left out: {why}", file=sys.stderr)

    def image(self, name: str) -> str:
        """Return the path of an image of images.py."""
        return str(file_of(name, self.scratch))

    def load(
        self, url: str, image: str, clients: int, seconds: float | None = None, models: tuple[str, ...] = ()
    ) -> Figures:
        """Return the throughput and latencies of clients in a closed loop, who ask these models in turn."""
        self.show(" ".join([f"{clients} clients, {image}", *models]))
        words = [url, self.image(image), str(clients), str(seconds or self.seconds), *models]
        return dict(child("closed_loop.py", *words))

    def load_with_costs(self, ours: Measured, image: str, clients: int, seconds: float | None = None) -> Figures:
        """Return the throughput and latencies of a load, and the CPU, memory, traffic and batches that it caused."""
        before, sent, batches = ours.cpu_seconds(), ours.redis_bytes(), len(ours.server.batches)
        begun = time.monotonic()
        figures = self.load(ours.url, image, clients, seconds)
        took = time.monotonic() - begun
        after = ours.cpu_seconds()
        used = {name: after[name] - before.get(name, 0.0) for name in sorted(after)}
        return figures | {
            "cores": {name: seconds / took for name, seconds in used.items()},
            "cpu_ms": {name: 1000 * seconds / figures["requests"] for name, seconds in used.items()},
            "peak_mb": ours.peak_mb(),
            "redis_mb_per_request": (ours.redis_bytes() - sent) / figures["requests"] / 1e6,
            "batches": batch_sizes(ours.server.batches[batches:]),
        }

    def prepare(self, name: str) -> Figures:
        """Return the speed of decoding and resizing an image, without the service."""
        self.show(f"decoding alone, {name}")
        return dict(child("alone.py", "prepare", self.image(name), str(min(self.seconds, ALONE_SECONDS))))

    def decode(self, name: str) -> Figures:
        """Return the ms of CPU to decode and resize an image, by the service's code and by plain Pillow."""
        self.show(f"CPU of decoding, {name}")
        return dict(child("alone.py", "decode", self.image(name), str(min(self.seconds, ALONE_SECONDS))))


def batch_sizes(sizes: list[int]) -> dict[str, Any]:
    """Return the mean, the largest and the most common of these batch sizes, and their number."""
    if not sizes:
        return {}
    common = Counter(sizes).most_common(3)
    return {"mean": sum(sizes) / len(sizes), "most": max(sizes), "count": len(sizes), "common": common}


def middle(rows: list[Figures], key: str = "per_s") -> Figures:
    """Return the row with the median of a figure."""
    return sorted(rows, key=lambda row: row[key])[len(rows) // 2]


def means(rows: list[Figures]) -> Figures:
    """Return the mean of each figure; all rows have the same ones."""
    return {name: fmean(row[name] for row in rows) for name in rows[0]}
