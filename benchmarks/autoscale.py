"""Simulate KEDA's autoscaling of model servers on a real queue, under a load that doubles for ten minutes.

    .venv/bin/python benchmarks/autoscale.py                        each metric in turn, 9 minutes
    .venv/bin/python benchmarks/autoscale.py --metric pending --target 6 --down-window 300 --rows

Redis, the queue and the model servers are real; the model only sleeps. A replica answers 5 images/s: two batches of 4
at once, each 1.6 s. It takes 30 s to load. 14 images/s arrive for 2 minutes, 28 for 10 minutes, then 14 again for 8.
A request may wait 60 s and the queue may hold 1,000 images, the service's defaults. The autoscaler decides every 15 s
and sees figures that are 15 s old, like those that Prometheus scrapes. All times are divided by --scale, so that the
20 minutes take 4; the times that are printed are multiplied by it again.

The metrics: `pending` is keras_rest_api_images_pending, `queue` the length of the Redis list, as KEDA's own scaler for
Redis reads it. A swing is a change of direction of the number of replicas, except the one from their first rise to a
fall.
"""

import argparse
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from autoscale_rule import Autoscaler, Rule
from system import ROOT, Process, directory, redis_server

sys.path.insert(0, str(ROOT))

import numpy as np

import settings
from helpers import ServiceError, base64_encode_image
from image_queue import ImageQueue, WebQueue

BATCH, BATCH_SECONDS, LOAD_SECONDS = 4, 1.6, 30.0
BASE = 14.0  # images/s
Phases = tuple[tuple[float, float], ...]  # seconds, times BASE
PHASES: Phases = ((120.0, 1), (600.0, 2), (480.0, 1))
RECOMMENDED = Rule(target=1.5 * BATCH, up_period=60.0)
OPTIONS = {
    "target": "for each replica",
    "down_window": "seconds",
    "up_period": "seconds",
    "up_pods": "added in that period",
    "up_percent": "or this share",
}
SIDE = 32  # pixels: small images, since neither the network nor memory is measured here
MOST_WAITING = 3000  # threads


@dataclass
class Run:
    """What happened. Times are in simulated seconds."""

    rows: list[tuple[float, float, int, int, int]] = field(default_factory=list)  # time, rate, queue, pending, replicas
    waits: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def replicas(self) -> list[int]:
        """The number of replicas at each decision."""
        return [row[-1] for row in self.rows]

    def swings(self) -> int:
        """Return how often the replicas changed direction, beyond once: they have to rise and fall with the load."""
        rises = [late > early for early, late in pairwise(self.replicas) if late != early]
        return max(0, sum(late != early for early, late in pairwise(rises)) - 1)

    def line(self, name: str, target: float) -> str:
        """Return the row of the table."""
        waits, lost = sorted(self.waits), sum(self.failures.values())
        hours = sum(self.replicas) / len(self.replicas)
        why = f" ({', '.join(f'{n} {code}' for code, n in self.failures.items())})" if lost else ""
        p99 = waits[int(len(waits) * 0.99)]
        return (f"| {name} | {target:g} | {len(waits) + lost} | {lost}{why} | {waits[-1]:.0f} s | {p99:.0f} s "
                f"| {min(self.replicas)} to {max(self.replicas)} | {hours:.1f} | {self.swings()} |")  # fmt: skip


HEAD = """| metric | target | requests | lost | longest | p99 | replicas | on average | swings |
|---|---|---|---|---|---|---|---|---|"""


class Fleet:
    """The model servers: starts new ones, and stops the newest."""

    def __init__(self, logs: Path, scale: float, where: dict[str, str]) -> None:
        model = {"MODEL_MS": f"{1000 * BATCH_SECONDS / scale}", "BATCH_SIZE": str(BATCH)}
        self._environment = where | model | {"IMAGE_WIDTH": str(SIDE), "IMAGE_HEIGHT": str(SIDE), "MODEL": ""}
        self._logs, self._load = logs, LOAD_SECONDS / scale
        self._servers: list[Process] = []
        self._leaving: list[Process] = []
        self._started = 0

    def resize(self, count: int, load: float | None = None) -> None:
        """Start or stop servers until `count` are left; new ones load for `load` seconds."""
        while len(self._servers) > count:
            self._leaving.append(self._servers.pop())
            self._leaving[-1].send(15)
        while len(self._servers) < count:
            self._started += 1
            loaded = time.time() + (self._load if load is None else load)
            command = [sys.executable, str(ROOT / "benchmarks/fixed_cost_server.py")]
            log = self._logs / f"server-{self._started}"
            self._servers.append(Process(command, log, LOADED_AT=str(loaded), **self._environment))

    def wait(self) -> None:
        """Wait until all have joined the queue."""
        for each in self._servers:
            each.wait_for_log("* Joined the queue")

    def stop(self) -> None:
        """Stop all."""
        self.resize(0)
        for each in self._leaving:
            each.stop()


