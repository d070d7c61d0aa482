"""What bin/serve runs once everything is installed: Redis if need be, the model server and a private Apache.

supervisor runs them and starts again what dies; everything they write goes to a directory that is removed at the end.

To stop, Apache answers what is in flight (DRAIN_LIMIT at most), then the model servers finish their batches (60 seconds
at most), then Redis ends. What has not ended by then is killed, so that no process is left after
STOP_LIMIT and a few seconds, whatever hangs.
"""

import ctypes
import http.client
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn
from xmlrpc.client import Error as RpcError
from xmlrpc.client import ServerProxy

from supervisor.xmlrpc import SupervisorTransport

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))
if __name__ == "__main__":  # until everything is imported there is nothing to stop
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import default_model  # noqa: E402
import serve_redis  # noqa: E402

import settings  # noqa: E402
from helpers import StartupError, available_cores  # noqa: E402
from model_server import model_checks  # noqa: E402

WORKERS = 640  # requests in flight, in all web processes together
SUPERVISOR = str(APP_ROOT / "deploy/supervisor/supervisord.conf")
# Not Apache's www-data: the web may not send signals to Redis, nor look into it.
AS_NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups --no-new-privs"
ASK_LIMIT = 5  # seconds that supervisor may take to answer
UNREACHABLE = (OSError, RpcError, http.client.HTTPException)
START_LIMIT = 600  # seconds: the largest models take a minute or two
PORT_LIMIT = 3  # seconds that another Apache gets to give PORT free
DRAIN_LIMIT = 30  # seconds at most that requests in flight get to be answered
STOP_LIMIT = DRAIN_LIMIT + 60 + 2 + 3  # seconds: the stopwaitsecs of supervisord.conf, one after the other
KILL_LIMIT = 5  # seconds between SIGTERM and SIGKILL for what supervisor has left
PR_SET_CHILD_SUBREAPER = 36
TOLD = threading.Event()  # that we are to end


def main() -> None:
    """Start everything, say when it is ready, and run until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    socket.setdefaulttimeout(ASK_LIMIT)
    become_subreaper()
    port = free_port()
    check_model()
    own_redis = not serve_redis.redis_answers()
    environment = {
        **os.environ,
        **whole_paths(),
        "APP_ROOT": str(APP_ROOT),
        "APP_PORT": str(port),
        "APACHE_DEFINES": apache_sizes(),
        "CORS_ORIGINS": settings.CORS_ORIGINS,
        "REDIS_PORT": str(settings.REDIS_PORT),
        "OWN_REDIS": str(own_redis).lower(),
        "DRAIN_SECONDS": str(math.ceil(min(DRAIN_LIMIT, settings.REQUEST_TIMEOUT + 1))),
        "MODEL_SERVERS": str(settings.MODEL_SERVERS),
        "AS_NOBODY": AS_NOBODY if os.geteuid() == 0 else "",
    }
    if not environment.get("MODEL"):
        environment["MODEL"] = default_model.choose()
    with run_directory() as directory, supervised(environment, directory) as supervisor:
        if own_redis:
            wait_for_own_redis(directory, supervisor)
        start_programs(directory, supervisor)
        wait_until_ready(port, directory, supervisor)
        announce(port)
        watch(directory, supervisor)


def tell(*_: object) -> None:
    """End the program. Python drops the exception where it is raised in a destructor, so it is noted, too."""
    TOLD.set()
    sys.exit(0)


def become_subreaper() -> None:
    """Let the kernel hand us, instead of init, every process whose parent dies, so that none escapes at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def free_port() -> int:
    """Return PORT, which nothing listens on. Waits PORT_LIMIT for an Apache that may be ending. Raises StartupError."""
    port = settings.PORT
    deadline = time.monotonic() + PORT_LIMIT
    while not bindable(port):
        if time.monotonic() > deadline:
            raise StartupError(f"port {port} is taken: choose another, as in PORT={port % 65535 + 1} bin/serve.")
        time.sleep(0.1)
    return port


def bindable(port: int) -> bool:
    """Whether nothing listens on the port. Raises StartupError where this user may not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise StartupError(
                f"port {port} is for root only: choose one above 1023, as in PORT=8080 bin/serve."
            ) from None
        except OSError:
            return False
    return True


def whole_paths() -> dict[str, str]:
    """Return the settings that name a file of the folder that bin/serve was started in, which its programs are not."""
    named = {name: Path(os.environ.get(name, "")) for name in ("MODEL", "MODEL_WEIGHTS", "LABELS")}
    return {name: str(path.resolve()) for name, path in named.items() if path.is_file()}


def check_model() -> None:
    """Raise StartupError where MODEL, or a file that goes with it, can't be right, before anything is started."""
    for name, path in whole_paths().items():
        setattr(settings, name, path)
    with chdir(APP_ROOT):  # where the model server looks for what is not in this folder
        model_checks.check()


