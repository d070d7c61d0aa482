"""The Sentinels of docs/operations.md, with TLS and passwords for all: the configuration files are run as they are."""

import re
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pytest
from harness import ROOT, answers, free_port, make_certificates, redis_server, run_service, running, wait_until
from load import Load, Record
from queue_fixtures import ANSWER, IMAGE, answer
from redis import Redis
from redis.exceptions import RedisError
from sentinels import NAME, fault

import settings
from image_queue import HeartbeatExpired, ServerQueue, WebQueue
from model_server import privileges

OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
SECRETS = ("PASSWORD", "SENTINEL-PASSWORD", "REPLICA-PASSWORD", "OBSERVER-PASSWORD")


def documented(heading: str) -> list[str]:
    """Return the code blocks of a section of docs/operations.md."""
    section = OPERATIONS.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


class Documented:
    """The Redis pair and the Sentinels of docs/operations.md, with paths, addresses and ports of this machine."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files = make_certificates(folder)
        self.stack = stack
        [basic], [more, self.sentinel_conf] = (
            documented("Redis on another machine"),
            documented("Redis that fails over"),
        )
        self.redis_conf = basic + more
        self.servers, self.sentinels = [free_port() for _ in range(2)], [free_port() for _ in range(3)]

    def start(self) -> None:
        for number, port in enumerate(self.servers):
            follow = f"replicaof 127.0.0.1 {self.servers[0]}\n" if number else ""
            text = self.redis_conf.replace("tls-port 6379", f"tls-port {port}") + follow
            self._run(text + "repl-diskless-sync-delay 0\nuser admin on >admin ~* &* +@all\nsave ''\n", port)
        for port in self.sentinels:
            text = self.sentinel_conf.replace("tls-port 26379", f"tls-port {port}")
            text = text.replace("10.0.0.1 6379", f"127.0.0.1 {self.servers[0]}").replace(" 5000", " 1000")
            self._run(text + "user admin on >admin ~* &* +@all\n", port, "--sentinel")
        wait_until(lambda: all(answers(self.admin(port)) for port in [*self.servers, *self.sentinels]), "all answer")
        wait_until(self.is_ready, "the Sentinels know all", 60)

    def _run(self, text: str, port: int, *options: str) -> None:
        for name in ("ca", "key", "certificate"):
            text = text.replace(f"/etc/redis/{name}.pem", self.files[name])
        file = self.folder / f"{port}.conf"
        file.write_text(f"bind 127.0.0.1\ndir {self.folder}\n{text}")
        self.stack.enter_context(running([redis_server(), str(file), *options], self.folder / f"{port}.log"))

    def admin(self, port: int) -> Redis:
        options: dict[str, Any] = {"username": "admin", "password": "admin", "socket_timeout": 5, "protocol": 2}
        return Redis("127.0.0.1", port, ssl=True, ssl_ca_certs=self.files["ca"], **options)

    def ask(self, port: int, *words: str) -> Any:
        """Return the reply of a Sentinel to a SENTINEL command."""
        client: Any = self.admin(port)
        return client.execute_command("SENTINEL", *words, NAME)

    def primary(self) -> Any:
        """Return the address of the primary that the first Sentinel names."""
        return self.ask(self.sentinels[0], "GET-MASTER-ADDR-BY-NAME")

    def is_ready(self) -> bool:
        with suppress(RedisError):  # a Sentinel that does not know the others yet
            quorums = [self.ask(port, "CKQUORUM") for port in self.sentinels]
            replicas = [self.ask(port, "REPLICAS") for port in self.sentinels]
            states = [self.admin(port).info("replication") for port in self.servers]
            synced = [each["master_link_status"] for each in states if each["role"] == "slave"]
            known = all(b"3 usable" in text for text in quorums) and all(len(each) == 1 for each in replicas)
            return known and synced == ["up"]
        return False

    def url(self) -> str:
        [url] = re.findall(r"^    REDIS_URL=(sentinels:.*)$", OPERATIONS, re.MULTILINE)
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        return str(url).replace("10.0.0.1,10.0.0.2,10.0.0.3", hosts).replace("/etc/ssl/redis-ca.pem", self.files["ca"])


@pytest.fixture(scope="module")
def documented_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Documented]:
    with ExitStack() as stack:
        trio = Documented(tmp_path_factory.mktemp("documented"), stack)
        trio.start()
        yield trio


@contextmanager
def serving() -> Iterator[None]:
    """Answer jobs as a model server does, and join again after an error."""
    server, stopping = ServerQueue({"model": "digits"}, 5), Event()

    def serve() -> None:
        joined = False
        while not stopping.is_set():
            try:
                if not joined:
                    server.join()
                    joined = True
                server.beat()
                batch = server.take(1, wait=0.1)
                answer(server, batch)
            except (RedisError, HeartbeatExpired):
                joined = False
        server.leave()
        server._slot_socket.close()

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        try:
            yield
        finally:
            stopping.set()
            served.result(30)


def run_id(redis: Redis) -> str:
    """Return what identifies a Redis process; "" if it does not answer."""
    with suppress(RedisError):
        return str(redis.info("server")["run_id"])
    return ""


def test_documented_sentinels_serve_a_queue_before_and_after_a_fail_over(
    documented_trio: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", documented_trio.url())
    web, replica = WebQueue(), documented_trio.admin(documented_trio.servers[1])
    with serving():
        web.check()
        answers = [web.ask(IMAGE, time.time() + 20)]
        assert documented_trio.ask(documented_trio.sentinels[1], "FAILOVER") == b"OK"
        answers += [web.ask(IMAGE, time.time() + 20)]
        wait_until(lambda: run_id(web.redis) == run_id(replica), "the web uses the new primary", 20)
        answers += [web.ask(IMAGE, time.time() + 20)]

    assert answers == [ANSWER] * 3
    everyone = [documented_trio.admin(port) for port in [*documented_trio.servers, *documented_trio.sentinels]]
    assert [entry for client in everyone for entry in client.acl_log()] == []


@pytest.mark.slow("starts a service")
def test_documented_sentinels_serve_clients_through_a_fail_over(
    documented_trio: Documented, tmp_path: Path, record_property: Record
) -> None:
    """Apache and the model server too, which read the certificate as users without rights."""
    trio = documented_trio
    wait_until(trio.is_ready, "a fail-over can happen", 60)
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        url = trio.url().replace(trio.files["ca"], shutil.copy(trio.files["ca"], folder))
        where = {"REDIS_URL": url, "IMAGE_QUEUE": "image_queue"}  # the only one that the documented user may use
        with run_service(tmp_path, 1, **where) as service, Load(service.url, clients=8) as load:
            load.wait_for(40)
            old = trio.primary()
            assert trio.ask(trio.sentinels[0], "FAILOVER") == b"OK"
            wait_until(lambda: trio.primary() != old, "another Redis is the primary")
            load.wait_for(80)

    record_property("figures", load.figures)
    assert load.failures == {}
    everyone = [trio.admin(port) for port in [*trio.servers, *trio.sentinels]]
    assert [entry for client in everyone for entry in client.acl_log()] == []


def test_wrong_passwords_and_certificates_are_told_apart(
    documented_trio: Documented, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = documented_trio.url()
    ca, other = documented_trio.files["ca"], make_certificates(tmp_path, "other")["ca"]
    wanted = {
        url: "",
        url.replace("keras-rest-api:PASSWORD", "keras-rest-api:other"): "rejects the password, so check the user and",
        url.replace("SENTINEL-PASSWORD", "other"): "rejects the password, so check sentinel_username and sentinel_pass",
        url.replace("sentinel_username=keras-rest-api&", ""): "check sentinel_username and sentinel_password",
        re.sub("sentinel_[^?]*&", "", url): "requires a password, so set sentinel_password",
        url.replace(ca, other): "presents an untrusted certificate, so check ssl_ca_certs",
        url.replace("ssl_ca_certs=", "ssl_ca_certs=/no/such/file"): "REDIS_URL names a file that does not exist",
        url.replace("sentinels://", "sentinel://").partition("&ssl")[0]: "if it requires TLS, begin REDIS_URL with",
    }
    for each, words in wanted.items():
        monkeypatch.setattr(settings, "REDIS_URL", each)
        assert words in fault(), each
        assert bool(fault()) == bool(words)
        assert not any(secret in fault() for secret in SECRETS)


def test_tls_files_are_read_before_root_is_given_up(
    documented_trio: Documented, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(Path(documented_trio.files["ca"]).read_text())
    monkeypatch.setattr(settings, "REDIS_URL", documented_trio.url().replace(documented_trio.files["ca"], str(ca)))

    privileges._read_ahead()
    ca.unlink()

    assert fault() == ""


def test_an_image_crosses_the_replication_link_once(
    documented_trio: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes of the buffers in docs/operations.md rely on it."""
    monkeypatch.setattr(settings, "REDIS_URL", documented_trio.url())
    web, image = WebQueue(), b64encode(bytes(224 * 224 * 3)).decode()

    def sent() -> int:
        return int(web.redis.info("replication")["master_repl_offset"])

    with serving():
        wait_until(lambda: web.redis.info("replication")["connected_slaves"] == 1, "the replica is connected")
        web.ask(image, time.time() + 20)
        before = sent()
        for _ in range(10):
            web.ask(image, time.time() + 20)
        each = (sent() - before) / 10

    assert 200_000 < each < 210_000


def test_documented_sizes_of_the_buffers_are_the_rate_times_seconds() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+)mb \| (\d+)mb (\d+)mb 60 \|$", OPERATIONS, re.MULTILINE)

    for images, rate, backlog, hard, soft in [map(int, row) for row in rows]:
        assert rate == images // 5
        assert (backlog, hard, soft) == (10 * rate, 30 * rate, 15 * rate)
    assert len(rows) == 4
    assert (
        "repl-backlog-size 200mb\nclient-output-buffer-limit replica 600mb 300mb 60\n"
        in documented("Redis that fails over")[0]
    )
