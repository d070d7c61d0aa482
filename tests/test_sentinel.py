"""REDIS_URL=sentinel://...: its parts, what is refused, passwords and TLS, and connections that follow the primary."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from harness import ROOT, answers, free_port, run_redis, wait_until
from redis import Redis
from sentinels import NAME, ask, client_of, fault, run_sentinel

import settings
from image_queue import ImageQueue, ServerQueue, WebQueue
from image_queue.connection import NotPrimary, connect
from image_queue.intake import Intake
from image_queue.sentinel import Address, PrimaryNotFound, Sentinels, read_url

# The URL


def parts_of(url: str) -> tuple[str, dict[str, Any]]:
    sentinels, options = read_url(url)
    return str(sentinels), options


def test_url_has_sentinels_the_primary_and_the_database() -> None:
    assert parts_of("sentinel://one:1,two,[::1]:3/images/5") == (
        "sentinel://one:1,two:26379,[::1]:3/images",
        {"db": 5},
    )
    assert parts_of("sentinels://[fe80::1]/my%2Fname") == ("sentinels://[fe80::1]:26379/my/name", {"db": 0})


def test_passwords_and_tls_files_go_to_those_they_are_for() -> None:
    url = "sentinels://me:p%2F%40ss@one/images?sentinel_username=s&sentinel_password=a%26b&ssl_ca_certs=ca.pem"
    sentinels, options = read_url(url)

    assert options == {"username": "me", "password": "p/@ss", "db": 0, "ssl_ca_certs": "ca.pem"}
    assert sentinels._options.items() >= {"username": "s", "password": "a&b", "ssl_ca_certs": "ca.pem"}.items()
    assert str(sentinels) == "sentinels://one:26379/images"


INVALID = [
    "sentinel://one:26379",
    "sentinel://one:26379/",
    "sentinel:///images/0",
    "sentinel://one:99999/images",
    "sentinel://one:x/images",
    "sentinel://one,,two/images",
    "sentinel://one/images/zero",
    "sentinel://one/images/0/1",
    "sentinel://one two/images",
    "sentinel://user:se/cret@one/images",
    "sentinel://:secret@one/images?ssl_ca_certs=ca.pem",  # without TLS
    "sentinels://:secret@one/images?ssl_unknown=secret",
    "sentinels://:secret@one/images?ssl_cert_reqs=secret",
    "sentinel://one/images?sentinel_password=secret&socket_timeout=secret",
]


@pytest.mark.parametrize("url", INVALID)
def test_invalid_url_is_refused_in_one_line_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", url)

    with pytest.raises(SystemExit) as ended:
        connect()

    printed = capsys.readouterr().err
    assert ended.value.code == settings.EXIT_BAD_SETTING
    assert printed.startswith("REDIS_URL=sentinel")
    assert "it must be sentinel://HOST:PORT,HOST:PORT/NAME/DB, where NAME is the primary's name" in printed
    assert printed.count("\n") == 1
    assert "secret" not in printed


def test_a_program_stops_at_an_invalid_url() -> None:
    code = "import settings; from image_queue import WebQueue; WebQueue()"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={"REDIS_URL": "sentinel://host"}, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


# Two primaries and a Sentinel that is told which one it should name


class Named:
    """Two Redis servers that are both primaries, and the Sentinel that names one of them."""

    def __init__(self, sentinel: Address, servers: list[Address], password: str = "") -> None:
        self.sentinel = sentinel
        self.servers = servers
        self.url = f"sentinel://{sentinel}/{NAME}/0"

    def name(self, server: Address) -> None:
        """Let the Sentinel name `server`. Connections to the other one stay open."""
        ask(self.sentinel, "REMOVE")
        ask(self.sentinel, "MONITOR", server.host, str(server.port), "1")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    folder = tmp_path_factory.mktemp("named")
    servers, sentinel = [Address("127.0.0.1", free_port()) for _ in range(2)], Address("127.0.0.1", free_port())
    with ExitStack() as stack:
        for _, port in servers:
            stack.enter_context(run_redis(folder / f"redis-{port}", port))
        stack.enter_context(run_sentinel(folder / "sentinel", sentinel, servers[0]))
        wait_until(lambda: all(answers(client_of(each)) for each in [*servers, sentinel]), "all answer")
        yield Named(sentinel, servers)


@pytest.fixture
def first(named: Named, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The primary that the Sentinel names at first."""
    client = client_of(named.servers[0])
    monkeypatch.setattr(settings, "REDIS_URL", named.url)
    named.name(named.servers[0])
    yield client
    client.replicaof("NO", "ONE")
    for name in ("min-replicas-to-write", "requirepass"):
        client.config_set(name, "0" if name.startswith("min") else "")


