"""Several hosts under load: they die, are cut off, drain and join, and only a dead web host loses requests.

The hosts are network namespaces (tests/host_bed.py), and their clocks differ by hours. A run prints the figures for the
table of faults in docs/reliability.md.
"""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness import ROOT, wait_until
from host_bed import HostBed, host_bed
from load import CLIENTS, Load, Outcome, Record

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

USUAL = 1.0  # seconds within which every answer comes while nothing is wrong
CUT = 10.0  # seconds
KEPT_ALIVE = 30.0  # seconds within which HAProxy notices that a host no longer acknowledges anything


@pytest.fixture(scope="module")
def bed() -> Iterator[HostBed]:
    with host_bed() as bed:
        yield bed


class Fault:
    """A load, and when the fault began in it, by time.monotonic()."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.begun = 0.0

    def begin(self) -> None:
        """Note the time."""
        self.begun = time.monotonic()

    @property
    def lost(self) -> list[Outcome]:
        """The requests without a right answer."""
        return [each for each in self.load.outcomes if not each.right]

    @property
    def recovery(self) -> str:
        """When the last late answer came. The requests that are lost do not count."""
        late = [each for each in self.load.outcomes if each.right and each.seconds > USUAL]
        ends = [each.started + each.seconds - self.begun for each in late]
        return f"recovered after {max(ends):.1f} s" if ends else f"every answer within {USUAL:g} s"


@contextmanager
def under_load(bed: HostBed, record: Record) -> Iterator[Fault]:
    """Cause a fault in the block, which must call begin(). Afterwards, its figures are recorded."""
    bed.wait_until_whole()
    with Load(bed.url, sessions=CLIENTS // 2) as load:
        load.wait_for(200)
        yield (fault := Fault(load))
        load.wait_for(300)
    record("figures", f"{load.figures}, {fault.recovery}")


def wait(seconds: float) -> None:
    """Wait for so long, as the fault does."""
    over = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > over, "the time is over", seconds + 1)


def test_a_dead_web_host_loses_only_the_requests_that_it_held(bed: HostBed, record_property: Record) -> None:
    """It loses power: no packet says that its connections have ended."""
    with under_load(bed, record_property) as fault:
        bed.on["one"].lose_power()
        fault.begin()
        wait_until(lambda: bed.states()["one"] == "DOWN", "HAProxy stops asking it")
    bed.on["one"].cable("up")
    bed.start_web("one")

    assert len(fault.lost) < CLIENTS
    assert all(each.started < fault.begun and each.seconds < KEPT_ALIVE for each in fault.lost)
    # HAProxy only closes a connection that has had an answer before, as for a request that a browser may send again.
    assert {each.status for each in fault.lost} <= {502, 0}
    assert {each.code for each in fault.lost if each.status} <= {"bad_gateway"}


def test_a_dead_model_host_loses_nothing(bed: HostBed, record_property: Record) -> None:
    with under_load(bed, record_property) as fault:
        bed.on["model1"].lose_power()
        fault.begin()
        wait_until(lambda: len(bed.model_servers()) == 1, "its heartbeat expires")
    bed.on["model1"].cable("up")
    bed.start_model_server("model1")

    assert fault.load.failures == {}


@pytest.mark.parametrize("name", ["one", "model1", "primary"])
def test_a_host_cut_off_for_ten_seconds_loses_nothing(bed: HostBed, record_property: Record, name: str) -> None:
    """A web host, a model host, and the host of Redis' primary with its Sentinel."""
    host = bed.primary if name == "primary" else bed.on[name]
    with under_load(bed, record_property) as fault:
        host.cable("down")
        fault.begin()
        wait(CUT)
        host.cable("up")

    assert fault.load.failures == {}


def test_a_dead_host_of_the_redis_primary_loses_nothing(bed: HostBed, record_property: Record) -> None:
    with under_load(bed, record_property) as fault:
        host = bed.primary
        host.lose_power()
        fault.begin()
        wait_until(lambda: bed.primary != host, "another Redis is the primary", 60)
    host.cable("up")
    bed.restart_redis(host)

    assert fault.load.failures == {}


def test_a_web_host_that_drains_for_an_upgrade_loses_nothing(bed: HostBed, record_property: Record) -> None:
    """The commands of docs/scaling.md."""
    [command] = re.findall(r'echo "(set server .*)"', (ROOT / "docs/scaling.md").read_text())
    apache = bed.web["one"]
    with under_load(bed, record_property) as fault:
        fault.begin()
        assert bed.admin(command).strip() == ""
        wait_until(lambda: bed.states()["one"] == "DRAIN", "HAProxy sends it no new requests")
        apache.send(signal.SIGWINCH)  # what `apachectl graceful-stop` sends
        assert apache.popen.wait(60) == 0
        bed.start_web("one")
        bed.admin(command.replace("drain", "ready"))
        wait_until(lambda: bed.states()["one"] == "UP", "HAProxy uses it again")

    assert fault.load.failures == {}


def test_a_model_host_that_joins_takes_its_share(bed: HostBed, record_property: Record) -> None:
    with under_load(bed, record_property) as fault:
        fault.begin()
        server = bed.start_model_server("model3")
        server.wait_for_log("* Batch size:")
        took = time.monotonic() - fault.begun
        wait_until(lambda: sum(server.batches) > 50, "it computes images")
    record_property("figures", f"the host computes images {took:.1f} s after its start")

    assert fault.load.failures == {}
    assert server.stop() == 0
