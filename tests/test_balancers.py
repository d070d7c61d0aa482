"""deploy/haproxy and deploy/nginx: the real HAProxy and nginx in front of two Apaches."""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import requests
from haproxy import admin, haproxy_command
from harness import (
    ROOT,
    Process,
    apache_of,
    descendants,
    free_port,
    kill_at_once,
    need,
    responds,
    run_apache,
    running,
    wait_until,
)
from harness import run_model_server as model_server
from load import Load, Record, ask, known_images
from redis import Redis

pytestmark = pytest.mark.tools


@dataclass
class Balanced:
    """Two web hosts behind a balancer."""

    url: str
    hosts: list[str]
    folder: Path
    process: Process

    @property
    def log(self) -> str:
        """The log of the balancer's requests."""
        return (self.folder / "requests").read_text()


def local_haproxy(folder: Path, port: int, ports: list[int]) -> list[str]:
    """The command that runs HAProxy with its configuration of deploy/."""
    hosts = {f"192.0.2.{11 + i}:80": f"127.0.0.1:{port}" for i, port in enumerate(ports)}
    return haproxy_command(folder, {**hosts, "bind :80": f"bind 127.0.0.1:{port}", "slowstart 10s": ""})


def nginx_command(folder: Path, port: int, ports: list[int]) -> list[str]:
    """The command that runs nginx with its configuration of deploy/, as Debian's nginx.conf includes it."""
    site = (ROOT / "deploy/nginx/keras-rest-api.conf").read_text().replace("listen 80", f"listen {port}")
    for i, host in enumerate(ports):
        site = site.replace(f"192.0.2.{11 + i}:80", f"127.0.0.1:{host}")
    (folder / "site.conf").write_text(site)
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    log = "log_format hosts '$upstream_addr $status'; access_log /dev/stdout hosts;"
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 2; pid {folder}/pid; error_log stderr; events {{ worker_connections 768; }}"
        f"http {{ {places} {log} include {folder}/site.conf; }}"
    )
    return [need("nginx"), "-e", "stderr", "-c", str(folder / "nginx.conf")]


COMMANDS: dict[str, Callable[[Path, int, list[int]], list[str]]] = {"haproxy": local_haproxy, "nginx": nginx_command}


@contextmanager
def balanced(kind: str, **environment: str) -> Iterator[Balanced]:
    """Run two Apaches behind a balancer, `kind`."""
    need(kind)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        folder.chmod(0o755)
        settings = {"TRUSTED_PROXIES": "127.0.0.1"} | environment
        hosts = [stack.enter_context(run_apache(log=folder / f"host{i}", **settings)) for i in range(2)]  # type: ignore[arg-type]
        port = free_port()
        command = COMMANDS[kind](folder, port, [int(host.rpartition(":")[2]) for host in hosts])
        process = stack.enter_context(running(command, folder / "requests"))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: responds(url) or not process.alive, f"{kind} answers: {process.log}")
        assert process.alive, process.log
        yield Balanced(url, hosts, folder, process)


def kill_host(url: str) -> None:
    """End an Apache and its web processes at once, as when the machine loses power."""
    apache = apache_of(url)
    kill_at_once([apache, *descendants(apache)])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", COMMANDS)
def test_dead_host_loses_only_what_it_held(kind: str, redis: Redis, tmp_path: Path, record_property: Record) -> None:
    queue = f"queue-{free_port()}"
    with balanced(kind, IMAGE_QUEUE=queue) as service, model_server(tmp_path / "log", IMAGE_QUEUE=queue):
        with Load(service.url) as load:
            load.wait_for(200)
            kill_host(service.hosts[0])
            load.wait_for(300)
        ports = [host.rpartition(":")[2] for host in service.hosts]
        if kind == "nginx":
            served = Counter(re.findall(r"127\.0\.0\.1:(\d+) 200", service.log))
        else:
            names = re.findall(r"(?:ready|live)/(one|two) .* 200 ", service.log)
            served = Counter(ports[name == "two"] for name in names)

    assert min(served[port] for port in ports) > 40  # both hosts served
    lost = [each for each in load.outcomes if not each.right]
    assert {each.status for each in lost} <= {502}
    assert len(lost) <= 32  # at most one for each client: those in flight when the host died
    assert {each.code for each in lost} <= {"bad_gateway"}  # as JSON, like the service's own errors
    late = [each for each in lost if each.started > min(o.started for o in lost) + 3]
    assert late == []
    record_property("figures", f"{kind}: {load.figures}, all in the dead host")


