"""A primary dies, freezes, is cut off or is replaced under load: the Sentinels name another, and nothing is lost.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Service, run_service, wait_until
from load import Load, Record
from namespaces import hosts
from sentinels import NAME, Trio, client_of, run_trio

pytestmark = pytest.mark.fault

MARGIN = 5  # seconds that the longest answer may take beyond the fail-over


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with run_trio(tmp_path_factory.mktemp("trio")) as trio:
        yield trio


@pytest.fixture(scope="module")
def behind_sentinels(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with run_service(tmp_path_factory.mktemp("service"), REDIS_URL=trio.url) as service:
        yield service


def fail_over(service: Service, trio: Trio, fault: Callable[[], object], record: Record, *, seconds: float = 0) -> None:
    """Cause `fault` under load, check that nothing is lost within `seconds` or more, and record the figures."""
    wait_until(trio.is_ready, "a fail-over can happen", 60)
    with Load(service.url) as load:
        load.wait_for(100)
        usual = max(outcome.seconds for outcome in load.outcomes)  # on a busy machine this is not zero
        begun = time.monotonic()
        took = trio.seconds_to_another_primary(fault)
        wait_until(lambda: time.monotonic() > begun + seconds, "the fault is over", seconds + 1)
        load.wait_for(200)

    longest = max(outcome.seconds for outcome in load.outcomes)
    record("figures", f"{load.figures}; another primary after {took:.1f} s")
    assert load.failures == {}
    assert longest < took + MARGIN + usual


def test_a_primary_killed_behind_sentinels_loses_nothing(
    behind_sentinels: Service, trio: Trio, record_property: Record
) -> None:
    killed = trio.primary

    fail_over(behind_sentinels, trio, trio.servers[killed].popen.kill, record_property)

    assert trio.primary != killed
    trio.restart(killed)


def test_a_primary_frozen_for_twelve_seconds_behind_sentinels_loses_nothing(
    behind_sentinels: Service, trio: Trio, record_property: Record
) -> None:
    frozen = trio.servers[trio.primary]

    def freeze() -> None:
        frozen.send(signal.SIGSTOP)
        threading.Timer(12, frozen.send, [signal.SIGCONT]).start()

    fail_over(behind_sentinels, trio, freeze, record_property, seconds=20)


def test_a_fail_over_on_request_behind_sentinels_loses_nothing(
    behind_sentinels: Service, trio: Trio, record_property: Record
) -> None:
    def switch() -> None:
        client_of(trio.sentinels[0]).sentinel_failover(NAME)

    fail_over(behind_sentinels, trio, switch, record_property)


def test_a_primary_cut_off_behind_sentinels_loses_nothing(tmp_path: Path, record_property: Record) -> None:
    """The network of the primary and of one Sentinel is cut, and is restored after the fail-over."""
    with (
        hosts(there=1) as on,
        run_trio(tmp_path, on["there"]) as trio,
        run_service(tmp_path, REDIS_URL=trio.url) as service,
    ):

        def cut() -> None:
            on["there"].cable("down")
            threading.Timer(10, on["there"].cable, ["up"]).start()

        fail_over(service, trio, cut, record_property, seconds=15)
