"""Connections that follow a fail-over, and the messages about a Redis that is unusable or risky."""

import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import flask
import pytest
from forwarder import name_for
from harness import ROOT, answers, free_port, make_certificates, run_redis, run_redis_cluster, wait_until
from redis import Redis
from redis.exceptions import RedisError

import settings
from image_queue import RedisDown, ResultTimeout, ServerQueue, UnusableRedis, WebQueue, fault_of
from image_queue.connection import NotPrimary, PrimaryConnection, QueuePool, connect
from image_queue.server_queue import SCRIPTS
from web.health import add_health_routes
from web.served_models import ServedModels

GRACE = 10  # seconds; an idle machine needs milliseconds


class Pair:
    """A primary and its replica, for tests that demote and restore the primary."""

    def __init__(self, primary: Redis, replica: Redis) -> None:
        self.primary = primary
        self.replica = replica

    def demote(self) -> None:
        self.primary.replicaof("127.0.0.1", port_of(self.replica))

    def restore(self) -> None:
        self.primary.config_set("replica-serve-stale-data", "yes")
        self.primary.replicaof("NO", "ONE")


def port_of(redis: Redis) -> int:
    return int(redis.connection_pool.connection_kwargs["port"])


@pytest.fixture(scope="module")
def pair_of_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory, ports = tmp_path_factory.mktemp("pair"), [free_port(), free_port()]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(run_redis(directory / str(port), port))
        both = [Redis(port=port, socket_timeout=5) for port in ports]
        wait_until(lambda: all(answers(each) for each in both), "both answer")
        yield Pair(*both)


@pytest.fixture
def pair(pair_of_redis: Pair) -> Iterator[Pair]:
    yield pair_of_redis
    pair_of_redis.restore()


def use(monkeypatch: pytest.MonkeyPatch, port: int, **others: Any) -> None:
    for name, value in {"REDIS_PORT": port, **others}.items():
        monkeypatch.setattr(settings, name, value)


# Fail-over


def transaction(redis: Redis) -> object:
    with redis.pipeline(transaction=True) as pipeline:
        pipeline.rpush("k", 1)
        pipeline.set("l", 2)
        return pipeline.execute()


