"""Runs the whole service for bin/serve: Redis if none is running, the model servers and a private Apache.

supervisor runs these programs and restarts those that die. They write all their files to a directory that is removed at
the end.

On Ctrl-C or SIGTERM, Apache answers the requests in flight (DRAIN_LIMIT), then the model servers finish their batches
(60 seconds), then Redis ends. After STOP_LIMIT, anything still running is killed.
"""

import http.client
import json
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
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import NoReturn

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))
if __name__ == "__main__":  # Ctrl-C during the imports needs no cleanup and no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import default_model  # noqa: E402
import serve_models  # noqa: E402
import serve_processes  # noqa: E402
import serve_redis  # noqa: E402

import helpers  # noqa: E402
import settings  # noqa: E402
from helpers import StartupError, available_cores  # noqa: E402
from image_queue import REFRESH_EVERY  # noqa: E402
from model_server import model_checks  # noqa: E402

WORKERS = 640  # the most requests in flight, in all web processes together
SUPERVISOR = str(APP_ROOT / "deploy/supervisor/supervisord.conf")
# Redis does not run as www-data, because the web could then send it signals and read its memory.
AS_NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups --no-new-privs"
ASK_LIMIT = 5  # seconds that supervisor may take to answer
START_LIMIT = 600  # seconds until ready; the largest models take a minute or two
PORT_LIMIT = 3  # seconds to wait for another Apache to release PORT
DRAIN_LIMIT = 30  # seconds at most for the requests in flight
STOP_LIMIT = DRAIN_LIMIT + 60 + 2 + 3  # seconds: the sum of stopwaitsecs in supervisord.conf, and a few more
told_to_stop = threading.Event()


def main() -> None:
    """Start everything, print when it is ready, and run until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    socket.setdefaulttimeout(ASK_LIMIT)
    serve_processes.become_subreaper()
    port = free_port()
    models = serve_models.chosen()
    check_models(models)
    own_redis = not serve_redis.redis_answers()
    environment = {
        **os.environ,
        **absolute_paths(),
        "MODELS": ",".join(models.values()),
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
    if not models and not settings.given("MODEL"):
        environment["MODEL"] = default_model.choose()
    with run_directory() as directory, supervised(environment, directory, list(models)) as supervisor:
        if own_redis:
            wait_for_own_redis(directory, supervisor)
        start_programs(directory, supervisor)
        wait_until_ready(port, directory, supervisor, models)
        announce(port, models)
        watch(directory, supervisor)


def request_stop(*_: object) -> None:
    """Handle SIGINT and SIGTERM. The event is needed because Python drops an exception raised in a destructor."""
    told_to_stop.set()
    sys.exit(0)


def free_port() -> int:
    """Return PORT once it is free. Raises StartupError if an earlier Apache does not release it within PORT_LIMIT."""
    port = settings.PORT
    deadline = time.monotonic() + PORT_LIMIT
    while not bindable(port):
        if time.monotonic() > deadline:
            raise StartupError(f"port {port} is taken: choose another, as in PORT={port % 65535 + 1} bin/serve.")
        time.sleep(0.1)
    return port


def bindable(port: int) -> bool:
    """Whether the port is free. Raises StartupError if only root may use it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            message = f"port {port} is for root only: choose one above 1023, as in PORT=8080 bin/serve."
            raise StartupError(message) from None
        except OSError:
            return False
    return True


def absolute_paths() -> dict[str, str]:
    """Return the absolute paths of the model's files, by setting: the programs run in another directory."""
    named = {name: Path(os.environ.get(name, "")) for name in ("MODEL", "MODEL_WEIGHTS", "LABELS")}
    return {name: str(path.resolve()) for name, path in named.items() if path.is_file()}


def check_models(models: dict[str, str]) -> None:
    """Raise StartupError, before anything is started, if a model or one of its files is invalid."""
    for name, path in absolute_paths().items():
        setattr(settings, name, path)
    labels = settings.LABELS
    with chdir(APP_ROOT):  # where the model servers run
        for name, model in models.items() or [(helpers.default_model(), settings.MODEL)]:
            settings.MODEL = model
            settings.LABELS = labels if name == helpers.default_model() else ""  # they are the default model's
            model_checks.check()


