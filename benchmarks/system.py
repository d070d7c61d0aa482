"""What the benchmarks run on: services of their own on free ports, and what their processes cost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT = 600.0  # seconds
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
TICKS = os.sysconf("SC_CLK_TCK")  # of CPU time, in a second
WEB_PROCESSES = max(2, os.cpu_count() or 1)  # as bin/serve has it
WORKERS = 640
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_port() -> int:
    """Return a port that nothing has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, limit: float = START_LIMIT) -> None:
    """Return when `condition` holds; end the program with one line when it does not within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"not within {limit:.0f} s: {what}")
        time.sleep(0.02)


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, its output to the end of `log`, until the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


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
def redis_server(log: Path) -> Iterator[Redis]:
    """Run a Redis as bin/serve does; give a client of it."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    client = Redis(port=port, socket_timeout=60)
    with running(command, {**os.environ, "PATH": PATH}, log):
        wait_until(lambda: answers(client), "Redis answers", 30)
        yield client


def answers(client: Redis) -> bool:
    """Whether this Redis is there."""
    try:
        return bool(client.ping())
    except RedisError:
        return False


@contextmanager
def apache(root: Path, environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """Run the production site for the application in `root`; give its URL.

    `root` holds keras_rest_api_app.wsgi, and links to this project's deploy and .venv where it is not this project.
    """
    port = free_port()
    defines = f"WEB_PROCESSES={WEB_PROCESSES} WEB_THREADS={-(-WORKERS // WEB_PROCESSES)}"
    with directory() as run:
        options = {"APACHE_DEFINES": defines} | dict(environment) | {"RUN_DIR": str(run), "APP_PORT": str(port)}
        url = f"http://127.0.0.1:{port}"
        with running([str(root / "deploy/apache/run-private")], options, log):
            wait_until(lambda: responds(f"{url}/"), f"Apache answers; see {log}", 60)
            yield url


@contextmanager
def application(wsgi: str) -> Iterator[Path]:
    """Make a root for apache() whose .wsgi file is the text `wsgi`."""
    with directory() as root:
        for name in ("deploy", ".venv"):
            (root / name).symlink_to(ROOT / name)
        (root / "keras_rest_api_app.wsgi").write_text(wsgi)
        yield root


def responds(url: str) -> bool:
    """Whether a page can be had."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310 - an address of ours
        return True
    return False


@dataclass
class Service:
    """A service that runs: where it is, the log of its model server, its Redis, and the pids of its processes."""

    url: str
    log: Path
    redis: Redis
    pids: list[int]

    def processes(self) -> dict[str, list[int]]:
        """Return the pids of the processes, by what they are for."""
        found: dict[str, list[int]] = {}
        for pid in {each for parent in self.pids for each in (parent, *descendants(parent))}:
            with suppress(OSError):
                found.setdefault(role(command_line(pid)), []).append(pid)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time used so far, by what it was for."""
        return {name: sum(map(cpu_seconds, pids)) for name, pids in self.processes().items()}

    def peak_mb(self) -> dict[str, float]:
        """Return the most memory that a process of each kind has had resident, in MB."""
        return {name: max(map(peak_mb, pids)) for name, pids in self.processes().items()}

    def resident_mb(self, name: str) -> float:
        """Return the resident memory of the processes for `name`, in MB."""
        return sum(map(resident_mb, self.processes()[name]))

    def redis_bytes(self) -> int:
        """Return the bytes that Redis has received and sent."""
        stats = self.redis.info("stats")
        return int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])


@contextmanager
def service(model: Mapping[str, str], *, servers: int = 1, root: Path = ROOT, **settings: str) -> Iterator[Service]:
    """Run Redis, model servers and Apache with settings of one's own, without bin/serve's supervisor.

    `model` says which model (MODEL, MODEL_WEIGHTS, ...). With another `root` it is the service of that folder, its
    model server at run_model_server.py, ready when that logs "* Model loaded".
    """
    with directory() as logs, redis_server(logs / "redis") as redis:
        environment = {**os.environ, **model, **settings, "PYTHONUNBUFFERED": "1"}
        environment |= {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis.connection_pool.connection_kwargs["port"])}
        log = logs / "model-server"
        log.touch()
        script = str(root / "run_model_server.py")
        with (
            apache(root, environment, logs / "apache") as url,
            _all(servers, [sys.executable, script], environment, log) as pids,
        ):
            wait_until(lambda: log.read_text().count("* Model loaded") == servers, f"the model is loaded; see {log}")
            if root == ROOT:
                wait_until(lambda: responds(f"{url}/readyz"), "the service is ready")
            redis_pid = redis.info("server")["process_id"]
            yield Service(url, log, redis, [*pids, redis_pid, _apache_pid(url)])


@contextmanager
def _all(count: int, command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[list[int]]:
    if not count:
        yield []
        return
    with running(command, environment, log) as process, _all(count - 1, command, environment, log) as others:
        yield [process.pid, *others]


def _apache_pid(url: str) -> int:
    port = url.rpartition(":")[2]
    for pid in descendants(os.getpid()):
        if f"APP_PORT {port}" in command_line(pid):
            return pid
    raise LookupError(f"no Apache on port {port}")


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, new = [], [pid]
    while new:
        new = [child for each in new for child in parents.get(each, [])]
        found += new
    return found


def command_line(pid: int) -> str:
    """Return the words of a process' command; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def role(command: str) -> str:
    """Return what a process is for, by its command line."""
    for mark, name in (
        ("run_model_server", "model server"),
        ("(wsgi:", "web"),
        ("redis-server", "Redis"),
        ("apache2", "Apache"),
        ("supervisord", "supervisor"),
    ):
        if mark in command:
            return name
    return "other"


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used; nothing when it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process. Raises OSError when it has ended."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has had resident; nothing when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def child(script: str, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a script of this folder and return the JSON that it prints at the end: figures by name."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
