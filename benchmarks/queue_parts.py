"""The parts of bench.py that measure Redis and the model servers without the web and without a model's work."""

import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from measure import Bench, Figures, batch_sizes, middle
from redis import Redis
from system import (
    ROOT,
    Process,
    child,
    cpu_seconds,
    directory,
    need,
    redis_server,
    running,
    wait_until,
)

sys.path.insert(0, str(ROOT))

from image_queue import Job

QUEUE = "image_queue"
IMAGE = "A" * 200_704  # base64 of 224 x 224 pixels
CHUNK = 50  # jobs of a transaction that fills the queue
LIFETIME = 600  # seconds for a job
LIMIT = 300  # seconds to answer a full queue

# The model takes no time to speak of, so the server takes images as fast as it can.
FAST = {"MODEL_MS": "1", "BATCH_SIZE": "256"}
FAST_JOBS = 5000
TURNS = 3
CLIENTS = 64

ONE_AT_A_TIME = {"MODEL_MS": "20", "BATCH_SIZE": "1"}
ONE_SECONDS = 5.0

# One server computes 500 images/s: two batches of 16 at once, each 64 ms. Four ask for 2,000 images/s, which takes less
# than two cores, so that the queue is measured and not the cores. A model that takes 1 ms would need more than these.
SCALING = {"MODEL_MS": "64", "BATCH_SIZE": "16"}
SCALING_JOBS = 1500  # for each server: 3 seconds