def pid_of(redis: Redis) -> int:
    return int(redis.info("server")["process_id"])


def test_new_connection_goes_to_the_primary_that_the_sentinel_names(named: Named, first: Redis) -> None:
    assert pid_of(connect()) == pid_of(first)

    named.name(named.servers[1])
    assert pid_of(connect()) == pid_of(client_of(named.servers[1]))


def test_connections_leave_an_old_primary_that_still_answers(
    named: Named, first: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("image_queue.sentinel.CHECK_EVERY", 0.2)
    queue = ImageQueue()
    redis, intake = queue.redis, Intake(queue.pool, 100)
    assert redis.ping()
    assert list(intake.move("queue", "taken", 1, 0)) == []

    named.name(named.servers[1])
    second = client_of(named.servers[1])
    second.rpush("queue", "job")
    wait_until(lambda: moved(lambda: pid_of(redis) == pid_of(second)), "the pool's connection leaves")
    wait_until(lambda: moved(lambda: [*intake.move("queue", "taken", 1, 0)]), "the model server's connection leaves")
    assert second.lrange("taken", 0, -1) == [b"job"]
    second.delete("taken")


def moved(attempt: Any) -> Any:
    """Return the result of `attempt`, or None if its connection has just been found to lead to the old primary."""
    try:
        return attempt()
    except NotPrimary:
        return None


def test_model_server_takes_jobs_through_sentinels(first: Redis) -> None:
    web, server = WebQueue(), ServerQueue({"model": "digits"}, 5)
    server.join()
    first.rpush(settings.IMAGE_QUEUE, "not a job", "nor this")

    assert server.take(5, wait=1).jobs == []
    assert list(web.live_servers()) == [server.name]
    server.leave()
    server._slot_socket.close()


def test_commands_that_wait_are_not_limited_like_the_first_reply(first: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_queue.connection.HANDSHAKE_LIMIT", 0.2)
    redis = connect()
    begun = time.monotonic()

    assert redis.blpop(["nothing"], 0.6) is None
    assert time.monotonic() - begun > 0.5


def test_primary_that_lacks_replicas_is_left_for_a_better_one(named: Named, first: Redis) -> None:
    """As `min-replicas-to-write` makes an old primary that is cut off from the others."""
    redis = connect()
    redis.ping()
    first.config_set("min-replicas-to-write", 1)

    assert fault() == "rejects writes because it has too few replicas, so check its log"
    with pytest.raises(NotPrimary, match="NOREPLICAS"):
        redis.set("key", 1)
    named.name(named.servers[1])
    assert redis.set("image_queue:key", 1)
    client_of(named.servers[1]).delete("image_queue:key")


def test_a_sentinel_that_does_not_answer_is_asked_last(named: Named, first: Redis) -> None:
    dead = Address("127.0.0.1", free_port())
    sentinels = Sentinels([dead, Address(*named.sentinel)], NAME, tls=False)

    assert sentinels.primary() == named.servers[0]
    assert sentinels._sentinels == [named.sentinel, dead]
    assert str(sentinels) == f"sentinel://{dead},{named.sentinel}/{NAME}"


def test_many_threads_ask_once(named: Named, first: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    sentinels, _ = read_url(named.url)
    before = client_of(named.sentinel).info("stats")["total_connections_received"]
    with ThreadPoolExecutor(32) as pool:
        asked = list(pool.map(lambda _: sentinels.primary(), range(320)))
    after = client_of(named.sentinel).info("stats")["total_connections_received"]

    assert set(asked) == {named.servers[0]}
    assert after - before < 320


# What is refused


def test_sentinel_faults_are_told_apart(named: Named, first: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    here, plain = str(named.sentinel), named.servers[0]
    client = client_of(named.sentinel)
    wanted = {
        f"sentinel://{here}/{NAME}/0": "",
        f"sentinel://{here}/other/0": f"can't be found, because the Sentinel at {here} knows no primary of this name",
        f"sentinel://127.0.0.1:1,{plain}/{NAME}": f"the Sentinel at {plain} is a Redis and no Sentinel",
        f"sentinel://127.0.0.1:1/{NAME}": "the Sentinel at 127.0.0.1:1 does not answer, so start the Sentinels",
        f"sentinel://{here}/{NAME}?sentinel_password=wrong": "has no password, so remove sentinel_password",
        f"sentinel://{here}/{NAME}?sentinel_username=me&sentinel_password=wrong": "check sentinel_username and",
        f"sentinel://:wrong@{here}/{NAME}": "has no password, so remove the one in REDIS_URL",
        f"sentinel://{here}/{NAME}/99": "has no database with this number",
        f"sentinels://{here}/{NAME}": "does not answer over TLS, so start the Sentinels",
        f"redis://{here}": "is a Sentinel, which holds no data, so begin REDIS_URL with sentinel://",
    }
    for url, words in wanted.items():
        monkeypatch.setattr(settings, "REDIS_URL", url)
        assert words in fault(), url
        assert bool(fault()) == bool(words)

    client.acl_setuser("default", enabled=True, passwords=["+right"], reset_passwords=True)
    monkeypatch.setattr(settings, "REDIS_URL", named.url)
    try:
        assert "requires a password, so set sentinel_password in REDIS_URL" in fault()
    finally:
        Redis(*named.sentinel, password="right").acl_setuser("default", enabled=True, nopass=True)


def test_primary_that_is_a_replica_or_does_not_answer_is_reported(
    named: Named, first: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    named.name(Address("127.0.0.1", free_port()))
    assert fault().startswith("does not answer, so wait until its Sentinels name another primary")

    named.name(named.servers[0])
    first.replicaof("127.0.0.1", str(named.servers[1][1]))
    assert fault().startswith("changes its primary, so wait for the fail-over to end")


def test_error_of_a_sentinel_is_logged_with_its_address(named: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sentinel://me:secret@{named.sentinel}/other?sentinel_password="
    monkeypatch.setattr(settings, "REDIS_URL", url)
    queue = ImageQueue()

    with pytest.raises(PrimaryNotFound) as raised:
        queue.check()

    assert queue.address == f"sentinel://{named.sentinel}/other"
    assert str(raised.value) == f"Sentinel {named.sentinel}: no primary is named other"


def test_programs_of_deploy_name_the_sentinels(named: Named, first: Redis) -> None:
    first.config_set("maxmemory", "1gb")
    first.config_set("maxmemory-policy", "allkeys-lru")
    serve = "import sys; sys.path.insert(0, 'deploy'); import serve_redis; print(serve_redis.redis_answers())"
    try:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "REDIS_URL": named.url}
        printed = [
            subprocess.check_output([sys.executable, *command], cwd=ROOT, env=environment, text=True)
            for command in (["deploy/check_redis.py"], ["-c", serve])
        ]
    finally:
        first.config_set("maxmemory", "0")
        first.config_set("maxmemory-policy", "noeviction")

    where = named.url.removesuffix("/0")
    assert printed[0].startswith(f"* Redis at {where} evicts keys")
    assert printed[1] == f"* Using the Redis at {where}\nTrue\n"


def test_reads_are_not_served_by_a_replica_that_the_sentinel_names(named: Named, first: Redis) -> None:
    first.replicaof("127.0.0.1", str(named.servers[1].port))

    with pytest.raises(NotPrimary, match="which is a replica"):
        connect().get("key")
