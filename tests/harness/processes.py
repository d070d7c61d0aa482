"""Start programs, wait for them and stop them; look processes up in /proc."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
START_LIMIT = 240  # seconds for a model server to start on a busy machine
# Hides the tests' own packages from programs under test: TensorFlow would import them and start more slowly.
AS_INSTALLED = {"PYTHONPATH": str(ROOT / "tests/as_installed")}


class Missing(Exception):
    """This machine lacks a program, a package or a privilege. The test is skipped; with CI=true it fails."""


def need(program: str) -> str:
    """Return the path of `program`. Raises Missing."""
    path = shutil.which(program, path=PATH)
    if path is None:
        raise Missing(f"{program} is not installed")
    return path


def free_port() -> int:
    """Return a free port outside the range that the system gives to outgoing connections."""
    first = 20_000 + 3_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # per worker
    for port in random.SystemRandom().sample(range(first, first + 3_000), 100):  # a test may have set random's seed
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among 100")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Return the first true value of `condition`. Raises TimeoutError, whose message says `what` was awaited."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


class Process:
    """A running program and its log."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log_path = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **AS_INSTALLED, "PATH": PATH, **environment},
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> str:
        """Return everything logged so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def batches(self) -> list[int]:
        """Return the sizes of the batches that a model server has logged so far."""
        return [int(size) for size in re.findall(r"\* Batch size: \((\d+),", self.log)]

    @property
    def alive(self) -> bool:
        """Whether it is still running."""
        return self.popen.poll() is None

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until `text` has been logged. Raises TimeoutError; RuntimeError if the program ends first."""
        wait_until(lambda: self.log.count(text) >= times or not self.alive, f"{text!r} in {self.log_path}", START_LIMIT)
        if self.log.count(text) < times:
            raise RuntimeError(f"{self.popen.args!r} ended before it logged {text!r}:\n{self.log}")

    def send(self, number: int) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return the exit code. Kills it after 60 seconds and raises subprocess.TimeoutExpired."""
        if self.alive:
            self.send(number)
        try:
            return self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(10)
            raise


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Process]:
    """Run a program until the block ends."""
    process = Process(command, log, **environment)
    try:
        yield process
    finally:
        process.send(signal.SIGCONT)  # a test may have frozen it
        process.stop()


def variables(pid: int) -> dict[str, str]:
    """Return the environment of a process; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def command_line(pid: int) -> str:
    """Return the command line of a process; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def pids() -> list[int]:
    """Return the pids of all processes on this machine."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def parent(pid: int) -> int:
    """Return the pid of the parent of `pid`; 0 when `pid` has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def descendants(pid: int) -> list[int]:
    """Return the pids of a process's children, of their children, and so on."""
    children: dict[int, list[int]] = {}
    for each in pids():
        children.setdefault(parent(each), []).append(each)
    found, new = [], [pid]
    while new:
        new = [child for each in new for child in children.get(each, [])]
        found += new
    return found


def has_ended(pid: int) -> bool:
    """Whether a process has ended and closed its files, though its parent may not have noticed yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def kill_at_once(pids: list[int]) -> None:
    """Kill processes as when their machine loses its power; return when they have ended."""
    for number in (signal.SIGSTOP, signal.SIGKILL):  # frozen first, so that none reports the end of another
        for pid in pids:
            os.kill(pid, number)
    wait_until(lambda: all(map(has_ended, pids)), "the processes have ended")


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process. Raises OSError when it has ended."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