COMMANDS: dict[str, Callable[[Redis], object]] = {
    "a write": lambda redis: redis.set("k", 1),
    "a transaction": transaction,
    "a script": lambda redis: redis.register_script(SCRIPTS["beat"])(["k"], ["", 1, "v"]),
    "a poll": lambda redis: redis.blpop(["k"], 1),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_rejection_by_a_replica_closes_the_connection(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, command: Callable[[Redis], object]
) -> None:
    use(monkeypatch, port_of(pair.primary))
    redis = connect()
    redis.ping()
    pair.demote()

    with pytest.raises(NotPrimary):
        command(redis)

    assert idle(redis) == 0


def idle(redis: Redis) -> int:
    return len(redis.connection_pool._available_connections)


def test_replica_without_its_primary_closes_the_connection(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    use(monkeypatch, port_of(pair.primary))
    redis = connect()
    pair.primary.config_set("replica-serve-stale-data", "no")
    pair.primary.replicaof("127.0.0.1", free_port())

    with pytest.raises(NotPrimary):
        redis.get("k")

    assert idle(redis) == 0


def test_transaction_interrupted_by_a_fail_over_is_rejected(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    use(monkeypatch, port_of(pair.primary))
    connection = connect().connection_pool.get_connection()
    for command in (["MULTI"], ["SET", "k", "1"]):
        connection.send_command(*command)  # type: ignore[no-untyped-call]
        connection.read_response()
    pair.demote()

    connection.send_command("EXEC")  # type: ignore[no-untyped-call]
    with pytest.raises(NotPrimary):
        connection.read_response()

    assert not connection.is_connected


def test_blocking_poll_ends_when_its_primary_is_demoted(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    use(monkeypatch, port_of(pair.primary))
    redis = connect()
    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(redis.blpop, ["k"], 20)
        wait_until(lambda: pair.primary.info("clients")["blocked_clients"], "the poll waits")
        pair.demote()

        with pytest.raises(NotPrimary):
            polled.result(GRACE)


def test_one_error_moves_all_connections_to_the_new_primary(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    with name_for(port_of(pair.primary)) as name:
        use(monkeypatch, name.port)
        others = len(pair.primary.client_list("normal"))
        redis = connect()
        pool = redis.connection_pool
        for each in [pool.get_connection() for _ in range(5)]:
            each._send_ping()  # type: ignore[no-untyped-call]  # connect now
            pool.release(each)
        pair.demote()
        name.leads_to = port_of(pair.replica)

        with pytest.raises(NotPrimary):
            redis.set("k", 1)

        redis.set("k", 2)
        assert pair.replica.get("k") == b"2"
        wait_until(lambda: len(pair.primary.client_list("normal")) <= others, "none of our connections is left")


def test_name_that_leads_to_a_replica_is_an_error(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """If only an old connection leads to a replica, a new connection replaces it without an error."""
    with name_for(port_of(pair.primary)) as name:
        use(monkeypatch, name.port)
        web = WebQueue()
        web.check()
        pair.demote()

        with pytest.raises(NotPrimary) as caught:
            web.check()
        name.leads_to = port_of(pair.replica)
        web.check()

    assert "is a read-only replica" in fault_of(caught.value)


def test_broken_connection_closes_the_idle_ones(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """If the old primary hangs, using them would cost one timeout each."""
    use(monkeypatch, port_of(pair.primary))
    redis = connect()
    pool = redis.connection_pool
    for each in [pool.get_connection() for _ in range(5)]:
        pool.release(each)
    broken = pool.get_connection()
    broken.disconnect()  # type: ignore[no-untyped-call]

    pool.release(broken)

    assert idle(redis) == 0
    assert redis.ping()


# How many connections


def test_surplus_connections_are_closed_and_the_others_kept(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    use(monkeypatch, port_of(pair.primary))
    pool = connect().connection_pool
    assert isinstance(pool, QueuePool)

    def use_at_once(number: int) -> list[int]:
        used = [pool.get_connection() for _ in range(number)]
        for each in used:
            pool.release(each)
        return sorted(id(each._sock) for each in used)

    use_at_once(20)
    pool.close_surplus()
    steady = use_at_once(5)
    pool.close_surplus()
    kept = len(pool._available_connections)
    again = use_at_once(5)
    pool.close_surplus()
    pool.close_surplus()

    assert kept == 5
    assert again == steady
    assert pool._available_connections == []
    assert pool._created_connections == 0


def test_tls_session_ticket_does_not_block_a_connection(redis_port: int) -> None:
    """A TLS server may send session tickets at any time after the handshake."""
    make: Any = PrimaryConnection
    connection = make(host="127.0.0.1", port=redis_port, socket_timeout=3)
    connection.connect()
    connection._parser.can_read = lambda timeout: True
    begun = time.monotonic()

    assert not connection.can_read()
    assert time.monotonic() - begun < 2
    connection.send_command("PING")
    assert connection.read_response() == b"PONG"
    connection.disconnect()


def test_redis_without_a_free_connection_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    use(monkeypatch, port)
    with run_redis(tmp_path / "log", port, "--maxclients", "2"):
        taken = [Redis(port=port), Redis(port=port)]
        wait_until(lambda: all(answers(each) for each in taken), "Redis answers")

        assert current_fault().startswith("has no connection left, so raise its maxclients")


def current_fault() -> str:
    """Return the fault of the Redis in the settings; empty if there is none."""
    try:
        WebQueue().check()
    except (RedisError, UnusableRedis) as error:
        return fault_of(error)
    return ""


# Redis servers that are unusable or risky


class Fake(socketserver.ThreadingTCPServer):
    """Answers PING. To every other command it gives `reply`, such as another product's answer to INFO."""

    daemon_threads = True

    def __init__(self, reply: bytes) -> None:
        super().__init__(("127.0.0.1", 0), FakeConnection)
        self.reply = reply


class FakeConnection(socketserver.BaseRequestHandler):
    server: Fake

    def handle(self) -> None:
        while command := self.request.recv(2**16):
            self.request.sendall(b"+PONG\r\n" if b"PING" in command else self.server.reply)


@contextmanager
def fake_redis(reply: bytes) -> Iterator[int]:
    with Fake(reply) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


def bulk(*lines: str) -> bytes:
    text = "".join(f"{line}\r\n" for line in lines).encode()
    return b"$%d\r\n%s\r\n" % (len(text), text)


UNUSABLE = {
    "Dragonfly": (["redis_version:7.4.0", "dragonfly_version:df-v1.30.0", "redis_mode:standalone"], "is Dragonfly"),
    "Dragonfly's cluster": (["redis_version:7.4.0", "dragonfly_version:df-v1.30.0", "redis_mode:cluster"], "Dragonfly"),
    "a serverless cluster": (["redis_version:7.1", "redis_mode:cluster"], "is a Redis Cluster"),
    "Valkey's cluster": (["redis_version:7.2.4", "server_mode:cluster", "cluster_enabled:1"], "is a Redis Cluster"),
    "a hidden cluster": (["redis_version:8.0", "cluster_enabled:1"], "is a Redis Cluster"),
    "a Sentinel": (["redis_version:7.0.15", "redis_mode:sentinel"], "is a Sentinel, "),
    "an old one": (["redis_version:6.2.14", "redis_mode:standalone"], "is version 6.2.14, but 7 or newer is needed"),
    "KeyDB": (["redis_version:6.3.4", "redis_mode:standalone", "role:active-replica"], "is version 6.3.4"),
    "an unknown one": (["something:else"], "is version unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "words"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_redis_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, lines: list[str], words: str) -> None:
    with fake_redis(bulk(*lines)) as port:
        use(monkeypatch, port)
        web = WebQueue()
        started = time.monotonic()

        with pytest.raises(UnusableRedis, match=f"Redis at 127.0.0.1:{port} is ") as caught:
            web.check()
        with pytest.raises(RedisDown, match="tell the operator"):
            web.ask("aW1hZ2U=", time.time() + 20)

    assert words in fault_of(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - started < GRACE


def test_image_for_an_unchecked_cluster_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    use(monkeypatch, port)
    with run_redis_cluster(tmp_path / "log", port):
        wait_until(lambda: answers(Redis(port=port)), "Redis answers")
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(RedisDown):
                WebQueue().ask("aW1hZ2U=", time.time() + 20)

    assert time.monotonic() - started < GRACE
    assert "is a Redis Cluster" in caplog.text


def test_images_are_accepted_after_an_unusable_redis_is_replaced(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    with fake_redis(bulk("redis_version:7.4.0", "redis_mode:cluster")) as unusable, name_for(unusable) as name:
        use(monkeypatch, name.port)
        web = WebQueue()
        with pytest.raises(UnusableRedis):
            web.check()
        name.leads_to = port_of(pair.primary)
        web.pool.close_idle()

        with pytest.raises(ResultTimeout):
            web.ask("aW1hZ2U=", time.time() + 0.5)


RISKS = {
    "allkeys-lru": (["maxmemory:1000000", "maxmemory_policy:allkeys-lru"], ["allkeys-lru"]),
    "volatile-ttl": (["maxmemory:1000000", "maxmemory_policy:volatile-ttl"], ["volatile-ttl"]),
    "an unknown policy": (["maxmemory:1", "maxmemory_policy:allkeys-lrm"], ["allkeys-lrm"]),
    "no limit": (["maxmemory:0", "maxmemory_policy:allkeys-lru"], []),
    "noeviction": (["maxmemory:1000000", "maxmemory_policy:noeviction"], []),
    "few connections": (["maxclients:30"], ["30 connections"]),
    "enough connections": (["maxclients:1000"], []),
    "both": (["maxclients:30", "maxmemory:9", "maxmemory_policy:allkeys-lfu"], ["allkeys-lfu", "30 connections"]),
    "a provider that hides all": ([], []),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "words"), RISKS.values(), ids=RISKS.keys())
def test_risks_of_a_redis_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lines: list[str], words: list[str]
) -> None:
    with fake_redis(bulk("redis_version:7.2.4", "role:master", *lines)) as port:
        use(monkeypatch, port)
        web = WebQueue()
        for _ in range(3):
            web.check()
            web.warn()

    logged = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(logged) == len(words)
    assert all(word in line and f"127.0.0.1:{port}" in line for word, line in zip(words, logged, strict=True))


def test_evicting_redis_is_reported_by_readyz_and_the_installer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = free_port()
    use(monkeypatch, port)
    with run_redis(tmp_path / "log", port, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"):
        wait_until(lambda: answers(Redis(port=port)), "Redis answers")
        server = ServerQueue({"model": "digits", "weights": "digits.keras"}, 5)
        server.join()
        app = flask.Flask("test")
        add_health_routes(app, ServedModels(WebQueue(), lambda model, event, times: None))
        ready = app.test_client().get("/readyz")
        installed = installer_output(port)

    assert ready.status_code == 200
    [warning] = ready.json["warnings"] if ready.json else []
    for line in (warning, installed):
        assert len(line.splitlines()) == 1
        assert "allkeys-lru" in line
        assert "set maxmemory-policy noeviction" in line


def installer_output(port: int) -> str:
    """Return what bin/install prints about the Redis at `port`."""
    command = [sys.executable, "deploy/check_redis.py"]
    environment = os.environ | {"REDIS_PORT": str(port), "REDIS_HOST": "127.0.0.1"}
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True, timeout=60)


def test_installer_reports_an_unusable_redis() -> None:
    with fake_redis(bulk("redis_version:7.4.0", "dragonfly_version:df-v1.30.0")) as port:
        output = installer_output(port)

    assert re.fullmatch(rf"\* Redis at 127.0.0.1:{port} is Dragonfly, .*\n", output)


REPLIES = {
    b"-LOADING Redis is loading the dataset in memory": "is still loading its data",
    b"-NOAUTH Authentication required.": "requires a password",
    b"-WRONGPASS invalid username-password pair or user is disabled.": "rejects the password",
    b"-ERR AUTH <password> called without any password configured for the default user. Are you sure your "
    b"configuration is correct?": "has no password",
    b"-NOPERM this user has no permissions to run the 'info' command": "does not grant this user the permissions",
    b"-NOPERM User x has no permissions to access one of the keys": "does not grant this user the permissions",
    b"-DENIED Redis is running in protected mode because protected mode is enabled": "protected mode",
    b"-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist": "can't save them",
    b"-NOREPLICAS Not enough good replicas to write.": "too few replicas",
    b"-OOM command not allowed when used memory > 'maxmemory'.": "has no memory left",
    b"-ERR max number of clients reached": "has no connection left",
    b"-READONLY You can't write against a read only replica.": "is a read-only replica",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "is a read-only replica",
    b"-CLUSTERDOWN Hash slot not served": "is a Redis Cluster",
    b"-MOVED 3999 127.0.0.1:6381": "is a Redis Cluster",
    b"-ERR unknown command 'INFO'": "rejects a command",
    b"HTTP/1.1 400 Bad Request": "is not a Redis",
}


@pytest.mark.parametrize(("reply", "words"), REPLIES.items(), ids=list(REPLIES.values()))
def test_each_error_reply_has_its_own_message(monkeypatch: pytest.MonkeyPatch, reply: bytes, words: str) -> None:
    with fake_redis(reply + b"\r\n") as port:
        use(monkeypatch, port)

        fault = current_fault()

    assert words in fault
    assert "does not answer" not in fault


class Page(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_http_server_is_reported_as_not_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        use(monkeypatch, server.server_port)

        assert current_fault().startswith("is not a Redis")
        server.shutdown()


def test_missing_redis_is_reported_as_not_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, free_port())

    assert current_fault().startswith("does not answer, so start it")


def test_wrong_password_tls_and_database_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, port, tls_port = make_certificates(tmp_path), free_port(), free_port()
    other = make_certificates(tmp_path, "other")["ca"]
    options = {"--requirepass": "right", "--tls-port": str(tls_port), "--tls-cert-file": files["certificate"],
               "--tls-key-file": files["key"], "--tls-ca-cert-file": files["ca"]}  # fmt: skip
    plain, tls, ca = f"127.0.0.1:{port}", f"127.0.0.1:{tls_port}", f"ssl_ca_certs={files['ca']}"
    own = f"ssl_certfile={files['certificate']}&ssl_keyfile={files['key']}"
    wanted = {
        f"redis://{plain}": "requires a password",
        f"redis://:wrong@{plain}": "rejects the password",
        f"redis://:right@{plain}/99": "has no database with this number",
        f"rediss://:right@{plain}?{ca}": "does not answer over TLS",
        f"redis://:right@{tls}": "closed the connection, so check its log; if it requires TLS",
        f"rediss://:right@{tls}?ssl_ca_certs={other}&{own}": "presents an untrusted certificate",
        f"rediss://:right@{tls}?{ca}&{own}": "",
    }
    no_certificate = f"rediss://:right@{tls}?{ca}"
    monkeypatch.setattr("image_queue.connection.SOCKET_GRACE", 1)
    with run_redis(tmp_path / "log", port, *chain(*options.items())):
        wait_until(lambda: answers(Redis(port=port, password="right")), "Redis answers")
        found = {}
        for url in [*wanted, no_certificate]:
            monkeypatch.setattr(settings, "REDIS_URL", url)
            found[url] = current_fault()

    # TLS 1.3 may report the missing certificate, or the connection is just closed.
    assert "client certificate" in found[no_certificate]
    for url, words in wanted.items():
        assert found[url].startswith(words), (url, found[url])
        assert bool(found[url]) == bool(words), (url, found[url])
