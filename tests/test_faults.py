"""Nothing that was accepted is lost, whatever dies: faults put into the real processes under load.

The figures of the README's table are printed at the end of the run, as in: bin/test tests/test_faults.py
"""

import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPResponse
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import requests
from conftest import (
    AS_INSTALLED,
    ROOT,
    Process,
    Service,
    answers,
    assert_error,
    free_port,
    model_servers,
    need,
    run_apache,
    run_model_server,
    run_redis,
    run_service,
    running,
    wait_until,
    web_processes,
)
from forwarder import Name, name_for
from load import CLIENTS, Load, ask, freeze_in_mid_batch, in_flight, known_images
from PIL import Image
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from samples import saved

pytestmark = pytest.mark.fault

Record = Callable[[str, object], None]


@pytest.fixture(autouse=True, scope="module")
def _images_are_ready() -> None:
    known_images()


class Serve(Service):
    """A bin/serve of its own, with the processes that it supervises."""

    def __init__(self, process: Process, port: int, redis_port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}", "image_queue")
        self.process = process
        self.redis_port = redis_port
        self.redis = Redis(port=redis_port, socket_timeout=30)

    @property
    def model_server(self) -> int:
        """The pid of the model server that runs now; waits for it."""
        return int(wait_until(self._model_servers, "a model server runs")[0])

    def _model_servers(self) -> list[int]:
        return sorted(model_servers(str(self.redis_port)))

    def kill_redis(self) -> None:
        os.kill(self.redis.info("server")["process_id"], signal.SIGKILL)

    def freeze_model_server(self) -> tuple[int, int]:
        """Stop it in mid-batch; return its pid and how many jobs it has."""
        pid = self.model_server
        return pid, freeze_in_mid_batch(pid, lambda: in_flight(self.redis, self.queue))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """bin/serve with the digits model and a Redis of its own, which keeps nothing."""
    need("apache2")
    port, redis_port = free_port(), free_port()
    environment = {"PORT": str(port), "REDIS_PORT": str(redis_port), "REDIS_HOST": "localhost"}
    with running([str(ROOT / "bin/serve")], tmp_path_factory.mktemp("serve") / "log", **environment) as process:
        process.wait_for_log("* Ready on port")
        yield Serve(process, port, redis_port)


