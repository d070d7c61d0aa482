"""What the tests run on: a Redis, an Apache and model servers of their own, on free ports, which end with them.

A missing program skips the tests that need it, with the reason; where CI=true it fails them.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import requests
from redis import Redis
from redis.exceptions import RedisError

pytest_plugins = ["hooks"]

ROOT = Path(__file__).resolve().parents[1]
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
START_LIMIT = 240  # seconds that a model server may take to start on a busy machine
# For programs that import TensorFlow: without the packages of the tests, which it would import too.
AS_INSTALLED = {"PYTHONPATH": str(ROOT / "tests/as_installed")}


def free_port() -> int:
    """A port that nothing has, below those that the system gives to clients, which come and go by hundreds here."""
    first = 20_000 + 3_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # for each worker
    for port in random.SystemRandom().sample(range(first, first + 3_000), 100):  # whatever seed a test has set
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port among 100")


# The modules under test read their settings when they are imported, so this comes before that.
os.environ.update(
    REDIS_HOST="127.0.0.1", REDIS_PORT=str(free_port()), MODEL=str(ROOT / "models/digits.keras"), PYTHONUNBUFFERED="1"
)
# JAX would set it to 1 when a test imports it, and the programs under test would inherit that.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
for name in ("REDIS_URL", "IMAGE_QUEUE", "LABELS", "MODEL_WEIGHTS"):
    os.environ.pop(name, None)
sys.path[:0] = [str(ROOT), str(ROOT / "models")]


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Return the first true value of `condition`, or fail with `what`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def missing(reason: str) -> NoReturn:
    """Skip the test, or where CI=true fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str) -> str:
    """Return the path of `program`; without it skip, or fail where CI=true."""
    path = shutil.which(program, path=PATH)
    return path or missing(f"{program} is not installed")


class Process:
    """A program that is running: its log, and the means to end it."""

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
        return self.log_path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait_for_log(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.log.count(text) >= times or not self.alive, f"{text!r} in {self.log}", START_LIMIT)
        assert self.log.count(text) >= times, self.log

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.alive:
            self.send(number)
        try:
            return self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Process]:
    process = Process(command, log, **environment)
    try:
        yield process
    finally:
        process.send(signal.SIGCONT)
        process.stop()


def run_redis(log: Path, port: int, *options: str) -> Any:
    server = next(filter(shutil.which, ("redis-server", "valkey-server")), "redis-server")
    command = [need(server), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(log.parent)]
    return running([*command, *options], log)


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the Redis of this test run."""
    port = int(os.environ["REDIS_PORT"])
    with run_redis(tmp_path_factory.mktemp("redis") / "log", port) as process:
        client = Redis(port=port, socket_timeout=5)
        wait_until(lambda: process.alive and answers(client), "Redis answers")
        yield port


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


@pytest.fixture
def redis(redis_port: int) -> Iterator[Redis]:
    """A client of the test run's Redis, in which a test leaves nothing behind.

    Services of the test run have queues of their own there, and go on living.
    """
    client = Redis(port=redis_port, socket_timeout=5)
    yield client
    for key in own_keys(client):
        client.delete(key)


def own_keys(redis: Redis) -> list[bytes]:
    """Every key but those of the services that the tests run, whose queues are queue-<number>."""
    return [key for key in cast(list[bytes], redis.keys("*")) if not key.startswith(b"queue-")]


@contextmanager
def run_model_server(log: Path, **environment: str) -> Iterator[Process]:
    """Run a model server until it is ready."""
    with running([sys.executable, "run_model_server.py"], log, **environment) as process:
        process.wait_for_log("* Model loaded")
        yield process


@contextmanager
def run_apache(
    *, wait: bool = True, log: Path | None = None, command: Sequence[str] = (), **environment: str
) -> Iterator[str]:
    """Run the production site in a private Apache, or `command`; give its URL, with `wait` when the web answers."""
    need("apache2")
    directory = Path(tempfile.mkdtemp(prefix="keras-rest-api-test-"))
    port = free_port()
    environment = {"APACHE_DEFINES": "WEB_PROCESSES=2 WEB_THREADS=320"} | environment
    options = {"RUN_DIR": str(directory), "APP_PORT": str(port)} | environment
    url = f"http://127.0.0.1:{port}"
    try:
        command = list(command) or [str(ROOT / "deploy/apache/run-private")]
        with running(command, log or directory / "log", **options) as process:
            if wait:
                wait_until(lambda: responds(url) or not process.alive, f"Apache answers: {process.log}")
                assert process.alive, process.log
            yield url
    finally:
        shutil.rmtree(directory)


def responds(url: str) -> bool:
    try:
        return requests.get(f"{url}/livez", timeout=5).ok
    except requests.RequestException:
        return False


class Service:
    """A whole service: Apache at `url`, and its model servers."""

    def __init__(self, url: str, queue: str = "", servers: Sequence[Process] = ()) -> None:
        self.url = url
        self.queue = queue
        self.servers = servers

    def post(self, image: bytes, **options: Any) -> requests.Response:
        return requests.post(f"{self.url}/predict", files={"image": image}, **({"timeout": 120} | options))

    def predictions(self, image: bytes) -> list[dict[str, Any]]:
        response = self.post(image)
        assert response.status_code == 200, response.text
        predictions: list[dict[str, Any]] = response.json()["predictions"]
        return predictions

    def label(self, image: bytes) -> str:
        label: str = self.predictions(image)[0]["label"]
        return label


@contextmanager
def run_service(directory: Path, servers: int = 1, **environment: str) -> Iterator[Service]:
    """Run Apache and `servers` model servers on a queue of their own, until ready."""
    queue = environment.setdefault("IMAGE_QUEUE", f"queue-{free_port()}")
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                running([sys.executable, "run_model_server.py"], directory / f"server-{i}", **environment)
            )
            for i in range(servers)
        ]
        url = stack.enter_context(run_apache(wait=True, log=directory / "apache", **environment))
        for process in processes:
            process.wait_for_log("* Model loaded")
        wait_until(lambda: len(ready(url).get("model_servers", {})) == servers, f"{servers} model servers are alive")
        yield Service(url, queue, processes)


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bare Debian, to be copied."""
    from chroot import make_base  # noqa: PLC0415 - which imports this module

    return make_base(tmp_path_factory.mktemp("debian") / "root")