class Load:
    """Sends images at the rate of the current phase, without waiting for the answers."""

    def __init__(self, run: Run, scale: float, phases: Phases) -> None:
        self.run, self.scale, self.phases = run, scale, phases
        self.queue = WebQueue()
        self._image = base64_encode_image(np.zeros((SIDE, SIDE, 3), np.uint8))
        self._lock = threading.Lock()

    def send(self, begun: float) -> None:
        """Send everything, then wait for the last answer."""
        with ThreadPoolExecutor(MOST_WAITING) as pool:
            for due in arrivals(self.phases):
                time.sleep(max(0.0, begun + due / self.scale - time.monotonic()))
                pool.submit(self._ask)

    def _ask(self) -> None:
        asked, failure = time.monotonic(), ""
        try:
            answer = self.queue.ask(self._image, time.time() + settings.REQUEST_TIMEOUT)
            failure = answer.get("error", {}).get("code", "")
        except ServiceError as error:
            failure = error.code
        with self._lock:
            if failure:
                self.run.failures[failure] += 1
            else:
                self.run.waits.append((time.monotonic() - asked) * self.scale)


def rate_at(now: float, phases: Phases) -> float:
    """Return the images/s that arrive at a time; 0 after the end."""
    for seconds, times in phases:
        if now < seconds:
            return BASE * times
        now -= seconds
    return 0.0


def arrivals(phases: Phases) -> Iterator[float]:
    """Yield when each image arrives: at random, as from many independent clients."""
    rng, now = np.random.default_rng(5), 0.0
    while rate := rate_at(now, phases):
        yield now
        now += rng.exponential(1 / rate)


def simulate(rule: Rule, metric: str, scale: float, phases: Phases = PHASES) -> Run:
    """Return what happens under this rule with the metric `pending` or `queue`."""
    run = Run()
    with directory() as logs, redis_server(logs / "redis") as (_, where):
        use(where, scale)
        fleet, replicas = Fleet(logs, scale, where), math.ceil(BASE * BATCH_SECONDS / BATCH / 2 / 0.75)
        try:
            fleet.resize(replicas, 0)
            fleet.wait()
            load, autoscaler, queue = Load(run, scale, phases), Autoscaler(rule), ImageQueue()
            begun = time.monotonic()
            sender = threading.Thread(target=load.send, args=[begun])
            sender.start()
            while rate := rate_at(now := (time.monotonic() - begun) * scale, phases):
                length, pending = queue.waiting(), queue.pending_by_queue([queue.key])[queue.key]
                run.rows.append((now, rate, length, pending, replicas))
                _, _, *seen, _ = run.rows[max(0, len(run.rows) - 2)]
                replicas = autoscaler.decide(now, replicas, seen[metric == "pending"])
                fleet.resize(replicas)
                time.sleep(rule.every / scale)
            sender.join()
        finally:
            fleet.stop()
    return run


def use(where: dict[str, str], scale: float) -> None:
    """Let this process use the Redis at `where`, and the default limits divided by `scale`."""
    settings.REDIS_HOST, settings.REDIS_PORT = where["REDIS_HOST"], int(where["REDIS_PORT"])
    settings.REQUEST_TIMEOUT, settings.REDIS_TIMEOUT = 60 / scale, 30 / scale


def main() -> None:
    """Simulate each metric, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric", choices=("pending", "queue"), action="append", help="default: each in turn")
    for name, meaning in OPTIONS.items():
        default = getattr(RECOMMENDED, name)
        option, text = f"--{name.replace('_', '-')}", f"{meaning} (default: %(default)s)"
        parser.add_argument(option, type=type(default), default=default, help=text)
    parser.add_argument("--scale", type=float, default=5, help="divide all times by this (default: %(default)s)")
    parser.add_argument("--rows", action="store_true", help="print what the autoscaler saw each time")
    given = parser.parse_args()
    rule = replace(RECOMMENDED, **{name: getattr(given, name) for name in OPTIONS})
    lines: list[str] = []
    for metric in given.metric or ("pending", "queue"):
        run = simulate(rule, metric, given.scale)
        if given.rows:
            print("time, images/s, queue, pending, replicas")
            print("\n".join(f"{now:5.0f} {rate:3.0f} {a:5} {b:5} {n:3}" for now, rate, a, b, n in run.rows))
        lines.append(run.line(metric, rule.target))
    print("\n".join([HEAD, *lines]))
    print(f"\n{rule}, times divided by {given.scale:g}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