@dataclass
class Cell:
    """A Redis with model servers of a fixed cost."""

    redis: Redis
    where: dict[str, str]  # settings with the address of Redis
    servers: list[Process]
    number: int = 0  # of jobs so far

    def fill(self, jobs: int) -> None:
        """Write jobs to a list beside the queue, with accepted markers, as the web does."""
        for first in range(0, jobs, CHUNK):
            with self.redis.pipeline(transaction=True) as together:
                for _ in range(min(CHUNK, jobs - first)):
                    self.number += 1
                    job = Job(f"job{self.number}", IMAGE, time.time() + LIFETIME)
                    together.rpush(f"{QUEUE}:filling", job.dump())
                    together.set(f"{QUEUE}:accepted:{job.id}", "", ex=LIFETIME)
                together.execute()

    def release(self) -> None:
        """Make the list the queue, so that the servers get all jobs at once."""
        self.redis.rename(f"{QUEUE}:filling", QUEUE)

    @property
    def answered(self) -> bool:
        """Whether all jobs are answered."""
        # Counting the answers takes Redis' time, so look at the queue first.
        return not self.redis.exists(QUEUE) and self._answers() == self.number

    def _answers(self) -> int:
        return sum(1 for _ in self.redis.scan_iter(f"{QUEUE}:result:*", count=10_000))

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time used so far, by program."""
        redis = self.redis.info("server")["process_id"]
        return {"model server": cpu_seconds(each.popen.pid for each in self.servers), "Redis": cpu_seconds([redis])}


@contextmanager
def cell(count: int, **model: str) -> Iterator[Cell]:
    """Run a Redis and `count` model servers whose model only sleeps."""
    command = [sys.executable, str(ROOT / "benchmarks/fixed_cost_server.py")]
    with directory() as logs, redis_server(logs / "redis") as (redis, where), ExitStack() as stack:
        started = [stack.enter_context(running(command, logs / f"server-{n}", **where, **model)) for n in range(count)]
        for process in started:
            process.wait_for_log("* Joined the queue")
        yield Cell(redis, where, started)


def drain(jobs: int, *cells: Cell) -> Figures:
    """Return images/s of cells that answer `jobs` each, and the CPU used, in cores and in ms an image, by program."""
    for each in cells:
        each.fill(jobs)
    before = [each.cpu_seconds() for each in cells]
    batches = [len(process.batches) for each in cells for process in each.servers]
    begun = time.perf_counter()
    for each in cells:
        each.release()
    wait_until(lambda: all(each.answered for each in cells), "all are answered", LIMIT)
    took = time.perf_counter() - begun
    after = [each.cpu_seconds() for each in cells]
    used = {name: sum(late[name] - early[name] for early, late in zip(before, after, strict=True)) for name in after[0]}
    logs = [process.batches for each in cells for process in each.servers]
    return {
        "per_s": jobs * len(cells) / took,
        "cores": {name: seconds / took for name, seconds in used.items()},
        "cpu_ms": {name: 1000 * seconds / jobs / len(cells) for name, seconds in used.items()},
        "batches": batch_sizes([size for log, old in zip(logs, batches, strict=True) for size in log[old:]]),
    }


def servers(bench: Bench) -> None:
    """Measure 1, 2, 4 and 8 model servers that take 20 ms for an image."""
    rows = {}
    for count in (1, 2, 4, 8):
        bench.show(f"{count} model servers, 20 ms an image")
        with cell(count, **ONE_AT_A_TIME) as queue:
            rows[str(count)] = drain(int(count * ONE_SECONDS / 0.02), queue)["per_s"]
    bench.figures["servers"] = rows


def intake(bench: Bench) -> None:
    """Measure how fast and at what cost one model server takes images from Redis, beside redis-benchmark."""
    drained, moved = [], []
    with cell(1, **FAST) as queue:
        drain(FAST_JOBS // 5, queue)  # warm-up
        for _ in range(TURNS):
            bench.show("a model server of 1 ms a batch")
            drained.append(drain(FAST_JOBS, queue))
            bench.show("redis-benchmark")
            moved.append({"per_s": _redis_benchmark(queue)})
        bench.show("clients of the queue")
        bench.figures["intake"] = {
            "server": middle(drained),
            "redis-benchmark": middle(moved),
            "clients": _whole_life(bench, queue),
        }


def _redis_benchmark(queue: Cell) -> float:
    """Return how many values of an image's size redis-benchmark moves from one list to another, per second.

    Redis does the same for each as for an image that is taken: it copies the value from list to list and sends it. Four
    connections keep Redis busy while the client reads. Pipelines of 16 are fastest: with longer ones, Redis has to
    enlarge its output buffers.
    """
    for _ in range(CHUNK):
        queue.redis.rpush("moved", IMAGE)
    program = next(filter(shutil.which, ("redis-benchmark", "valkey-benchmark")), "redis-benchmark")
    command = [need(program), "-p", queue.where["REDIS_PORT"], "-n", str(FAST_JOBS), "-c", "4", "-P", "16"]
    try:
        printed = subprocess.check_output([*command, "--csv", "LMOVE", "moved", "moved", "LEFT", "RIGHT"], text=True)
    finally:
        queue.redis.delete("moved")
    *_, row = csv.reader(printed.splitlines())
    return float(row[1])


def _whole_life(bench: Bench, queue: Cell) -> Figures:
    """Return the CPU in ms that an image takes by program, when clients push images and wait for their answers."""
    before = queue.cpu_seconds()
    figures = child("queue_clients.py", str(CLIENTS), str(bench.seconds), environment=queue.where)
    after = queue.cpu_seconds()
    return figures | {"cpu_ms": {name: 1000 * (after[name] - before[name]) / figures["images"] for name in after}}


def scaling(bench: Bench) -> None:
    """Measure 1, 2 and 4 model servers on one queue, with and without a limit of their own, and two cells."""
    rows: Figures = {}
    places = {"1 on one queue": [1], "2 on one queue": [2], "4 on one queue": [4], "2 cells of one": [1, 1]}
    for _ in range(2):  # by turns; the better one counts, since other programs only ever slow a server down
        for where, counts in places.items():
            bench.show(f"model servers, {where}")
            name = f"{where}, 2 ms an image"
            figures = _drain_new(counts, SCALING_JOBS * counts[0], SCALING)
            rows[name] = max(rows.get(name, figures), figures, key=lambda row: row["per_s"])
    for count in (1, 2, 4):
        bench.show(f"{count} model servers as fast as they can")
        rows[f"{count} on one queue, as fast as they can"] = _drain_new([count], FAST_JOBS, FAST)
    bench.figures["scaling"] = rows


def _drain_new(counts: list[int], jobs: int, model: dict[str, str]) -> Figures:
    """Return the figures of new cells with these numbers of servers that each answer `jobs`."""
    with ExitStack() as stack:
        return drain(jobs, *[stack.enter_context(cell(count, **model)) for count in counts])