def images_are_wanted(session: pytest.Session) -> bool:
    return any("storage" in getattr(item, "fixturenames", ()) for item in session.items)


@pytest.fixture(scope="session")
def images_to_come(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[list[str]]]:
    """The images of the Dockerfile, which are built in the background; buildah's options to find them."""
    from container_images import Storage  # noqa: PLC0415 - which imports this module

    storage = Storage(tmp_path_factory.mktemp("buildah"))
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(storage.fill, debian)
    storage.empty()


def ready(url: str) -> dict[str, Any]:
    answer: dict[str, Any] = requests.get(f"{url}/readyz", timeout=10).json()
    return answer


@pytest.fixture(scope="session")
def service(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with the digits model and the default settings."""
    with run_service(tmp_path_factory.mktemp("service")) as running_service:
        yield running_service


def variables(pid: int) -> dict[str, str]:
    """The environment of a process; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def processes_with(redis_port: str) -> set[int]:
    """The processes of the bin/serve that was given this port."""
    pids = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return {pid for pid in pids if variables(pid).get("REDIS_PORT") == redis_port}


def model_servers(redis_port: str) -> set[int]:
    return {pid for pid in processes_with(redis_port) if b"run_model_server.py" in command_of(pid)}


def command_of(pid: int) -> bytes:
    """The command line of a process; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def raw_answer(service: Service, request: bytes) -> requests.Response:
    """Send bytes that no client library would; return the answer as such a library gives it."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        answer = HTTPResponse(connection)
        answer.begin()
        response = requests.Response()
        response.status_code = answer.status
        response.headers.update(answer.getheaders())
        response._content = answer.read()
        return response


def web_processes(url: str) -> list[int]:
    """The mod_wsgi daemons of the Apache at `url`."""
    port = url.rsplit(":", 1)[1]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            command = (folder / "cmdline").read_bytes()
            if command.startswith(b"(wsgi:") and f"APP_PORT {port}".encode() in command:
                found.append(int(folder.name))
    return found


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_certificates(directory: Path, name: str = "ca") -> dict[str, str]:
    """Make an authority of the test's own and a certificate of it for 127.0.0.1; the paths of both and of the key."""
    files = {part: str(directory / f"{name}-{part}.pem") for part in ("ca", "ca-key", "certificate", "key")}
    new = [need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    config = directory / "openssl.cnf"
    config.write_text(
        "[req]\ndistinguished_name = name\n[name]\n"
        "[ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\nsubjectKeyIdentifier = hash\n"
        "[server]\nsubjectAltName = IP:127.0.0.1, DNS:localhost\nsubjectKeyIdentifier = hash\n"
        "authorityKeyIdentifier = keyid\n"
    )
    new += ["-config", str(config), "-days", "2"]
    ca, key = ["-out", files["ca"], "-keyout", files["ca-key"]], ["-out", files["certificate"], "-keyout", files["key"]]
    signed = ["-CA", files["ca"], "-CAkey", files["ca-key"]]
    subprocess.run([*new, "-extensions", "ca", "-subj", f"/CN={name}", *ca], check=True, capture_output=True)
    subprocess.run(
        [*new, "-extensions", "server", "-subj", "/CN=service", *key, *signed], check=True, capture_output=True
    )
    return files


def assert_error(response: Any, status: int, code: str) -> str:
    """Check the one shape that every error has; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.content)
    assert body["success"] is False
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code
    message: str = body["error"]["message"]
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    return message
