"""Each web process keeps to cores of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness import ROOT, run_apache, wait_until, web_processes

from web.cores import THREADS, Cores, set_cores, share_of
from web.process import keep_to_own_cores
from web.turns import Turns

ALL = os.sched_getaffinity(0)
# A web process that has a number, until its standard input is closed.
WITH_NUMBER = """if True:
    import sys
    from pathlib import Path
    from web.turns import Turns
    print(Turns(lambda: Path(sys.argv[1]), int(sys.argv[2])).number(), flush=True)
    sys.stdin.read()
"""

several_cores = pytest.mark.skipif(len(ALL) < 2, reason="needs two cores")


@contextmanager
def process_with_number(folder: Path, count: int) -> Iterator[int]:
    """Run a process that claims one of `count` numbers; give the number."""
    command = [sys.executable, "-c", WITH_NUMBER, str(folder), str(count)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.communicate(timeout=10)


@pytest.fixture(autouse=True)
def all_cores_afterwards() -> Iterator[None]:
    yield
    for thread in THREADS.iterdir():
        set_cores(int(thread.name), ALL)


def cores_of(pid: int) -> set[frozenset[int]]:
    """Return the sets of cores that the threads of a process may use."""
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir(f"/proc/{pid}/task")}


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [
        pytest.param(2, 2, [{0}, {1}], id="one each"),
        pytest.param(16, 4, [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}], id="four each"),
        pytest.param(5, 2, [{0, 1}, {2, 3, 4}], id="one core left over"),
        pytest.param(2, 4, [{0}, {1}], id="more processes than cores, of which two get no number"),
        pytest.param(1, 2, [{0}], id="one core"),
        pytest.param(3, 1, [{0, 1, 2}], id="one process"),
    ],
)
def test_every_core_is_in_the_share_of_one_process(cores: int, processes: int, expected: list[set[int]]) -> None:
    shares = [share_of(range(cores), number, processes) for number in range(min(cores, processes))]

    assert shares == expected


@several_cores
def test_threads_old_and_new_keep_to_the_own_cores_except_to_use_all_for_a_while() -> None:
    cores, own, stop = Cores(), {max(ALL)}, threading.Event()
    threading.Thread(target=stop.wait, args=[30]).start()
    seen = []

    cores.keep_to(own)
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join(10)
    assert cores_of(os.getpid()) == {frozenset(own)}
    with cores.use_all():
        assert os.sched_getaffinity(0) == ALL
    assert os.sched_getaffinity(0) == own
    assert seen == [own]
    stop.set()


@several_cores
def test_an_image_with_a_borrowed_turn_may_use_every_core(tmp_path: Path) -> None:
    """Its own core decodes another image at that time."""
    turns = Turns(lambda: tmp_path, 2)
    turns.cores.keep_to({min(ALL)})

    with turns.turn(0):
        assert os.sched_getaffinity(0) == {min(ALL)}
        with turns.turn(10):
            assert os.sched_getaffinity(0) == ALL
        assert os.sched_getaffinity(0) == {min(ALL)}


@several_cores
def test_a_process_waits_for_the_share_of_an_older_one(tmp_path: Path) -> None:
    with ExitStack() as older:
        numbers = [older.enter_context(process_with_number(tmp_path, len(ALL))) for _ in ALL]
        turns = Turns(lambda: tmp_path, processes=len(ALL))
        keep_to_own_cores(turns)
        assert sorted(numbers) == list(range(len(ALL)))
        assert os.sched_getaffinity(0) == ALL

    wait_until(lambda: len(os.sched_getaffinity(0)) == 1, "the process keeps to its core")


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(lambda folder: Turns(lambda: folder, len(ALL) - 1, len(ALL)), id="a quota of CPU time"),
        pytest.param(lambda folder: Turns(lambda: folder, len(ALL)), id="not Apache"),
        pytest.param(lambda _: Turns(lambda: Path("/proc/nothing"), processes=len(ALL)), id="no folder"),
    ],
)
@several_cores
def test_without_a_share_every_core_is_used(tmp_path: Path, turns: Callable[[Path], Turns]) -> None:
    keep_to_own_cores(turns(tmp_path))

    assert cores_of(os.getpid()) == {frozenset(ALL)}


def test_apaches_web_processes_have_a_core_each_even_after_a_crash() -> None:
    with run_apache(APACHE_DEFINES=f"WEB_PROCESSES={len(ALL)} WEB_THREADS=8") as url:

        def cores() -> list[set[frozenset[int]]]:
            """Return the cores of each process, once all threads have started."""
            processes = web_processes(url)
            started = all(len(os.listdir(f"/proc/{pid}/task")) > 8 for pid in processes)
            return sorted(map(cores_of, processes), key=str) if started else []

        expected = sorted(({frozenset({core})} for core in ALL), key=str)
        wait_until(lambda: cores() == expected, "each process has a core", 30)
        killed = web_processes(url)[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in web_processes(url) and cores() == expected, "the new one has it", 30)
