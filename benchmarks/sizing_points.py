"""Measure the costs of an image on this machine, and check sizing.py's arithmetic against measured points.

    .venv/bin/python benchmarks/sizing_points.py            6 minutes; prints the costs and a table
    .venv/bin/python benchmarks/sizing_points.py --write    also writes the costs to benchmarks/costs.json

The points are 1 to 8 model servers on one Redis, and 1 to 4 cells, with a model that only sleeps; one server whose
model takes no time; and the whole service with two pictures at once. In the last two, the cores are the limit. All
programs and the clients run on this machine's cores. Only the CPU of the clients is taken from the point itself, since
a service does not have them; the costs come from other loads than the points. Run it on a machine that does nothing
else.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from bench import machine
from measure import Bench, Figures
from queue_parts import Cell, cell
from sizing import COSTS, Costs, capacity
from system import ROOT, WEB, Measured, child, directory, redis_server, responds, run_apache, running, wait_until
from tqdm import tqdm

PICTURES = ("jpeg-90kB", "png-432kB")
CLIENTS = 32  # for each model server: its two batches, and as many images that wait
SLEEPS = {"MODEL_MS": "160", "BATCH_SIZE": "8"}  # 100 images/s: two batches of 8 at once
MODEL_RATE = 100.0
LARGE = {"MODEL_MS": "40", "BATCH_SIZE": "32"}  # 1,600 images/s
FAST = {"MODEL_MS": "1", "BATCH_SIZE": "64"}
UNLIMITED = 1e9
WEB_CLIENTS = 64
MOST_CLIENTS = 64  # threads of a process of clients
IMPORTS = 2.0  # seconds that such a process may take to start
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Point:
    """Cells with the same number of model servers each."""

    cells: int
    servers: int
    model: dict[str, str]
    limit: float  # images/s that its models compute
    clients: int  # for each model server

    @property
    def name(self) -> str:
        """What it is called in the table."""
        of = f"{self.cells} cell{'s' * (self.cells > 1)} of {self.servers} model server{'s' * (self.servers > 1)}"
        return of + (", as fast as they can" if self.model is FAST else "")


def sleeping(cells: int, servers: int) -> Point:
    """Return a point with models of 100 images/s each."""
    return Point(cells, servers, SLEEPS, cells * servers * MODEL_RATE, CLIENTS)


POINTS = (*(sleeping(1, servers) for servers in (1, 2, 4, 8)), *(sleeping(cells, 2) for cells in (2, 3, 4)),
          Point(1, 1, FAST, UNLIMITED, 4 * CLIENTS))  # fmt: skip
COST_POINTS = (sleeping(1, 3), Point(1, 1, LARGE, 16 * MODEL_RATE, 4 * CLIENTS))


def measure(point: Point, seconds: float) -> Figures:
    """Return the images/s of a point, the mean batch, the bytes of a job, and the CPU of an image in ms by program."""
    with ExitStack() as stack:
        cells = [stack.enter_context(cell(point.servers, **point.model)) for _ in range(point.cells)]
        before = totals(cells)
        figures = load(cells, point.clients * point.servers, seconds)
        after = totals(cells)
        batch = fmean(size for each in cells for server in each.servers for size in server.batches)
    images = sum(each["images"] for each in figures)
    used = {name: (after[name] - before[name]) / images for name in after}
    job_bytes = used.pop("bytes")
    cpu_ms = {name: 1000 * seconds for name, seconds in used.items()}
    cpu_ms["clients"] = sum(each["client_ms"] * each["images"] for each in figures) / images
    return {"per_s": sum(each["per_s"] for each in figures), "cpu_ms": cpu_ms, "job_bytes": job_bytes, "batch": batch}


def load(cells: list[Cell], clients: int, seconds: float) -> list[Figures]:
    """Let so many clients use each cell, in processes of MOST_CLIENTS or fewer that start together; return figures."""
    each = -(-clients // -(-clients // MOST_CLIENTS))
    places = [place.where for place in cells for _ in range(0, clients, each)]
    words = (str(each), str(seconds), str(time.time() + IMPORTS * len(places)))
    with ThreadPoolExecutor(len(places)) as pool:
        loads = [pool.submit(child, "queue_clients.py", *words, environment=where) for where in places]
        return [load.result() for load in loads]


def totals(cells: list[Cell]) -> dict[str, float]:
    """Return the CPU seconds of all cells by program, and the bytes that their Redis servers have received."""
    used = [each.cpu_seconds() for each in cells]
    bytes_in = sum(int(each.redis.info("stats")["total_net_input_bytes"]) for each in cells)
    return {name: sum(each[name] for each in used) for name in used[0]} | {"bytes": bytes_in}


@contextmanager
def whole_service() -> Iterator[Measured]:
    """Run Redis, Apache and a model server whose model only sleeps, for 20 ms."""
    command = [sys.executable, str(ROOT / "benchmarks/fixed_cost_server.py")]
    with (
        directory() as logs,
        redis_server(logs / "redis") as (redis, where),
        running(command, logs / "server", MODEL_MS="20", BATCH_SIZE="32", **where) as server,
        run_apache(wait=True, log=logs / "apache", **WEB, **where) as url,
    ):
        server.wait_for_log("* Joined the queue")
        wait_until(lambda: responds(url, "/readyz"), "the service is ready")
        yield Measured(url, server, redis)


def web_costs(bench: Bench, service: Measured) -> tuple[dict[str, float], dict[str, float]]:
    """Return the CPU in ms of the web and Apache for each picture, and the sizes of the files."""
    web, sizes = {}, {}
    for picture in PICTURES:
        used = bench.load_with_costs(service, picture, WEB_CLIENTS)["cpu_ms"]
        web[picture] = round(used["web"] + used["Apache"], 2)
        sizes[picture] = float(Path(bench.image(picture)).stat().st_size)
    return web, sizes


def queue_loads(bench: Bench) -> list[Figures]:
    """Return the figures of small batches on a Redis with little to do, and of large ones on a busy Redis."""
    bench.show("the costs of an image in Redis and the model servers")
    return [measure(point, bench.seconds) for point in COST_POINTS]


def queue_costs(loads: list[list[Figures]]) -> dict[str, float]:
    """Return the costs of an image that do not depend on the picture, from several results of queue_loads()."""
    small, large = [[median(each[n]["cpu_ms"][name] for each in loads) for name in ("Redis", "model server")]
                    for n in (0, 1)]  # fmt: skip
    shares = [1 / fmean(each[n]["batch"] for each in loads) for n in (0, 1)]  # of a batch that an image has
    batch_ms = (small[1] - large[1]) / (shares[0] - shares[1])
    return {
        "redis_ms": round((small[0] + large[0]) / 2, 3),
        "model_server_ms": round(small[1] - batch_ms * shares[0], 3),
        "batch_ms": round(batch_ms, 2),
        "job_bytes": round(fmean(each["job_bytes"] for pair in loads for each in pair)),
    }


def mixed(bench: Bench, service: Measured) -> tuple[dict[str, float], Figures]:
    """Let half of the clients post each picture; return the share of each picture, and the figures of a point."""
    bench.show("two pictures at once")
    before, batches = service.cpu_seconds(), len(service.server.batches)
    with ThreadPoolExecutor(len(PICTURES)) as pool:
        loads = [pool.submit(bench.load, service.url, picture, WEB_CLIENTS // 2) for picture in PICTURES]
        figures = [each.result() for each in loads]
    used = {name: after - before[name] for name, after in service.cpu_seconds().items()}
    images = sum(each["requests"] for each in figures)
    cpu_ms = {name: 1000 * seconds / images for name, seconds in used.items()}
    cpu_ms["web"] += cpu_ms.pop("Apache")
    cpu_ms["clients"] = sum(each["client_ms"] * each["requests"] for each in figures) / images
    shares = {picture: each["requests"] / images for picture, each in zip(PICTURES, figures, strict=True)}
    batch = fmean(service.server.batches[batches:])
    return shares, {"per_s": sum(each["per_s"] for each in figures), "cpu_ms": cpu_ms, "batch": batch}


def checked(name: str, limit: float, costs: Costs, measured: Figures, web_ms: float = 0.0) -> str:
    """Return the row of a point: its images/s and the cores that each program uses, predicted and measured.

    `limit` has the images/s that its models compute.
    """
    of_clients = measured["cpu_ms"]["clients"]
    of_programs = {"Redis": costs.redis_ms, "model server": costs.taking_ms(measured["batch"]), "web": web_ms}
    predicted = capacity(of_programs | {"clients": of_clients}, limit, CORES)
    cells = [compared(predicted, measured["per_s"])]
    for program, ms in of_programs.items():
        cores = measured["per_s"] * measured["cpu_ms"].get(program, 0.0) / 1000
        cells.append(compared(predicted * ms / 1000, cores) if cores else "")
    return f"| {' | '.join([name, *cells])} |"


def compared(predicted: float, measured: float) -> str:
    """Return both figures, and by how much the measured one differs."""
    digits = 0 if predicted >= 10 else 2
    return f"{predicted:,.{digits}f}, {measured:,.{digits}f} ({measured / predicted - 1:+.0%})"


def measure_all(bench: Bench) -> tuple[Costs, list[str]]:
    """Return the costs of an image, and the rows of the table."""
    with whole_service() as service:
        web, sizes = web_costs(bench, service)
        shares, mix = mixed(bench, service)
    loads, measured = [queue_loads(bench)], []
    for number, point in enumerate(POINTS, 1):
        bench.show(point.name)
        measured.append(measure(point, bench.seconds))
        if number in (len(POINTS) // 2, len(POINTS)):  # the speed of a machine drifts
            loads.append(queue_loads(bench))
    costs = Costs(web, sizes, **queue_costs(loads))
    rows = [checked(point.name, point.limit, costs, each) for point, each in zip(POINTS, measured, strict=True)]
    web_ms = sum(share * web[picture] for picture, share in shares.items())
    return costs, [*rows, checked("the whole service, two pictures", UNLIMITED, costs, mix, web_ms)]


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="length of each load (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the costs to benchmarks/costs.json")
    given = parser.parse_args()
    with directory() as scratch, tqdm(unit=" measured", disable=not sys.stderr.isatty()) as progress:
        costs, rows = measure_all(Bench(scratch, given.seconds, progress))
    where = {"machine": f"{CORES} cores, {machine()['cpu']}", "measured": time.strftime("%Y-%m-%d")}
    text = json.dumps(where | asdict(costs), indent=2) + "\n"
    if given.write:
        COSTS.write_text(text)
    print(text)
    heads = ("point", "images/s: predicted, measured", "cores of Redis", "cores of model servers", "cores of the web")
    print("\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]))


if __name__ == "__main__":
    main()