def apache_sizes() -> str:
    """Return the Apache definitions that depend on this machine and the settings."""
    processes = max(2, available_cores())
    threads = -(-WORKERS // processes)
    return f"WEB_PROCESSES={processes} WEB_THREADS={threads} MAX_UPLOAD_BYTES={settings.MAX_UPLOAD_BYTES}"


@contextmanager
def run_directory() -> Iterator[Path]:
    """Create the directory for sockets and logs, and remove it at the end."""
    directory = Path(tempfile.mkdtemp(prefix="keras-rest-api-"))
    directory.chmod(0o755)  # if root runs this, Redis and Apache run as other users
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def supervised(environment: dict[str, str], directory: Path, models: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run supervisor, which starts Redis if needed. At the end, stop it and everything that it runs."""
    serve_redis.write_configuration(directory)
    serve_processes.write_model_servers(directory, models)
    process = subprocess.Popen(
        # setpriv makes the kernel end supervisor if we are killed.
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "supervisor.supervisord", "-c", SUPERVISOR],
        env=environment | {"RUN_DIR": str(directory)},
        cwd=APP_ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches only us
    )
    relay = threading.Thread(target=serve_processes.relay_log, args=[process.stdout], daemon=True)
    relay.start()
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("* Stopping", flush=True)
        serve_processes.stop(process, directory, STOP_LIMIT)
        serve_processes.end_all()
        relay.join(1)


def wait_for_own_redis(directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Wait until our own Redis answers. Raises StartupError if it does not start."""
    deadline = time.monotonic() + serve_redis.START_LIMIT
    while not serve_redis.started(directory):
        check_supervisor(supervisor)
        if "redis" in serve_processes.given_up(directory) or time.monotonic() > deadline:
            raise StartupError(f"Redis does not start: {serve_redis.why_not_started(directory)}")
        time.sleep(0.05)


def start_programs(directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Tell supervisor to start the programs that need Redis, as soon as it accepts commands."""
    while True:
        check_supervisor(supervisor)
        try:
            for name in ("model-server", "apache"):
                serve_processes.control(directory).startProcessGroup(name, False)
            return
        except serve_processes.UNREACHABLE:
            time.sleep(0.05)


def wait_until_ready(port: int, directory: Path, supervisor: subprocess.Popen[bytes], models: Collection[str]) -> None:
    """Wait until our Apache says that all models are ready. Raises StartupError if a program fails or time runs out."""
    deadline = time.monotonic() + START_LIMIT
    while not (serve_processes.apache_is_up(directory) and ready(port, models)):
        check_supervisor(supervisor)
        for name in serve_processes.given_up(directory):
            raise StartupError(f"{name} does not start; the lines above say why.")
        if time.monotonic() > deadline:
            raise StartupError(f"not ready after {START_LIMIT} seconds.")
        time.sleep(0.1)
    if models:
        time.sleep(REFRESH_EVERY)  # until then the other web processes may not know every model


def watch(directory: Path, supervisor: subprocess.Popen[bytes]) -> NoReturn:
    """Kill orphans until told to stop. Raises StartupError when supervisor or our own Redis has ended for good."""
    while True:
        check_supervisor(supervisor)
        if "redis" in serve_processes.given_up(directory):
            raise StartupError(f"Redis has ended and does not start again: {serve_redis.why_not_started(directory)}")
        serve_processes.end_orphans(supervisor.pid)
        time.sleep(1)


def check_supervisor(supervisor: subprocess.Popen[bytes]) -> None:
    """Raise StartupError if supervisor has ended, SystemExit if we were told to stop."""
    if told_to_stop.is_set():
        sys.exit(0)
    if (code := supervisor.poll()) is not None:
        raise StartupError(f"supervisor has ended with exit code {code}.")


def ready(port: int, models: Collection[str]) -> bool:
    """Whether /readyz answers 200, and says that each of these models is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            about = json.load(answer).get("models", {}) if models else {}
            return all(about.get(name, {}).get("ready") for name in models)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def announce(port: int, models: Collection[str]) -> None:
    """Print commands to paste, one for each model. They read the key from a variable, since this may go to a log."""
    image = shlex.quote(os.path.relpath(APP_ROOT / "images/cat.jpg"))
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.API_KEYS else ""
    pages = ["predict", *(f"predict/{name}" for name in models if name != helpers.default_model())]
    commands = "".join(f"    curl{key} -F image=@{image} http://localhost:{port}/{page}\n" for page in pages)
    print(f"* Ready on port {port}. Try:\n\n{commands}\n* Ctrl-C stops everything", flush=True)


if __name__ == "__main__":
    try:
        main()
    except StartupError as error:
        sys.exit(f"bin/serve: {error}")
