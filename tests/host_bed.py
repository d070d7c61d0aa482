"""A service on several hosts, each with its own network, for test_faults_hosts.py."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from clocks import wrong_clock
from haproxy import admin, haproxy_command
from harness import ROOT, Process, ready, responds, running, wait_until
from namespaces import Host, hosts
from sentinels import Trio

# The names are those of deploy/haproxy/haproxy.cfg, and so are the numbers: 192.0.2.11 is the host "one".
NUMBERS = {"balancer": 1, "one": 11, "two": 12, "redis1": 21, "redis2": 22, "model1": 31, "model2": 32, "model3": 33}
CLOCKS = {"one": 40.0, "two": -7200.0, "model1": 90.0, "model2": -10800.0}  # seconds that a host's clock is fast
APACHE = {"APP_PORT": "80", "APACHE_DEFINES": "WEB_PROCESSES=2 WEB_THREADS=320"}


class HostBed:
    """A balancer, two web hosts, two Redis hosts and two model hosts; a third model host is empty.

    Each Redis host has a Sentinel, and the balancer has the third.
    """

    def __init__(self, folder: Path, on: dict[str, Host], stack: ExitStack) -> None:
        self.on = on
        self.url = f"http://{on['balancer'].address}"
        self._folder = folder
        self._stack = stack
        self.trio = trio = Trio(folder, stack)
        redis1, redis2, balancer = (on[name] for name in ("redis1", "redis2", "balancer"))
        primary = trio.add_server(redis1.address, prefix=redis1.prefix)
        trio.add_server(redis2.address, "--replicaof", primary.host, str(primary.port), prefix=redis2.prefix)
        for host in (redis1, redis2, balancer):
            trio.add_sentinel(host.address, primary, host.prefix)
        wait_until(trio.is_ready, "the Sentinels know all", 60)
        for name in ("model1", "model2"):
            self.start_model_server(name)
        self.web: dict[str, Process] = {}
        for name in ("one", "two"):
            self.start_web(name)
        self._start_balancer()
        self.wait_until_whole()

    def _start_balancer(self) -> None:
        host = self.on["balancer"]
        command = haproxy_command(self._folder, {"192.0.2.": host.address.removesuffix("1")})
        process = self._run("balancer", command)
        wait_until(lambda: responds(self.url) or not process.alive, f"HAProxy answers: {process.log}")

    def start_model_server(self, name: str) -> Process:
        """Start a model server on a host. Does not wait until it is ready."""
        return self._run(name, [sys.executable, "run_model_server.py"])

    def start_web(self, name: str) -> None:
        """Start Apache on a host, and wait until it answers."""
        run_directory = mkdtemp(prefix=f"apache-{name}-", dir=self._folder)  # new, like /run of a started machine
        trusted = {"TRUSTED_PROXIES": self.on["balancer"].address}
        command = [str(ROOT / "deploy/apache/run-private")]
        process = self.web[name] = self._run(name, command, RUN_DIR=run_directory, **APACHE, **trusted)
        url = f"http://{self.on[name].address}"
        wait_until(lambda: responds(url) or not process.alive, f"Apache answers: {process.log}", 60)

    def _run(self, name: str, command: list[str], **environment: str) -> Process:
        clock = wrong_clock(self._folder / "clock", CLOCKS.get(name, 0))
        where = {"REDIS_URL": self.trio.url, **clock, **environment}
        return self._stack.enter_context(running([*self.on[name].prefix, *command], self._folder / name, **where))

    @property
    def primary(self) -> Host:
        """The host of the Redis primary."""
        address = self.trio.primary.host
        return next(host for host in self.on.values() if host.address == address)

    def restart_redis(self, host: Host) -> None:
        """Start the Redis and the Sentinel of a host again."""
        for place in [place for place in self.trio.servers if place.host == host.address]:
            self.trio.restart(place)
        for place in [place for place in self.trio.sentinels if place.host == host.address]:
            self.trio.restart_sentinel(place)

    def admin(self, command: str) -> str:
        """Send a command to HAProxy."""
        return admin(self._folder, command)

    def states(self) -> dict[str, str]:
        """Return what HAProxy says of each web host: UP, DOWN, DRAIN, ..."""
        rows = [row.split(",") for row in self.admin("show stat ready 4 -1").splitlines()[1:] if row]
        return {row[1]: row[17].split()[0] for row in rows}

    def model_servers(self) -> list[str]:
        """Return the names of the live model servers, as /readyz lists them."""
        return list(ready(self.url).get("model_servers", {}))

    def wait_until_whole(self) -> None:
        """Wait until every part of every host takes part."""
        wait_until(lambda: set(self.states().values()) == {"UP"}, "HAProxy uses both web hosts", 120)
        wait_until(lambda: len(self.model_servers()) == 2, "both model servers are alive", 120)
        wait_until(self.trio.is_ready, "a fail-over can happen", 120)


@contextmanager
def host_bed() -> Iterator[HostBed]:
    """Run the hosts. Raises Missing where network namespaces are forbidden."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="keras-rest-api-test-")))
        folder.chmod(0o755)  # Apache runs as www-data
        yield HostBed(folder, stack.enter_context(hosts(**NUMBERS)), stack)