def apache_sizes() -> str:
    """Return the definitions that fit the site to this machine and these settings."""
    processes = max(2, available_cores())
    threads = -(-WORKERS // processes)
    return f"WEB_PROCESSES={processes} WEB_THREADS={threads} MAX_UPLOAD_BYTES={settings.MAX_UPLOAD_BYTES}"


@contextmanager
def run_directory() -> Iterator[Path]:
    """Make the directory for sockets and logs, and remove it at the end."""
    directory = Path(tempfile.mkdtemp(prefix="keras-rest-api-"))
    directory.chmod(0o755)  # for Redis and Apache, which are other users where root starts them
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def supervised(environment: dict[str, str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run supervisor with, at first, Redis if need be; stop it and all that it runs at the end, whatever happened."""
    serve_redis.write_configuration(directory)
    # The signal of setpriv ends it if we are killed.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "supervisor.supervisord", "-c", SUPERVISOR],
        env=environment | {"RUN_DIR": str(directory)},
        cwd=APP_ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches it through us only
    )
    relay = threading.Thread(target=relay_log, args=[process.stdout], daemon=True)
    relay.start()
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("* Stopping", flush=True)
        stop(process, directory)
        end_the_rest()
        relay.join(1)


def stop(supervisor: subprocess.Popen[bytes], directory: Path) -> None:
    """End supervisor, which ends its programs one after the other."""
    (directory / serve_redis.ENDING).touch()
    # It asks Apache by SIGWINCH, which an Apache that is only starting would not hear.
    starting = [
        program["pid"]
        for program in programs(directory)
        if program["name"] == "apache" and program["pid"] and not apache_is_up(directory)
    ]
    supervisor.terminate()
    for pid in starting:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    try:
        supervisor.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()


def apache_is_up(directory: Path) -> bool:
    """Whether our own Apache listens: it writes its pid when it does."""
    return (directory / "apache.pid").exists()


def end_the_rest() -> None:
    """End every process that came from us and is still there; returns when none is, KILL_LIMIT twice at most."""
    begun = time.monotonic()
    while left := descendants(os.getpid()):
        waited = time.monotonic() - begun
        if waited > 2 * KILL_LIMIT:  # the kernel holds it
            break
        end(left, signal.SIGKILL if waited > KILL_LIMIT else signal.SIGTERM)
        time.sleep(0.1)


def end(processes: set[int], number: int) -> None:
    """Send the signal to each, and take note of those of our children that have ended, which are else kept for us."""
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def descendants(parent: int) -> set[int]:
    """Return the children of a process, their children and so on."""
    parents = dict(filter(None, map(parent_of, Path("/proc").glob("[0-9]*"))))
    found: set[int] = set()
    while more := {pid for pid, its in parents.items() if its in found | {parent}} - found:
        found |= more
    return found


def parent_of(folder: Path) -> tuple[int, int] | None:
    """Return a process in /proc with its parent; None when it has ended."""
    with suppress(OSError):
        # Its name comes before, in brackets, and may hold anything.
        return int(folder.name), int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None


def relay_log(log: IO[bytes]) -> None:
    """Print what the processes log."""
    for line in log:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def wait_for_own_redis(directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Return when our own Redis answers: until then nothing may use the port. Raises StartupError when that can't come."""
    deadline = time.monotonic() + serve_redis.START_LIMIT
    while not serve_redis.started(directory):
        check_supervisor(supervisor)
        if "redis" in given_up(directory) or time.monotonic() > deadline:
            raise StartupError(f"Redis does not start: {serve_redis.why_not_started(directory)}")
        time.sleep(0.05)


def start_programs(directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Let supervisor start what needs Redis."""
    while True:
        check_supervisor(supervisor)
        try:
            for name in ("model-server", "apache"):
                control(directory).startProcessGroup(name, False)
            return
        except UNREACHABLE:
            time.sleep(0.05)


def wait_until_ready(port: int, directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Return when /readyz of our own Apache says so. Raises StartupError when that can't come."""
    deadline = time.monotonic() + START_LIMIT
    while not (apache_is_up(directory) and ready(port)):
        check_supervisor(supervisor)
        for name in given_up(directory):
            raise StartupError(f"{name} does not start; its reason is in the lines above.")
        if time.monotonic() > deadline:
            raise StartupError(f"not ready after {START_LIMIT} seconds.")
        time.sleep(0.1)


def watch(directory: Path, supervisor: subprocess.Popen[bytes]) -> NoReturn:
    """Run for ever. Raises StartupError when supervisor or our own Redis is gone for good."""
    while True:
        check_supervisor(supervisor)
        if "redis" in given_up(directory):
            raise StartupError(f"Redis has ended and does not start again: {serve_redis.why_not_started(directory)}")
        end_orphans(supervisor.pid)
        time.sleep(1)


def end_orphans(supervisor: int) -> None:
    """End what a program left that died: the rest of a killed Apache would keep the port from the next one."""
    family = descendants(os.getpid())
    end(family - descendants(supervisor) - {supervisor}, signal.SIGKILL)


def check_supervisor(supervisor: subprocess.Popen[bytes]) -> None:
    """Raise StartupError when supervisor has ended, SystemExit when we are told to."""
    if TOLD.is_set():
        sys.exit(0)
    if (code := supervisor.poll()) is not None:
        raise StartupError(f"supervisor ended by itself, with exit code {code}.")


def ready(port: int) -> bool:
    """Whether the service would answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


def control(directory: Path) -> Any:
    """Return supervisor's own interface; its methods raise one of UNREACHABLE until it has opened its socket."""
    transport = SupervisorTransport(serverurl=f"unix://{directory}/supervisor.sock")
    proxy: Any = ServerProxy("http://127.0.0.1", transport=transport)
    return proxy.supervisor


def programs(directory: Path) -> list[dict[str, Any]]:
    """Return what supervisor says of each of its programs; nothing where it does not answer."""
    try:
        return list(control(directory).getAllProcessInfo())
    except UNREACHABLE:
        return []


def given_up(directory: Path) -> list[str]:
    """Return the processes that supervisor does not start again."""
    return [each["name"] for each in programs(directory) if each["statename"] in ("EXITED", "FATAL")]


def announce(port: int) -> None:
    """Print what can be pasted."""
    image = shlex.quote(os.path.relpath(APP_ROOT / "images/cat.jpg"))
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.API_KEYS else ""  # not which: this goes to a log
    print(f"* Ready on port {port}. Try:\n\n    curl{key} -F image=@{image} http://localhost:{port}/predict\n\n"
          "* Ctrl-C stops everything", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except StartupError as refusal:
        sys.exit(f"bin/serve: {refusal}")
