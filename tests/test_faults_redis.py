"""Redis dies, freezes, fills up, fails over or is unusable: requests are answered or refused, but never lost.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from clocks import wrong_clock
from forwarder import Name, name_for
from harness import (
    Serve,
    Service,
    answers,
    free_port,
    need,
    run_apache,
    run_redis,
    run_redis_cluster,
    run_service,
    running,
    wait_until,
    web_processes,
)
from load import Load, Record, ask, freeze_in_mid_batch, in_flight, known_images, name_of
from namespaces import hosts
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

pytestmark = pytest.mark.fault


def test_redis_killed_five_times_loses_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        for _ in range(5):
            load.wait_for(100)
            os.kill(served.redis_server, signal.SIGKILL)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_redis_killed_at_each_start_is_started_again(served: Serve, record_property: Record) -> None:
    killed = set[int]()

    def another() -> int | None:
        with suppress(RedisError):
            pid = served.redis_server
            return None if pid in killed else pid
        return None

    with Load(served.url) as load:
        for _ in range(5):
            pid = wait_until(another, "another Redis runs", 60)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        load.wait_for(100)

    # bin/serve goes on. Redis is away for longer than REDIS_TIMEOUT, so new images may be refused.
    assert load.failures.keys() <= {"503 redis_down"}
    record_property("figures", load.figures)


def test_redis_frozen_for_ten_seconds_loses_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        load.wait_for(100)
        pid = served.redis_server
        os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        os.kill(pid, signal.SIGCONT)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_redis_and_the_model_server_killed_together_lose_nothing(served: Serve, record_property: Record) -> None:
    with Load(served.url) as load:
        load.wait_for(100)
        pid = served.model_server
        freeze_in_mid_batch(pid, served.redis, served.queue)
        os.kill(served.redis_server, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_a_network_cut_for_ten_seconds_loses_nothing(tmp_path: Path, record_property: Record) -> None:
    port = free_port()
    with hosts(redis=1) as on:
        there = on["redis"]
        command = [*there.prefix, need("redis-server"), "--port", str(port), "--bind", there.address, "--save", ""]
        with running([*command, "--protected-mode", "no"], tmp_path / "redis"):
            wait_until(lambda: answers(Redis(there.address, port)), "Redis answers")
            where = {"REDIS_HOST": there.address, "REDIS_PORT": str(port)}
            with run_service(tmp_path, 1, **where) as service, Load(service.url) as load:
                load.wait_for(100)
                there.cable("down")
                time.sleep(10)
                there.cable("up")
                load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def test_programs_started_without_redis_wait_and_recover(tmp_path: Path, record_property: Record) -> None:
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
    assert max(pauses) <= 2
    record_property("figures", load.figures)


def test_redis_out_of_memory_is_503_and_recovers(served: Serve, record_property: Record) -> None:
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
    record_property("figures", load.figures.replace("lost", "rejected with 503"))


class Pair(NamedTuple):
    """A service whose Redis is a primary and its replica, behind one name.

    Both Redis servers may evict keys, so both programs must warn. They have so much memory that it never happens.
    """

    service: Service
    name: Name
    primary: Redis
    replica: Redis

    def readyz(self) -> requests.Response:
        return requests.get(f"{self.service.url}/readyz", timeout=30)

    def is_ready(self) -> bool:
        """Whether both web processes are ready (six requests reach both)."""
        return all(self.readyz().status_code == 200 for _ in range(6))


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


def test_both_programs_warn_about_a_redis_that_evicts(pair: Pair) -> None:
    server = pair.service.servers[0].log_path
    logs = [server.read_text(), server.with_name("apache").read_text()]

    warnings = [[line for line in log.splitlines() if "maxmemory-policy" in line] for log in logs]
    assert [len(lines) for lines in warnings] == [1, len(web_processes(pair.service.url))]
    assert all("allkeys-lru" in line and "noeviction" in line for lines in warnings for line in lines)
    assert pair.readyz().json()["warnings"]


def test_both_programs_refuse_a_redis_cluster(tmp_path: Path) -> None:
    port = free_port()
    image = known_images()[0]
    with (
        run_redis_cluster(tmp_path / "redis", port),
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
    assert log.count("is a Redis Cluster") == 2  # once in each web process
    assert ready.status_code == 503
    assert "is a Redis Cluster" in ready.json()["error"]["message"]
    assert {(o.status, o.code) for o in refused} == {(503, "redis_down")}
    assert max(o.seconds for o in refused) < 10


def test_a_fail_over_behind_one_name_loses_nothing(pair: Pair, record_property: Record) -> None:
    """Fails over and back. The old primary becomes a replica, and its connections stay open."""
    messages, waited = [], []
    with Load(pair.service.url) as load:
        for old, new in ((pair.primary, pair.replica), (pair.replica, pair.primary)):
            load.wait_for(100)
            old.replicaof("127.0.0.1", port_of(new))
            messages.append(wait_until(lambda: unready(pair), "the web notices"))
            assert "keras_rest_api_redis_up 0.0" in requests.get(f"{pair.service.url}/metrics", timeout=30).text
            time.sleep(1)  # the duration of a fail-over
            new.replicaof("NO", "ONE")
            pair.name.leads_to = port_of(new)
            switched = time.monotonic()
            wait_until(pair.is_ready, "the web is ready again", 20)
            load.wait_for(100)
            waited.append(time.monotonic() - switched)
            wait_until(partial(in_sync, old), "the old primary has become a replica")

    assert load.failures == {}
    assert all("read-only replica" in message for message in messages)
    assert max(waited) < 15
    record_property("figures", f"{load.figures}; ready, with 100 more answers, within {max(waited):.1f} s")


def unready(pair: Pair) -> str:
    """Return the error of /readyz if it says that Redis is a read-only replica, otherwise ""."""
    answer = pair.readyz()
    message = "" if answer.status_code == 200 else str(answer.json()["error"]["message"])
    return message if "replica" in message else ""


def test_redis_with_few_connections_serves_or_refuses_and_recovers(pair: Pair, record_property: Record) -> None:
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
        let_in = [answers(each) for each in newcomers]  # as if a model server started now
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


def test_model_servers_with_wrong_clocks_answer_all(pair: Pair, tmp_path: Path, record_property: Record) -> None:
    """One clock is 90 seconds fast, the other 3 hours slow."""
    queue = pair.service.queue
    settings = {"IMAGE_QUEUE": queue, "REDIS_PORT": str(pair.name.port)}
    command = [sys.executable, "run_model_server.py"]
    right = pair.service.servers[0]
    with (
        running(command, tmp_path / "fast", **settings, **wrong_clock(tmp_path, 90)) as fast,
        running(command, tmp_path / "slow", **settings, **wrong_clock(tmp_path, -10800)) as slow,
    ):
        for server in (fast, slow):
            server.wait_for_log("* Joined the queue")
        right.send(signal.SIGSTOP)
        wait_until(lambda: in_flight(pair.primary, queue, name_of(right)) == 0, "its jobs are requeued")
        with Load(pair.service.url) as load:
            load.wait_for(200)
        batches = [len(server.batches) for server in (fast, slow)]
        right.send(signal.SIGCONT)

    assert load.failures == {}
    assert all(batches)
    record_property("figures", f"{load.figures}, {batches[0]} and {batches[1]} batches")


def test_invalid_data_in_the_queue_is_harmless(redis: Redis, service: Service, record_property: Record) -> None:
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
    server = service.servers[0]
    before = len(server.log)
    with Load(service.url) as load:
        load.wait_for(50)
        for entry in [*entries, *with_id.values()]:
            redis.rpush(service.queue, entry)
        replies = {name: redis.blpop([f"{service.queue}:result:{name}"], 4) for name in with_id}
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
