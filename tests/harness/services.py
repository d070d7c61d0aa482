"""Run Redis, model servers and Apache, alone or together as a service."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import requests
from redis import Redis
from redis.exceptions import RedisError

from harness.processes import ROOT, Process, command_line, free_port, need, parent, pids, running, variables, wait_until


class Service:
    """A whole service: its URL, its queue and its model servers."""

    def __init__(self, url: str, queue: str = "", servers: Sequence[Process] = ()) -> None:
        self.url = url
        self.queue = queue
        self.servers = servers

    def post(self, image: bytes, **options: Any) -> requests.Response:
        """Post an image to /predict."""
        return requests.post(f"{self.url}/predict", files={"image": image}, **({"timeout": 120} | options))

    def predictions(self, image: bytes) -> list[dict[str, Any]]:
        """Return the predictions for an image."""
        response = self.post(image)
        assert response.status_code == 200, response.text
        predictions: list[dict[str, Any]] = response.json()["predictions"]
        return predictions

    def label(self, image: bytes) -> str:
        """Return the most probable label of an image."""
        label: str = self.predictions(image)[0]["label"]
        return label


def redis_server() -> str:
    """Return the path of the Redis to test with: TEST_REDIS_SERVER, or the one that is installed. Raises Missing."""
    installed = next(filter(shutil.which, ("redis-server", "valkey-server")), "redis-server")
    return os.environ.get("TEST_REDIS_SERVER") or need(installed)


def run_redis(log: Path, port: int, *options: str) -> AbstractContextManager[Process]:
    """Run a Redis that keeps nothing on disk. Does not wait until it answers."""
    command = [redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(log.parent)]
    return running([*command, *options], log)


def run_redis_cluster(log: Path, port: int) -> AbstractContextManager[Process]:
    """Run the only node of a Redis Cluster, like run_redis()."""
    # By default its bus has the port 10,000 higher, which an outgoing connection may have.
    return run_redis(log, port, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))


def answers(client: Redis) -> bool:
    """Whether Redis replies."""
    try:
        return bool(client.ping())
    except RedisError:
        return False


def own_keys(redis: Redis) -> list[bytes]:
    """Return all keys except those of shared services, whose queues are named queue-<number>."""
    return [key for key in cast(list[bytes], redis.keys("*")) if not key.startswith(b"queue-")]


@contextmanager
def run_model_server(log: Path, **environment: str) -> Iterator[Process]:
    """Run a model server during the block, which starts when the model is loaded."""
    with running([sys.executable, "run_model_server.py"], log, **environment) as process:
        process.wait_for_log("* Model loaded")
        yield process


@contextmanager
def run_apache(
    *, wait: bool = True, log: Path | None = None, command: Sequence[str] = (), page: str = "/livez", **environment: str
) -> Iterator[str]:
    """Run the production site in a new Apache and yield its URL. With `wait`, first wait until `page` can be fetched.

    `command` replaces deploy/apache/run-private.
    """
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
                wait_until(lambda: responds(url, page) or not process.alive, f"Apache answers: {process.log}", 60)
                if not process.alive:
                    raise RuntimeError(f"Apache ended:\n{process.log}")
            yield url
    finally:
        shutil.rmtree(directory)


def responds(url: str, page: str = "/livez") -> bool:
    """Whether a page can be fetched."""
    try:
        return requests.get(f"{url}{page}", timeout=5).ok
    except requests.RequestException:
        return False


def ready(url: str) -> dict[str, Any]:
    """Return the body of /readyz."""
    answer: dict[str, Any] = requests.get(f"{url}/readyz", timeout=10).json()
    return answer


@contextmanager
def run_service(directory: Path, servers: int = 1, **environment: str) -> Iterator[Service]:
    """Run Apache and `servers` model servers on a new queue or IMAGE_QUEUE. The block starts when all are ready."""
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


class Serve(Service):
    """A bin/serve, which supervises a Redis, a model server and an Apache."""

    def __init__(self, process: Process, port: int, redis_port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}", "image_queue")
        self.process = process
        self.redis = Redis(port=redis_port, socket_timeout=30)
        self._redis_port = str(redis_port)

    @property
    def model_server(self) -> int:
        """The pid of the model server that is running now; waits for one."""
        running_now: set[int] = wait_until(lambda: model_servers(self._redis_port), "a model server runs")
        return min(running_now)

    @property
    def redis_server(self) -> int:
        """The pid of Redis."""
        return int(self.redis.info("server")["process_id"])


@contextmanager
def run_serve(log: Path, **environment: str) -> Iterator[Serve]:
    """Run bin/serve on free ports. Does not wait until it logs "* Ready on port"."""
    need("apache2")
    port, redis_port = free_port(), free_port()
    ports = {"PORT": str(port), "REDIS_PORT": str(redis_port), "REDIS_HOST": "localhost"}
    with running([str(ROOT / "bin/serve")], log, **ports, **environment) as process:
        yield Serve(process, port, redis_port)


def processes_with(redis_port: str) -> set[int]:
    """Return the pids of the bin/serve that was given this port, and of all its children."""
    return {pid for pid in pids() if variables(pid).get("REDIS_PORT") == redis_port}


def model_servers(redis_port: str) -> set[int]:
    """Return the pids of the model servers of the bin/serve that was given this port."""
    return {pid for pid in processes_with(redis_port) if "run_model_server.py" in command_line(pid)}


def web_processes(url: str) -> list[int]:
    """Return the pids of the mod_wsgi processes of the Apache at `url`."""
    port = url.rsplit(":", 1)[1]
    commands = ((pid, command_line(pid)) for pid in pids())
    return [pid for pid, command in commands if command.startswith("(wsgi:") and f"APP_PORT {port}" in command]


def all_serving(url: str) -> list[int]:
    """Return the web processes if both serve, or []. Their request threads start only after the import."""
    processes = web_processes(url)
    with suppress(OSError):  # one has just ended
        if len(processes) == 2 and all(len(os.listdir(f"/proc/{pid}/task")) > 100 for pid in processes):
            return processes
    return []


def apache_of(url: str) -> int:
    """Return the pid of the main process of the Apache at `url`."""
    return parent(web_processes(url)[0])
