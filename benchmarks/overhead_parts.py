"""The parts of bench.py that measure the service's overhead, without a real model or beside the tutorial's design."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Bench, Figures, batch_sizes
from redis import Redis
from system import (
    ROOT,
    Process,
    apache,
    application,
    cpu_seconds,
    directory,
    redis_server,
    running,
    service,
    service_in,
    wait_until,
)
from targets import PHOTO

HERE = ROOT / "benchmarks"
FIXED_SECONDS = 5.0  # of work for each fixed-cost server
FAST_GPU = {"MODEL_MS": "2", "BATCH_SIZE": "32"}  # a model as fast as a GPU: 16,000 images/s
FAST_JOBS = 8000


def tutorial(bench: Bench) -> None:
    """Measure a reconstruction of the tutorial's design."""
    with application(_wsgi("tutorial_web")) as root:
        (root / "run_model_server.py").symlink_to(HERE / "tutorial_server.py")
        with service_in(root, APACHE_DEFINES="WEB_PROCESSES=1 WEB_THREADS=10") as theirs:
            rows = {f"{PHOTO} x {clients}": bench.load_with_costs(theirs, PHOTO, clients) for clients in (1, 64)}
    bench.figures["tutorial"] = rows


def plumbing(bench: Bench) -> None:
    """Measure the service with a model that costs nothing, and decoding alone behind the same Apache."""
    model = bench.scratch / "costless.keras"
    subprocess.run([sys.executable, str(HERE / "costless.py"), str(model)], check=True, capture_output=True)
    rows: Figures = {}
    with (
        service(MODEL=str(model)) as ours,
        application(_wsgi("decode_only")) as root,
        directory() as logs,
        apache(root, logs / "apache") as url,
    ):
        # Alternate, because they are compared and the speed of a shared machine drifts within minutes.
        bench.figures["decode_ms"] = bench.prepare(PHOTO)["one_ms"]
        for name, clients in [(PHOTO, 1), *((name, 64) for name in bench.images), (PHOTO, 64)]:
            for row, figures in (
                (f"service, {name} x {clients}", bench.load_with_costs(ours, name, clients)),
                (f"decode only, {name} x {clients}", bench.load(url, name, clients)),
            ):
                rows[row] = max(rows.get(row, figures), figures, key=lambda each: each["per_s"])
    bench.figures["plumbing"] = rows


def _wsgi(module: str) -> str:
    """Return the text of a .wsgi file that serves the app of a module of this folder."""
    return f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom {module} import app as application\n"


def servers(bench: Bench) -> None:
    """Measure 1, 2, 4 and 8 fixed-cost model servers on a full queue, and one as fast as a GPU."""
    slow = {"MODEL_MS": "20", "BATCH_SIZE": "1"}
    bench.figures["servers"] = {
        str(count): _drain(bench, count, slow, int(count * FIXED_SECONDS / 0.02))["per_s"] for count in (1, 2, 4, 8)
    }
    bench.figures["fast server"] = _drain(bench, 1, FAST_GPU, FAST_JOBS)


def _drain(bench: Bench, count: int, model: dict[str, str], jobs: int) -> Figures:
    """Return images/s of fixed-cost servers, and the cores that each program used."""
    bench.show(f"{count} model servers of {model['MODEL_MS']} ms a batch")
    with (
        directory() as logs,
        redis_server(logs / "redis") as (redis, where),
        _fixed_cost_servers(count, logs, **where, **model) as processes,
    ):
        for process in processes:
            process.wait_for_log("* Joined the queue")
        _fill(redis, jobs)
        programs = {"model server": [each.popen.pid for each in processes]}
        programs["Redis"] = [redis.info("server")["process_id"]]
        before = {name: cpu_seconds(pids) for name, pids in programs.items()}
        begun = time.perf_counter()
        # First compare DBSIZE with the number of answers and heartbeats: counting the answers takes Redis' time.
        wait_until(lambda: redis.dbsize() == jobs + count and _answers(redis) == jobs, "all are answered", 120)
        took = time.perf_counter() - begun
        cores = {name: (cpu_seconds(pids) - before[name]) / took for name, pids in programs.items()}
        sizes = [size for process in processes for size in process.batches]
        return {"per_s": jobs / took, "cores": cores, "batches": batch_sizes(sizes)}


@contextmanager
def _fixed_cost_servers(count: int, logs: Path, **environment: str) -> Iterator[list[Process]]:
    """Run model servers whose model only sleeps."""
    command = [sys.executable, str(HERE / "fixed_cost_server.py")]
    with ExitStack() as stack:
        yield [stack.enter_context(running(command, logs / f"server-{n}", **environment)) for n in range(count)]


def _fill(redis: Redis, jobs: int) -> None:
    """Put jobs onto the queue, all at once."""
    pending = json.dumps({"image": "A" * 200_704, "deadline": time.time() + 600})
    with redis.pipeline(transaction=True) as together:
        for number in range(jobs):
            together.rpush("image_queue", f'{{"id": "job{number}", {pending[1:]}')
        together.execute()


def _answers(redis: Redis) -> int:
    """Return the number of answers in Redis."""
    return sum(1 for _ in redis.scan_iter("image_queue:result:*", count=10_000))