@pytest.fixture(scope="module")
def hurt(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for faults from which its model server recovers. Other model servers and Apaches may join its queue."""
    with run_service(tmp_path_factory.mktemp("hurt")) as service:
        yield service


@contextmanager
def second_server(service: Service, log: Path) -> Iterator[Process]:
    """Run one more model server on the queue of the service."""
    with run_model_server(log, IMAGE_QUEUE=service.queue) as process:
        process.wait_for_log("* Joined the queue")
        yield process


# Model servers


def test_a_model_server_killed_ten_times_loses_nothing(served: Serve, record_property: Record) -> None:
    hit = []
    with Load(served.url) as load:
        for _ in range(10):
            load.wait_for(64)
            pid, jobs = served.freeze_model_server()
            os.kill(pid, signal.SIGKILL)
            hit.append(jobs)
        load.wait_for(64)

    assert load.failures == {}
    record_property("figures", f"{load.figures}, {sum(hit)} in flight when killed")


def test_when_one_of_two_model_servers_dies_the_other_takes_over(
    redis: Redis, hurt: Service, tmp_path: Path, record_property: Record
) -> None:
    with second_server(hurt, tmp_path / "second") as killed, Load(hurt.url) as load:
        load.wait_for(100)
        freeze_in_mid_batch(killed.popen.pid, lambda: in_flight(redis, hurt.queue, name_of(killed)))
        killed.send(signal.SIGKILL)
        died = time.monotonic()
        load.wait_for(200)

    assert load.failures == {}
    waited = [o.started + o.seconds - died for o in load.outcomes if o.started < died]
    assert max(waited) < 10
    record_property("figures", f"{load.figures}, taken over after {max(waited):.1f} s")


def test_sigterm_in_mid_batch_answers_it_and_the_next_one_takes_over_at_once(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    with run_service(tmp_path) as service, ExitStack() as stack:
        load = stack.enter_context(Load(service.url))
        load.wait_for(100)
        first = service.servers[0]
        freeze_in_mid_batch(first.popen.pid, lambda: in_flight(redis, service.queue))
        first.send(signal.SIGTERM)
        first.send(signal.SIGCONT)

        assert first.popen.wait(30) == 0
        assert in_flight(redis, service.queue) == 0
        assert redis.keys(f"{service.queue}:server:*") == []
        answered = len(load.outcomes)
        with run_model_server(tmp_path / "next", IMAGE_QUEUE=service.queue):
            loaded = time.monotonic()
            wait_until(lambda: len(load.outcomes) > answered, "the next one answers", 2)
            at_once = time.monotonic() - loaded
            load.wait_for(100)
            stack.close()

    assert load.failures == {}
    record_property("figures", f"{load.figures}, next one answers {at_once:.2f} s after loading")


def test_a_frozen_model_server_is_replaced_and_its_late_answers_harm_nothing(
    redis: Redis, hurt: Service, tmp_path: Path, record_property: Record
) -> None:
    with second_server(hurt, tmp_path / "second") as frozen, Load(hurt.url) as load:
        load.wait_for(100)
        jobs = freeze_in_mid_batch(frozen.popen.pid, lambda: in_flight(redis, hurt.queue, name_of(frozen)))
        wait_until(lambda: len(redis.keys(f"{hurt.queue}:server:*")) == 1, "the heartbeat has lapsed")
        wait_until(lambda: f"{name_of(frozen)} died:" in hurt.servers[0].log, "the other brings its jobs back")
        load.wait_for(200)
        frozen.send(signal.SIGCONT)
        frozen.wait_for_log("joining again")
        batches = frozen.log.count("Batch size")
        load.wait_for(200)
        wait_until(lambda: frozen.log.count("Batch size") > batches, "it computes again")

    assert load.failures == {}
    record_property("figures", f"{load.figures}, with {jobs} jobs in the frozen one")


def name_of(server: Process) -> str:
    """The name under which a model server joined last."""
    return str(re.findall(r"Joined the queue .* as (\S+)", server.log)[-1])


# Redis


def test_redis_killed_five_times_loses_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        for _ in range(5):
            load.wait_for(100)
            served.kill_redis()
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_redis_frozen_for_ten_seconds_loses_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        load.wait_for(100)
        pid = served.redis.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        os.kill(pid, signal.SIGCONT)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_redis_and_the_model_server_killed_together_lose_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        load.wait_for(100)
        pid, _ = served.freeze_model_server()
        served.kill_redis()
        os.kill(pid, signal.SIGKILL)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


@contextmanager
def network(name: str, subnet: str) -> Iterator[Callable[[str], object]]:
    """A network namespace, .2 of the subnet, one cable away; call with "down" to cut the cable and "up" to mend it."""
    ip = need("ip")
    inside = [need("nsenter"), f"--net=/run/netns/{name}"]  # `ip -n` would mount too, which not every machine lets it
    made = subprocess.run([ip, "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr}")
    try:
        for command in (
            [ip, "link", "add", f"{name}-a", "type", "veth", "peer", "name", f"{name}-b", "netns", name],
            [ip, "address", "add", f"{subnet}.1/30", "dev", f"{name}-a"],
            [ip, "link", "set", f"{name}-a", "up"],
            [*inside, ip, "address", "add", f"{subnet}.2/30", "dev", f"{name}-b"],
            [*inside, ip, "link", "set", f"{name}-b", "up"],
        ):
            subprocess.run(command, check=True)
        yield lambda state: subprocess.run([*inside, ip, "link", "set", f"{name}-b", state], check=True)
    finally:
        subprocess.run([ip, "netns", "delete", name], check=True)


def test_a_network_cut_for_ten_seconds_loses_nothing(tmp_path: Path, record_property: Record) -> None:
    port, name = free_port(), f"cut{free_port()}"
    subnet = f"10.213.{port % 256}"  # another run on this machine, or what a killed one left, has its own
    host = f"{subnet}.2"
    options = ["--port", str(port), "--bind", host, "--save", "", "--protected-mode", "no"]
    with network(name, subnet) as cable:
        command = [need("nsenter"), f"--net=/run/netns/{name}", need("redis-server"), *options]
        with running(command, tmp_path / "redis"):
            wait_until(lambda: answers(Redis(host, port)), "Redis answers")
            where = {"REDIS_HOST": host, "REDIS_PORT": str(port)}
            with run_service(tmp_path, 1, **where) as service, Load(service.url) as load:
                load.wait_for(100)
                cable("down")
                time.sleep(10)
                cable("up")
                load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_started_without_redis_each_waits_and_recovers_alone(tmp_path: Path, record_property: Record) -> None:
    port = free_port()
    where = {"REDIS_PORT": str(port)}
    command, log = [sys.executable, "run_model_server.py"], tmp_path / "server"
    with running(command, log, **where) as server, run_apache(REDIS_PORT=str(port)) as url, ExitStack() as stack:
        server.wait_for_log("trying again", times=2)
        load = stack.enter_context(Load(url))
        server.wait_for_log("trying again", times=5)
        with run_redis(tmp_path / "redis", port):
            load.wait_for(200)
            stack.close()

    assert load.failures == {}
    pauses = [float(seconds) for seconds in re.findall(r"trying again in ([\d.]+) s", log.read_text())]
    assert all(longer > shorter for shorter, longer in pairwise(pauses[1:4]))
    assert max(pauses) <= 5
    record_property("figures", load.figures)


def test_a_redis_out_of_memory_is_503_and_recovers(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        load.wait_for(100)
        served.redis.config_set("maxmemory", 1)
        wait_until(lambda: sum(o.status == 503 for o in load.outcomes) >= 100, "requests are refused")
        served.redis.config_set("maxmemory", 0)
        load.wait_for(200)

    refused = [o for o in load.outcomes if o.status == 503]
    assert set(load.failures) == {"503 queue_full"}
    assert all(o.retry_after for o in refused)
    assert not any(o.status == 503 for o in load.outcomes[-100:])
    record_property("figures", f"{load.figures.replace('lost', 'refused with 503')}")


class Pair(NamedTuple):
    """A service whose Redis is a primary and its replica behind one name, and which of the two the name leads to.

    Both may evict, which they are too large for, but both programs must say so.
    """

    service: Service
    name: Name
    primary: Redis
    replica: Redis

    def readyz(self) -> requests.Response:
        return requests.get(f"{self.service.url}/readyz", timeout=30)

    def is_ready(self) -> bool:
        return all(self.readyz().status_code == 200 for _ in range(6))  # so that each web process has been asked


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("pair")
    ports = free_port(), free_port()
    evict = ["--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"]
    follow = ["--replicaof", "127.0.0.1", str(ports[0]), "--repl-diskless-sync-delay", "0"]
    with ExitStack() as stack:
        for number, (port, options) in enumerate(zip(ports, ([], follow), strict=True)):
            stack.enter_context(run_redis(directory / f"redis-{number}", port, *evict, *options))
        primary, replica = (Redis(port=port, socket_timeout=30) for port in ports)
        wait_until(lambda: answers(primary) and answers(replica), "both answer")
        wait_until(lambda: in_sync(replica), "the replica has caught up")
        name = stack.enter_context(name_for(ports[0]))
        service = stack.enter_context(run_service(directory, REDIS_PORT=str(name.port)))
        yield Pair(service, name, primary, replica)


def in_sync(replica: Redis) -> bool:
    found = replica.info("replication")
    return bool(found["role"] == "slave" and found["master_link_status"] == "up")


def port_of(redis: Redis) -> int:
    return int(redis.connection_pool.connection_kwargs["port"])


def test_a_redis_that_evicts_is_named_by_both_programs_at_their_start(pair: Pair) -> None:
    server = pair.service.servers[0].log_path
    logs = [server.read_text(), server.with_name("apache").read_text()]

    told = [[line for line in log.splitlines() if "maxmemory-policy" in line] for log in logs]
    assert [len(lines) for lines in told] == [1, len(web_processes(pair.service.url))]
    assert all("allkeys-lru" in line and "noeviction" in line for lines in told for line in lines)
    assert pair.readyz().json()["warnings"]


def test_a_redis_cluster_is_named_by_both_programs_at_their_start(tmp_path: Path) -> None:
    port = free_port()
    image = known_images()[0]
    with (
        run_redis(tmp_path / "redis", port, "--cluster-enabled", "yes"),
        run_apache(log=tmp_path / "apache", REDIS_PORT=str(port)) as url,
        running([sys.executable, "run_model_server.py"], tmp_path / "server", REDIS_PORT=str(port)) as server,
    ):
        refused = [ask(url, image) for _ in range(8)]
        ready = requests.get(f"{url}/readyz", timeout=10)
        code = server.popen.wait(60)
        log = (tmp_path / "apache").read_text()

    assert code == 2
    [line] = [line for line in server.log.splitlines() if "Redis" in line]
    assert f"127.0.0.1:{port} is a Redis Cluster" in line
    assert log.count("is a Redis Cluster") == 2  # by each web process
    assert ready.status_code == 503
    assert "is a Redis Cluster" in ready.json()["error"]["message"]
    assert {(o.status, o.code) for o in refused} == {(503, "redis_down")}
    assert max(o.seconds for o in refused) < 10


def test_a_fail_over_behind_one_name_loses_nothing(pair: Pair, record_property: Record) -> None:
    """There and back: the old primary lives on as a replica, on connections that stay open."""
    told, waited = [], []
    with Load(pair.service.url) as load:
        for old, new in ((pair.primary, pair.replica), (pair.replica, pair.primary)):
            load.wait_for(100)
            old.replicaof("127.0.0.1", port_of(new))
            told.append(wait_until(lambda: unready(pair), "the web notices"))
            assert "keras_rest_api_redis_up 0.0" in requests.get(f"{pair.service.url}/metrics", timeout=30).text
            time.sleep(1)  # as a fail-over takes
            new.replicaof("NO", "ONE")
            pair.name.leads_to = port_of(new)
            switched = time.monotonic()
            wait_until(pair.is_ready, "the web is ready again", 20)
            load.wait_for(100)
            waited.append(time.monotonic() - switched)
            wait_until(partial(in_sync, old), "the old primary has become a replica")

    assert load.failures == {}
    assert all("read-only replica" in message for message in told)
    assert max(waited) < 15
    record_property("figures", f"{load.figures}, ready and 100 answers later after {max(waited):.1f} s")


def unready(pair: Pair) -> str:
    """What /readyz says against a Redis that can't be written to; nothing when it says something else."""
    answer = pair.readyz()
    message = "" if answer.status_code == 200 else str(answer.json()["error"]["message"])
    return message if "replica" in message else ""


def test_a_redis_of_few_connections_serves_or_refuses_and_recovers(pair: Pair, record_property: Record) -> None:
    images = known_images()[:100]
    most = str(pair.primary.config_get("maxclients")["maxclients"])
    pair.primary.config_set("maxclients", 30)
    try:
        wait_until(pair.is_ready, "both web processes know")
        with ThreadPoolExecutor(100) as pool:
            outcomes = list(pool.map(lambda image: ask(pair.service.url, image), images))
        alone = [ask(pair.service.url, image) for image in images[:8]]
        ready = [pair.readyz().status_code for _ in range(8)]
        connected = pair.primary.info("clients")["connected_clients"]
        newcomers = [Redis(port=pair.name.port, retry=Retry(NoBackoff(), 0)) for _ in range(8)]
        let_in = [answers(each) for each in newcomers]  # as a model server that starts now would be
    finally:
        pair.primary.config_set("maxclients", most)

    refused = [o for o in outcomes if o.status == 503]
    assert all(o.right or o.retry_after for o in outcomes), [(o.status, o.code, o.message) for o in outcomes]
    assert all(o.right for o in alone), alone
    assert ready == [200] * 8
    assert all(let_in)
    longest = max(o.seconds for o in outcomes)
    figures = f"{100 - len(refused)} of 100 served, {len(refused)} x 503, longest {longest:.1f} s"
    record_property("figures", f"{figures}; then {connected} of 30 connections in use")


CLOCK = """
import os, time
real, shift = time.time, float(os.environ["CLOCK_SHIFT"])
time.time = lambda: real() + shift
"""


def test_model_servers_with_wrong_clocks_answer_all(pair: Pair, tmp_path: Path, record_property: Record) -> None:
    """One clock is 90 seconds fast, the other 3 hours slow."""
    as_installed = Path(AS_INSTALLED["PYTHONPATH"], "sitecustomize.py").read_text()
    (tmp_path / "sitecustomize.py").write_text(as_installed + CLOCK)
    queue = pair.service.queue
    settings = {"IMAGE_QUEUE": queue, "REDIS_PORT": str(pair.name.port), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "run_model_server.py"]
    right = pair.service.servers[0]
    with (
        running(command, tmp_path / "fast", **settings, CLOCK_SHIFT="90") as fast,
        running(command, tmp_path / "slow", **settings, CLOCK_SHIFT="-10800") as slow,
    ):
        for server in (fast, slow):
            server.wait_for_log("* Joined the queue")
        right.send(signal.SIGSTOP)
        wait_until(lambda: in_flight(pair.primary, queue, name_of(right)) == 0, "what it had is brought back")
        with Load(pair.service.url) as load:
            load.wait_for(200)
        batches = [server.log.count("Batch size") for server in (fast, slow)]
        right.send(signal.SIGCONT)

    assert load.failures == {}
    assert all(batches)
    record_property("figures", f"{load.figures}, {batches[0]} and {batches[1]} batches")


# Apache


def reload(url: str) -> None:
    """What apachectl graceful does; return when there are other web processes."""
    before = web_processes(url)
    apache = int(Path(f"/proc/{before[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(apache, signal.SIGUSR1)
    wait_until(lambda: len(set(web_processes(url)) - set(before)) == len(before), "other web processes", 60)


def test_five_graceful_reloads_fail_next_to_no_request(hurt: Service, record_property: Record) -> None:
    """Not none: what an old worker has accepted, and not yet handed on when Apache stops the web processes, fails."""
    with Load(hurt.url) as load:
        for _ in range(5):
            load.wait_for(100)
            reload(hurt.url)
        load.wait_for(200)

    assert set(load.failures) <= {"503 unavailable", "500 internal_error", "502 bad_gateway"}
    assert sum(load.failures.values()) <= len(load.outcomes) / 20
    record_property("figures", load.figures)


def test_a_request_that_begins_before_a_graceful_reload_and_ends_after_it_is_told_to_come_again(
    hurt: Service, record_property: Record
) -> None:
    """An old worker holds the first half of its headers when its web processes, which the rest is for, are no more."""
    image = known_images()[0]
    request = requests.Request("POST", "http://x/predict", files={"image": image.data}).prepare()
    assert isinstance(request.body, bytes)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with connect(hurt.url) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        wait_until(lambda: is_accepted(connection), "a worker has the connection")
        reload(hurt.url)
        assert ask(hurt.url, image).right

        connection.sendall(f"{head}\r\n".encode() + request.body)
        answer = HTTPResponse(connection)
        answer.begin()
        body = answer.read()

    assert (answer.status, json.loads(body)["error"]["code"]) == (503, "unavailable"), body
    assert answer.getheader("Retry-After")
    record_property("figures", "503 unavailable with Retry-After")


def is_accepted(connection: socket.socket) -> bool:
    """Whether a process has the other end; until then the kernel lists it without an inode."""
    mine = f"{connection.getsockname()[1]:04X}"
    lists = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    rows = [line.split() for line in lists.splitlines()]
    return any(row[2].endswith(f":{mine}") and row[9] != "0" for row in rows)


def test_five_reloads_of_the_web_processes_alone_fail_no_request(hurt: Service, record_property: Record) -> None:
    """And with requests in them that take longer than the 5 seconds that mod_wsgi grants by itself."""
    with Load(hurt.url) as load:
        for _ in range(4):
            load.wait_for(100)
            reload_web_processes(hurt.url)
        load.wait_for(100)
        wait_until(lambda: all_serving(hurt.url), "web processes that serve")
        hurt.servers[0].send(signal.SIGSTOP)
        before = all_serving(hurt.url)
        (ROOT / "keras_rest_api_app.wsgi").touch()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(requests.get, f"{hurt.url}/livez", timeout=60) for _ in range(8)]
            time.sleep(7)
            hurt.servers[0].send(signal.SIGCONT)
            assert all(each.result().status_code == 200 for each in asked)
        wait_until(lambda: not set(before) & set(web_processes(hurt.url)), "other web processes", 60)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def reload_web_processes(url: str) -> None:
    """What the README says to do after an update."""
    # mod_wsgi notes the file's time when its import ends, so a process that is just starting would miss the change.
    before = wait_until(lambda: all_serving(url), "web processes that serve")
    (ROOT / "keras_rest_api_app.wsgi").touch()
    wait_until(lambda: not set(before) & set(web_processes(url)), "other web processes", 60)


def all_serving(url: str) -> list[int]:
    """The web processes, when all have begun to serve: their request threads start after the import."""
    processes = web_processes(url)
    with suppress(OSError):  # one ended while we looked
        if len(processes) == 2 and all(len(os.listdir(f"/proc/{pid}/task")) > 100 for pid in processes):
            return processes
    return []


def test_a_killed_web_process_takes_only_its_own_requests_along(
    redis: Redis, hurt: Service, record_property: Record
) -> None:
    before = set(redis.keys(f"{hurt.queue}:*"))  # what a reload left in another test, which takes longer to expire
    with run_apache(IMAGE_QUEUE=hurt.queue, REQUEST_TIMEOUT="5") as url, Load(url) as load:
        load.wait_for(100)
        hurt.servers[0].send(signal.SIGSTOP)
        wait_until(lambda: redis.llen(hurt.queue) + in_flight(redis, hurt.queue) == CLIENTS, "all wait")
        killed, other = web_processes(url)
        os.kill(killed, signal.SIGKILL)
        died = time.monotonic()
        hurt.servers[0].send(signal.SIGCONT)
        load.wait_for(200)
        assert other in web_processes(url)

    failed = [o for o in load.outcomes if not o.right]
    assert failed
    assert set(load.failures) <= {"500 internal_error", "502 bad_gateway"}
    assert all(o.started < died < o.started + o.seconds + 0.1 for o in failed)
    assert len(failed) < CLIENTS
    wait_until(
        lambda: not set(redis.keys(f"{hurt.queue}*")) - before - heartbeats(redis, hurt.queue),
        "nothing of theirs is left",
    )
    record_property("figures", f"{load.figures}, all of them in the killed process")


def heartbeats(redis: Redis, queue: str) -> set[Any]:
    """The keys that live model servers write: who they are, and which images their model takes."""
    return set(redis.keys(f"{queue}:server:*")) | set(redis.keys(f"{queue}:shape"))


def test_without_a_model_server_200_clients_are_told_why_in_time(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    queue = f"queue-{free_port()}"
    with run_apache(wait=True, IMAGE_QUEUE=queue, REQUEST_TIMEOUT="5") as url, ThreadPoolExecutor(200) as pool:
        asked = [pool.submit(ask, url, image) for image in known_images()[:200]]
        wait_until(lambda: redis.llen(queue) == 200, "all 200 wait")
        homepage = []
        while redis.llen(queue) == 200:
            started = time.monotonic()
            assert requests.get(url, timeout=10).status_code == 200
            homepage.append(time.monotonic() - started)
        outcomes = [each.result() for each in asked]

    assert {(o.status, o.code) for o in outcomes} == {(504, "timeout")}
    assert all("no model server is alive" in o.message for o in outcomes)
    assert max(o.seconds for o in outcomes) < 6
    assert sorted(homepage)[len(homepage) * 95 // 100] < 0.1
    assert redis.keys(f"{queue}*") == []
    longest = max(o.seconds for o in outcomes)
    record_property("figures", f"200 x 504 within {longest:.2f} s of 5, GET / within {max(homepage) * 1000:.0f} ms")


def test_what_clients_that_hung_up_asked_for_is_not_computed_and_leaves_nothing(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    """Also when the web process that would take its jobs back dies with them."""
    queue = f"queue-{free_port()}"
    with run_apache(wait=True, IMAGE_QUEUE=queue, REQUEST_TIMEOUT="5") as url:
        with ThreadPoolExecutor(200) as pool:
            gone = [pool.submit(ask, url, image, timeout=0.1) for image in known_images()[:200]]
            assert all(each.result().status == 0 for each in gone)
        wait_until(lambda: redis.llen(queue) > 50, "their jobs wait")
        os.kill(web_processes(url)[0], signal.SIGKILL)
        wait_until(lambda: not redis.keys(f"{queue}:accepted:*"), "their deadlines have passed")
        left = redis.llen(queue)
        assert left
        with run_model_server(tmp_path / "server", IMAGE_QUEUE=queue) as server:
            wait_until(lambda: set(redis.keys(f"{queue}*")) == heartbeats(redis, queue) != set(), "the queue is empty")
            assert "Batch size" not in server.log
            assert ask(url, known_images()[0]).right
    record_property("figures", f"200 hung up, {left} of their jobs left in the queue, none computed, no key left")


def test_a_full_queue_is_503_for_the_rest_and_every_accepted_one_is_answered(
    redis: Redis, hurt: Service, record_property: Record
) -> None:
    with run_apache(IMAGE_QUEUE=hurt.queue, MAX_QUEUE="8") as url, ThreadPoolExecutor(64) as pool:
        hurt.servers[0].send(signal.SIGSTOP)
        asked = [pool.submit(ask, url, image) for image in known_images()[:64]]
        wait_until(lambda: redis.llen(hurt.queue) == 8 and sum(a.done() for a in asked) >= 48, "the queue is full")
        hurt.servers[0].send(signal.SIGCONT)
        outcomes = [each.result() for each in asked]

    refused = [o for o in outcomes if o.status == 503]
    assert all(o.code == "queue_full" and o.retry_after for o in refused)
    answered = [o for o in outcomes if o.right]
    assert len(answered) >= 8
    assert len(answered) + len(refused) == 64
    record_property("figures", f"{len(refused)} x 503 with Retry-After, {len(answered)} accepted and answered rightly")


# Images


def test_an_image_that_breaks_the_model_fails_alone(redis: Redis, tmp_path: Path, record_property: Record) -> None:
    """A real fault: a lookup table with no row for an image as bright as this one."""
    pixels = keras.Input((4, 4, 1))
    level = keras.layers.GlobalAveragePooling2D()(pixels)
    found = keras.layers.Embedding(200, 10, embeddings_initializer=table())(level)
    keras.Model(pixels, keras.layers.Flatten()(found)).save(tmp_path / "table.keras")
    (tmp_path / "table.labels.txt").write_text("\n".join("abcdefghij"))
    sizes = {"IMAGE_WIDTH": "4", "IMAGE_HEIGHT": "4", "IMAGE_CHANS": "1"}
    images = [flat(level) for level in [*range(100, 131), 250]]
    with (
        run_service(tmp_path, 1, MODEL=str(tmp_path / "table.keras"), **sizes) as service,
        ThreadPoolExecutor(32) as pool,
    ):
        service.servers[0].send(signal.SIGSTOP)
        asked = [pool.submit(service.post, image) for image in images]
        wait_until(lambda: redis.llen(service.queue) + in_flight(redis, service.queue) == 32, "all wait")
        service.servers[0].send(signal.SIGCONT)
        responses = [each.result() for each in asked]
        log = service.servers[0].log

    assert_error(responses[-1], 500, "model_failed")
    for level, response in zip(range(100, 131), responses, strict=False):
        assert response.json()["predictions"][0]["label"] == "abcdefghij"[level % 10]
    assert "Traceback" in log
    batches = [int(size) for size in re.findall(r"Batch size: \((\d+),", log)]
    record_property("figures", f"1 x model_failed, 31 batch-mates right, in batches of {batches}")


def table() -> Any:
    rows = np.full((200, 10), 0.01)
    rows[np.arange(200), np.arange(200) % 10] = 0.91
    return keras.initializers.Constant(rows)


def flat(level: int) -> bytes:
    return saved(Image.new("L", (4, 4), level), "PNG")


SUPERVISED = """
[supervisord]
nodaemon = true
logfile = /dev/null
logfile_maxbytes = 0
pidfile = {directory}/supervisord.pid

[program:deadly]
command = {python} tests/deadly_server.py
autorestart = unexpected
stdout_logfile = {directory}/deadly.log
redirect_stderr = true
"""


def test_an_image_that_kills_the_model_server_each_time_fails_alone(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    queue, log = f"queue-{free_port()}", tmp_path / "deadly.log"
    (tmp_path / "conf").write_text(SUPERVISED.format(directory=tmp_path, python=sys.executable))
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(tmp_path / "conf")]
    with (
        running(command, tmp_path / "log", IMAGE_QUEUE=queue),
        run_apache(wait=True, IMAGE_QUEUE=queue) as url,
        Load(url) as load,
    ):
        load.wait_for(100)
        response = Service(url).post(saved(Image.new("RGB", (224, 224), "white"), "PNG"))
        load.wait_for(200)

    assert_error(response, 500, "model_failed")
    assert load.failures == {}
    deaths = log.read_text().count("died:")
    assert deaths == 3
    record_property("figures", f"1 x model_failed after {deaths} deaths; the others: {load.figures}")


def test_a_batch_too_big_for_memory_is_split_and_the_limit_is_remembered(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    """After warm-up, as when another program takes the GPU's memory; TensorFlow's own error, raised on purpose."""
    queue, images = f"queue-{free_port()}", known_images()[:32]
    command = [sys.executable, "tests/deadly_server.py"]
    with (
        run_apache(wait=True, IMAGE_QUEUE=queue) as url,
        running(command, tmp_path / "log", IMAGE_QUEUE=queue, IMAGES_THAT_FIT="1") as server,
        ThreadPoolExecutor(32) as pool,
    ):
        server.wait_for_log("* Joined the queue")
        for _ in range(3):
            server.send(signal.SIGSTOP)
            asked = [pool.submit(ask, url, image) for image in images]
            wait_until(lambda: redis.llen(queue) + in_flight(redis, queue) == 32, "all wait")
            server.send(signal.SIGCONT)
            assert all(each.result().right for each in asked)
        learnt = [int(size) for size in re.findall(r"does not fit in memory: computing at most (\d+)", server.log)]

    assert learnt
    assert learnt == sorted(set(learnt), reverse=True)
    record_property("figures", f"3 x 32 answered rightly, at most {learnt[-1]} at once in the end, learnt by {learnt}")


# Rubbish and slowness


def test_rubbish_in_the_queue_harms_nobody(redis: Redis, hurt: Service, record_property: Record) -> None:
    huge = b"x" * 100_000_000
    deadline = b'", "deadline": %f' % (time.time() + 60)
    entries = [
        b"not json", b"", b"[]", b"\xff\xfe", b"[" * 1_000_000, b'{"image": "", "deadline": 1}', huge,
        b'{"id": "' + huge + b'"}', b'{"id": "../../x", "image": ""}',
    ]  # fmt: skip
    with_id = {
        "shape": b'{"id": "shape' + deadline + b', "image": "AAAA"}',
        "types": b'{"id": "types", "image": {}, "deadline": []}',
        "cut": b'{"id": "cut' + deadline + b', "image": "AAAA',
        "huge": b'{"id": "huge' + deadline + b', "image": "' + huge + b'"}',
    }
    server = hurt.servers[0]
    before = len(server.log)
    with Load(hurt.url) as load:
        load.wait_for(50)
        for entry in [*entries, *with_id.values()]:
            redis.rpush(hurt.queue, entry)
        replies = {name: redis.blpop([f"{hurt.queue}:result:{name}"], 4) for name in with_id}
        load.wait_for(200)
        assert server.alive
        log = server.log[before:]

    assert load.failures == {}
    for name, reply in replies.items():
        assert reply, name
        assert json.loads(reply[1])["error"]["code"] == "model_failed"
    assert len(re.findall("dropped .* from the queue", log)) == len(entries)
    assert "Traceback" not in log
    record_property("figures", f"{len(entries)} dropped, {len(with_id)} answered with an error; {load.figures}")


def test_200_slow_connections_are_cut_and_others_served_meanwhile(service: Service, record_property: Record) -> None:
    """Half of them send their headers a byte a second, half their body."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    form = b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
    slow = [connect(service.url) for _ in range(200)]
    for number, connection in enumerate(slow):
        connection.sendall(head if number % 2 else head + form)
    started, cut = time.monotonic(), 0
    with Load(service.url) as load:
        while slow and time.monotonic() - started < 60:
            ready, _, _ = select.select(slow, [], [], 1)
            for connection in ready:  # an answer, or the end
                slow.remove(connection)
                connection.close()
                cut += 1
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"x")
        took = time.monotonic() - started

    assert cut == 200
    assert load.failures == {}
    record_property("figures", f"200 cut within {took:.0f} s; the others: {load.figures}")


def test_2500_silent_connections_keep_nobody_waiting(service: Service, record_property: Record) -> None:
    """They say nothing; then they send half a header, which Apache's workers have to wait for."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    took = []
    for beginning in (b"", b"POST /predict HTTP/1.1\r\nHost: x"):
        with ExitStack() as stack:
            for _ in range(2500):
                stack.enter_context(connect(service.url)).sendall(beginning)
            started = time.monotonic()
            assert requests.get(f"{service.url}/livez", timeout=60).ok
            took.append(time.monotonic() - started)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))

    assert max(took) < 2  # a worker that waits for one of them does so for 10 seconds
    record_property("figures", f"GET /livez within {max(took):.2f} s")


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)
