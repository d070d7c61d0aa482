"""What bin/serve runs once everything is installed: Redis if need be, the model server and a private Apache.

supervisor runs them and starts again what dies; everything they write goes to a directory that is removed at the end.
"""

import http.client
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
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from xmlrpc.client import Error as RpcError
from xmlrpc.client import ServerProxy

from redis.exceptions import RedisError
from supervisor.xmlrpc import SupervisorTransport

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))

import settings  # noqa: E402
from helpers import Refusal  # noqa: E402
from image_queue import ImageQueue  # noqa: E402

WORKERS = 640  # requests in flight: MaxRequestWorkers of deploy/apache/000-default.conf
RESNET50_FILES = ("resnet50_weights_tf_dim_ordering_tf_kernels.h5", "imagenet_class_index.json")
KERAS_DOWNLOADS = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/" + RESNET50_FILES[0]
BUNDLED_MODEL = "models/digits.keras"
SUPERVISOR = str(APP_ROOT / "deploy/supervisor/supervisord.conf")
# Not Apache's www-data: the web may not send signals to Redis, nor look into it.
AS_NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups --no-new-privs"
START_LIMIT = 600  # seconds: the largest models take a minute or two
STOP_LIMIT = 90  # seconds: a model server finishes its batch


def main() -> None:
    """Start everything, say when it is ready, and run until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    port = free_port()
    environment = {
        **os.environ,
        **whole_paths(),
        "APP_ROOT": str(APP_ROOT),
        "APP_PORT": str(port),
        "APACHE_DEFINES": apache_sizes(),
        "REDIS_PORT": str(settings.REDIS_PORT),
        "OWN_REDIS": str(not redis_answers()).lower(),
        "MODEL_SERVERS": str(settings.MODEL_SERVERS),
        "AS_NOBODY": AS_NOBODY if os.geteuid() == 0 else "",
    }
    if "MODEL" not in environment:
        environment["MODEL"] = choose_model()
    with run_directory() as directory, supervised(environment | {"RUN_DIR": str(directory)}) as supervisor:
        wait_until_ready(port, directory, supervisor)
        announce(port)
        code = supervisor.wait()
        sys.exit(f"bin/serve: supervisor ended by itself, with exit code {code}.")


def free_port() -> int:
    """Return PORT, which nothing listens on yet."""
    port = settings.PORT
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise Refusal(f"port {port} is for root only: choose one above 1023, as in PORT=8080 bin/serve.") from None
        except OSError:
            raise Refusal(f"port {port} is taken: choose another, as in PORT={port + 1} bin/serve.") from None
    return port


def redis_answers() -> bool:
    """Whether the Redis of the settings is there; if not, whether one may be started is checked too."""
    queue = ImageQueue()
    try:
        queue.check()
    except RedisError as error:
        local = settings.REDIS_HOST in ("localhost", "127.0.0.1", "::1") and not settings.REDIS_URL
        if not local:
            raise Refusal(f"Redis at {queue.address} does not answer ({error}): start it, or check REDIS_*.") from None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", settings.REDIS_PORT)) == 0:
                raise Refusal(
                    f"what listens on port {settings.REDIS_PORT} is not a Redis that lets us in ({error}): "
                    f"set REDIS_URL, or choose another port, as in REDIS_PORT={settings.REDIS_PORT + 1} bin/serve."
                ) from None
        return False
    print(f"* Using the Redis at {queue.address}", flush=True)
    return True


def whole_paths() -> dict[str, str]:
    """Return the settings that name a file of the folder that bin/serve was started in, which its programs are not."""
    named = {name: Path(os.environ.get(name, "")) for name in ("MODEL", "MODEL_WEIGHTS", "LABELS")}
    return {name: str(path.resolve()) for name, path in named.items() if path.is_file()}


def choose_model() -> str:
    """Return ResNet50 if its ImageNet weights can be had, else the bundled model: for when MODEL is not set."""
    cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"
    if all((cache / name).is_file() for name in RESNET50_FILES):
        return settings.MODEL
    try:
        with urllib.request.urlopen(urllib.request.Request(KERAS_DOWNLOADS, method="HEAD"), timeout=5):
            pass
    except OSError as error:
        reason = f"can't be fetched ({error})"
    else:
        print("* Fetching ResNet50's ImageNet weights (100 MB)", flush=True)
        fetch = [sys.executable, "-c", "import classifier; classifier.fetch()"]
        if subprocess.run(fetch, cwd=APP_ROOT, check=False).returncode == 0:
            return settings.MODEL
        reason = "could not be fetched"
    print(
        f"* Serving the bundled model of handwritten digits: ResNet50's ImageNet weights are not in {cache} "
        f"and {reason}. README.md says which files go there; MODEL=... serves another model.",
        flush=True,
    )
    return BUNDLED_MODEL


def apache_sizes() -> str:
    """Return the definitions that fit the site to this machine and these settings."""
    processes = max(2, os.cpu_count() or 1)
    threads = -(-WORKERS // processes)
    return f"WEB_PROCESSES={processes} WEB_THREADS={threads} MAX_UPLOAD_BYTES={settings.MAX_UPLOAD_BYTES}"


@contextmanager
def run_directory() -> Iterator[Path]:
    """Make the directory for sockets and logs, and remove it at the end."""
    directory = tempfile.mkdtemp(prefix="keras-rest-api-")
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def supervised(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run supervisor and, with it, everything; stop it at the end, whatever happened."""
    # The signal of setpriv ends it if we are killed.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "supervisor.supervisord", "-c", SUPERVISOR],
        env=environment,
        cwd=APP_ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches it through us only
    )
    relay = threading.Thread(target=relay_log, args=[process.stdout])
    relay.start()
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("* Stopping", flush=True)
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
        relay.join(1)


def relay_log(log: IO[bytes]) -> None:
    """Print what the processes log."""
    for line in log:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def wait_until_ready(port: int, directory: Path, supervisor: subprocess.Popen[bytes]) -> None:
    """Return when /readyz says so. Raises Refusal when that can't come."""
    deadline = time.monotonic() + START_LIMIT
    while not ready(port):
        if supervisor.poll() is not None:
            raise Refusal("supervisor did not start.")
        for name in given_up(directory):
            raise Refusal(f"{name} does not start; its reason is in the lines above.")
        if time.monotonic() > deadline:
            raise Refusal(f"not ready after {START_LIMIT} seconds.")
        time.sleep(0.1)


def ready(port: int) -> bool:
    """Whether the service would answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


def given_up(directory: Path) -> list[str]:
    """Return the processes that supervisor does not start again."""
    transport = SupervisorTransport(serverurl=f"unix://{directory}/supervisor.sock")
    proxy: Any = ServerProxy("http://127.0.0.1", transport=transport)
    try:
        processes = proxy.supervisor.getAllProcessInfo()
        return [process["name"] for process in processes if process["statename"] in ("EXITED", "FATAL")]
    except (OSError, RpcError, http.client.HTTPException):
        return []  # supervisor has not opened its socket yet


def announce(port: int) -> None:
    """Print what can be pasted."""
    image = shlex.quote(os.path.relpath(APP_ROOT / "images/three.png"))
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.API_KEYS else ""  # not which: this goes to a log
    print(f"* Ready on port {port}. Try:\n\n    curl{key} -F image=@{image} http://localhost:{port}/predict\n\n"
          "* Ctrl-C stops everything", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"bin/serve: {refusal}")
