"""Services to measure, and the CPU time and memory of their processes. Built on the tests' harness."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from harness import (
    AS_INSTALLED,
    ROOT,
    START_LIMIT,
    Missing,
    Process,
    Serve,
    answers,
    apache_of,
    command_line,
    descendants,
    free_port,
    need,
    resident_bytes,
    responds,
    run_apache,
    run_redis,
    run_serve,
    run_service,
    running,
    wait_until,
)

# Re-exported for the benchmark programs, so that only this file puts tests/ on the path.
__all__ = ["AS_INSTALLED", "ROOT", "START_LIMIT", "Missing", "Process", "Serve", "command_line", "descendants",
           "free_port", "need", "resident_bytes", "responds", "run_apache", "run_serve", "running",
           "wait_until"]  # fmt: skip

TICKS = os.sysconf("SC_CLK_TCK")  # of CPU time in a second
WEB_PROCESSES = max(2, os.cpu_count() or 1)  # as in bin/serve
WORKERS = 640
WEB = {"APACHE_DEFINES": f"WEB_PROCESSES={WEB_PROCESSES} WEB_THREADS={-(-WORKERS // WEB_PROCESSES)}"}


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory that every user can read, and remove it at the end."""
    path = Path(tempfile.mkdtemp(prefix="keras-rest-api-bench-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def redis_server(log: Path) -> Iterator[tuple[Redis, dict[str, str]]]:
    """Run a Redis; give a client, and the settings with its address."""
    port = free_port()
    with run_redis(log, port):
        client = Redis(port=port, socket_timeout=60)
        wait_until(lambda: answers(client), "Redis answers")
        yield client, {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(port)}


def apache(root: Path, log: Path, **settings: str) -> AbstractContextManager[str]:
    """Run the production site for the application in `root`; give its URL.

    `root` holds keras_rest_api_app.wsgi and links to this project's deploy and .venv: see application().
    """
    command = [str(root / "deploy/apache/run-private")]
    return run_apache(wait=True, log=log, command=command, page="/", **(WEB | settings))


@contextmanager
def application(wsgi: str) -> Iterator[Path]:
    """Make a root for apache() whose .wsgi file is the text `wsgi`."""
    with directory() as root:
        for name in ("deploy", ".venv"):
            (root / name).symlink_to(ROOT / name)
        (root / "keras_rest_api_app.wsgi").write_text(wsgi)
        yield root


@dataclass
class Measured:
    """A running service, and what its processes have used."""

    url: str
    server: Process
    redis: Redis

    def processes(self) -> dict[str, list[int]]:
        """Return the pids by program."""
        parents = [self.server.popen.pid, self.redis.info("server")["process_id"], apache_of(self.url)]
        found: dict[str, list[int]] = {}
        for pid in {each for parent in parents for each in (parent, *descendants(parent))}:
            found.setdefault(role(command_line(pid)), []).append(pid)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time used so far, by program."""
        return {name: cpu_seconds(pids) for name, pids in self.processes().items()}

    def peak_mb(self) -> dict[str, float]:
        """Return the peak resident memory, in MB, of the largest process of each program."""
        return {name: max(map(peak_mb, pids)) for name, pids in self.processes().items()}

    def resident_mb(self, name: str) -> float:
        """Return the resident memory of a program, in MB."""
        return sum(map(resident_bytes, self.processes()[name])) / 2**20

    def redis_bytes(self) -> int:
        """Return the bytes that Redis has received and sent."""
        stats = self.redis.info("stats")
        return int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])


@contextmanager
def service(**settings: str) -> Iterator[Measured]:
    """Run Redis, a model server and Apache, without bin/serve's supervisor, until ready."""
    with (
        directory() as logs,
        redis_server(logs / "redis") as (redis, where),
        run_service(logs, 1, IMAGE_QUEUE="image_queue", **(WEB | where | settings)) as ours,
    ):
        yield Measured(ours.url, ours.servers[0], redis)


@contextmanager
def service_in(root: Path, **settings: str) -> Iterator[Measured]:
    """Run the same, with run_model_server.py and keras_rest_api_app.wsgi from another folder."""
    with (
        directory() as logs,
        redis_server(logs / "redis") as (redis, where),
        running([sys.executable, str(root / "run_model_server.py")], logs / "server", **where) as server,
        apache(root, logs / "apache", **where, **settings) as url,
    ):
        server.wait_for_log("* Model loaded")
        yield Measured(url, server, redis)


def role(command: str) -> str:
    """Return the name of the program that a command line belongs to."""
    for mark, name in (
        ("run_model_server", "model server"),
        ("fixed_cost_server", "model server"),
        ("(wsgi:", "web"),
        ("redis-server", "Redis"),
        ("apache2", "Apache"),
        ("supervisord", "supervisor"),
    ):
        if mark in command:
            return name
    return "other"


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that processes have used; those that have ended count as 0."""
    seconds = 0.0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def peak_mb(pid: int) -> float:
    """Return the peak resident memory of a process in MB; 0 when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def child(script: str, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a script of this folder and return the figures that it prints last, as a line of JSON."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
