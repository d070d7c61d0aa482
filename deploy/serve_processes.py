"""The processes of bin/serve: asks and stops supervisor, which runs the programs, and ends whatever is left over."""

import ctypes
import http.client
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from xmlrpc.client import Error as RpcError
from xmlrpc.client import ServerProxy

from serve_redis import ENDING
from supervisor.xmlrpc import SupervisorTransport

import settings

KILL_LIMIT = 5  # seconds between SIGTERM and SIGKILL
UNREACHABLE = (OSError, RpcError, http.client.HTTPException)  # while supervisor does not answer
PR_SET_CHILD_SUBREAPER = 36
MODEL_SERVER = Path(__file__).with_name("supervisor") / "model-server.conf"


def control(directory: Path) -> Any:
    """Return supervisor's RPC interface. Its methods raise one of UNREACHABLE until supervisor opens its socket."""
    transport = SupervisorTransport(serverurl=f"unix://{directory}/supervisor.sock")
    proxy: Any = ServerProxy("http://127.0.0.1", transport=transport)
    return proxy.supervisor


def programs(directory: Path) -> list[dict[str, Any]]:
    """Return the state of each program; an empty list if supervisor does not answer."""
    try:
        return list(control(directory).getAllProcessInfo())
    except UNREACHABLE:
        return []


def given_up(directory: Path) -> list[str]:
    """Return the names of the programs that supervisor no longer restarts."""
    return [each["name"] for each in programs(directory) if is_given_up(each)]


def is_given_up(program: dict[str, Any]) -> bool:
    """Whether a program failed too often, or is a model server that ended by itself. supervisor restarts all others."""
    ended_by_itself = program["statename"] == "EXITED" and program["exitstatus"] in (0, 2)
    return program["statename"] == "FATAL" or (ended_by_itself and program["group"] == "model-server")


def write_model_servers(directory: Path, models: list[str]) -> None:
    """Write the part of supervisor's configuration that runs the servers of these models; [] if MODEL is served.

    The servers get the numbers of GPUs in turn; run_model_server.py starts again from the first GPU after the last.
    """
    template = MODEL_SERVER.read_text()
    programs = {f"model-server-{name}": f"--model {name}" for name in models} or {"model-server": ""}
    parts = [f"[group:model-server]\nprograms = {','.join(programs)}\npriority = 2\n"]
    for number, (name, options) in enumerate(programs.items()):
        part = template.replace("@PROGRAM@", name).replace("@OPTIONS@", options)
        parts.append(part.replace("@FIRST_GPU@", str(number * settings.MODEL_SERVERS)))
    (directory / "model-servers.conf").write_text("\n".join(parts))


def apache_is_up(directory: Path) -> bool:
    """Whether our Apache listens. It writes its pid file when it begins to."""
    return (directory / "apache.pid").exists()


def relay_log(log: IO[bytes]) -> None:
    """Print what the programs log."""
    for line in log:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def stop(supervisor: subprocess.Popen[bytes], directory: Path, limit: float) -> None:
    """End supervisor, which ends its programs one after the other. Kill it after `limit` seconds."""
    (directory / ENDING).touch()
    # supervisor stops Apache with SIGWINCH, which an Apache that is still starting ignores.
    apache = [each["pid"] for each in programs(directory) if each["name"] == "apache" and each["pid"]]
    starting = [] if apache_is_up(directory) else apache
    supervisor.terminate()
    for pid in starting:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    try:
        supervisor.wait(limit)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()


def become_subreaper() -> None:
    """Become the parent of every descendant whose own parent dies, so that we still find it at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_all() -> None:
    """End all our descendants. Return when none is left, or after twice KILL_LIMIT."""
    begun = time.monotonic()
    while left := descendants(os.getpid()):
        waited = time.monotonic() - begun
        if waited > 2 * KILL_LIMIT:  # the kernel can't end them
            break
        end(left, signal.SIGKILL if waited > KILL_LIMIT else signal.SIGTERM)
        time.sleep(0.1)


def end_orphans(supervisor: int) -> None:
    """Kill the orphans of dead programs. Otherwise the children of a killed Apache would keep its port."""
    end(descendants(os.getpid()) - descendants(supervisor) - {supervisor}, signal.SIGKILL)


def end(processes: set[int], number: int) -> None:
    """Send a signal to each process, and reap those of our children that have ended."""
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def descendants(parent: int) -> set[int]:
    """Return the children of a process, their children and so on."""
    parents = dict(filter(None, map(parent_of, Path("/proc").glob("[0-9]*"))))
    found: set[int] = set()
    while more := {pid for pid, its_parent in parents.items() if its_parent in found | {parent}} - found:
        found |= more
    return found


def parent_of(folder: Path) -> tuple[int, int] | None:
    """Return (process, parent) for a folder in /proc; None if the process has ended."""
    with suppress(OSError):
        # The parent is the second field after the name, which is in brackets and may contain any character.
        return int(folder.name), int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None