@pytest.mark.parametrize(
    ("kind", "status", "code", "retry"), [("haproxy", 503, "unavailable", "5"), ("nginx", 502, "bad_gateway", None)]
)
def test_without_a_host_the_error_is_json(kind: str, status: int, code: str, retry: str | None, redis: Redis) -> None:
    with balanced(kind, IMAGE_QUEUE=f"queue-{free_port()}") as service:
        for host in service.hosts:
            kill_host(host)
        answer = requests.post(f"{service.url}/predict", timeout=30)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers.get("Retry-After") == retry


@pytest.mark.parametrize("kind", COMMANDS)
def test_web_sees_the_clients_address(kind: str, redis: Redis) -> None:
    """All clients are 127.0.0.1 here, so the client connects from another address of the loopback network."""
    queue = f"queue-{free_port()}"
    with balanced(kind, IMAGE_QUEUE=queue, RATE_LIMIT="100/hour") as service:
        forged = {"X-Forwarded-For": "198.51.100.9"}
        for source in ("127.0.0.2", "127.0.0.3"):
            with requests.Session() as session:
                session.mount("http://", From(source))
                assert session.post(f"{service.url}/predict", headers=forged, timeout=10).status_code == 400

    counted = sorted(key.decode() for key in redis.scan_iter(f"{queue}:limit:*"))
    assert [re.findall(r"127\.0\.0\.\d|198\S+", key)[:1] for key in counted] == [["127.0.0.2"], ["127.0.0.3"]]


class From(requests.adapters.HTTPAdapter):
    """Connects from an address of this machine."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *arguments: object, **options: object) -> None:
        super().init_poolmanager(*arguments, source_address=(self.address, 0), **options)  # type: ignore


@pytest.mark.parametrize("kind", COMMANDS)
def test_large_uploads_reach_the_service(kind: str, redis: Redis) -> None:
    """The service's own error says how large an image may be."""
    with balanced(kind, IMAGE_QUEUE=f"queue-{free_port()}") as service:
        answer = requests.post(f"{service.url}/predict", data=bytes(20_000_000), timeout=30)

    assert answer.status_code == 413
    assert "16.8 MB" in answer.json()["error"]["message"] or "16 MB" in answer.json()["error"]["message"]


@pytest.mark.timeout(120)
def test_drained_host_loses_nothing(redis: Redis, tmp_path: Path, record_property: Record) -> None:
    """The commands of docs/scaling.md: drain a host in HAProxy, then stop its Apache gracefully."""
    queue = f"queue-{free_port()}"
    server = model_server(tmp_path / "log", IMAGE_QUEUE=queue)
    with balanced("haproxy", IMAGE_QUEUE=queue) as service, server, Load(service.url) as load:
        load.wait_for(150)
        wait_until(lambda: admin(service.folder, "show stat ready 4 -1").count(",UP,") == 2, "both hosts are ready")
        [command] = re.findall(r'echo "(set server .*)"', (ROOT / "docs/scaling.md").read_text())
        assert admin(service.folder, command).strip() == ""
        wait_until(lambda: admin(service.folder, "show stat").count(",DRAIN,") == 2, "the host is drained")
        os.kill(apache_of(service.hosts[0]), signal.SIGWINCH)
        wait_until(lambda: not responds(service.hosts[0]), "the host accepts no more requests")
        load.wait_for(150)

    assert load.failures == {}
    record_property("figures", load.figures)


@pytest.mark.timeout(120)
def test_requests_wait_while_no_host_is_ready(redis: Redis, tmp_path: Path) -> None:
    """Without a model server /readyz fails on every host. HAProxy must not reject what the queue would keep."""
    queue = f"queue-{free_port()}"
    image = known_images()[0]
    with balanced("haproxy", IMAGE_QUEUE=queue) as service:
        wait_until(lambda: admin(service.folder, "show stat ready 4 -1").count(",DOWN,") == 2, "no host is ready")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, service.url, image)
            with model_server(tmp_path / "log", IMAGE_QUEUE=queue):
                assert asked.result(60).right
