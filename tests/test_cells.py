"""Three cells behind HAProxy, each with its own Redis, web and model server: one dies, and the others go on.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from haproxy import haproxy_command
from harness import (
    Service,
    answers,
    apache_of,
    descendants,
    free_port,
    kill_at_once,
    responds,
    run_redis,
    run_service,
    running,
    wait_until,
)
from load import CLIENTS, Load, Record
from redis import Redis

pytestmark = pytest.mark.fault

CELLS = ("one", "two", "three")


class Cell:
    """A whole service with a Redis of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        folder.mkdir()
        port = free_port()
        self.redis = stack.enter_context(run_redis(folder / "redis", port))
        wait_until(lambda: answers(Redis(port=port)), "Redis answers")
        self.service: Service = stack.enter_context(
            run_service(folder, REDIS_PORT=str(port), IMAGE_QUEUE="image_queue")
        )

    @property
    def address(self) -> str:
        return self.service.url.removeprefix("http://")

    def pids(self) -> list[int]:
        """All its processes."""
        apache = apache_of(self.service.url)
        return [apache, *descendants(apache), self.redis.popen.pid, self.service.servers[0].popen.pid]


@pytest.fixture
def cells(tmp_path: Path) -> Iterator[list[Cell]]:
    with ExitStack() as stack, ThreadPoolExecutor(len(CELLS)) as pool:
        yield list(pool.map(lambda name: Cell(tmp_path / name, stack), CELLS))


@pytest.fixture
def balancer(cells: list[Cell], tmp_path: Path) -> Iterator[str]:
    """The URL of an HAProxy with the configuration of deploy/, for these cells; its log is the file haproxy.log."""
    changes = {
        "192.0.2.11:80": cells[0].address, "192.0.2.12:80": f"{cells[1].address}\n    server three {cells[2].address}",
        "bind :80": f"bind 127.0.0.1:{(port := free_port())}", "slowstart 10s": "",
    }  # fmt: skip
    command = haproxy_command(tmp_path, changes)
    with running(command, tmp_path / "haproxy.log") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: responds(url, "/readyz") or not process.alive, f"HAProxy answers: {process.log}")
        yield url


def answered(log: Path) -> dict[str, int]:
    """How many requests each cell has answered, as HAProxy logged them."""
    names = re.findall(r" ready/(\w+) .* 200 .*/predict", log.read_text())
    return {name: names.count(name) for name in CELLS}


def test_one_of_three_cells_dies_and_only_its_requests_in_flight_are_lost(
    cells: list[Cell], balancer: str, tmp_path: Path, record_property: Record
) -> None:
    log = tmp_path / "haproxy.log"
    with Load(balancer) as load:
        wait_until(lambda: min(answered(log).values()) > 30, "each cell has answered some requests", 120)
        pids, killing = cells[0].pids(), time.monotonic()
        kill_at_once(pids)
        killed, before = time.monotonic(), answered(log)
        wait_until(lambda: "ready/one is DOWN" in log.read_text(), "HAProxy stops asking the dead cell")
        noticed = time.monotonic() - killed
        wait_until(lambda: all(answered(log)[name] > before[name] + 60 for name in CELLS[1:]), "the others go on", 120)

    lost = [outcome for outcome in load.outcomes if not outcome.right]
    assert {outcome.status for outcome in lost} <= {502}
    assert all(outcome.started < killed and killing < outcome.started + outcome.seconds for outcome in lost)
    assert 0 < len(lost) < CLIENTS
    record_property("figures", f"{load.figures}, all in flight in the dead cell; HAProxy notices after {noticed:.1f} s")
