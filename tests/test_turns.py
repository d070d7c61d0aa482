"""The limit on images decoded at once, in all web processes together."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Service, resident_bytes, wait_until, web_processes
from hostile.png import header, make_png

import settings
import web.turns
from helpers import cgroup_quota
from web.turns import NoTurn, Turns

# A process whose threads hold a turn for 20 ms each, and that prints when each began and ended.
WORKER = """if True:
    import sys, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from web.turns import Turns
    turns, jobs = Turns(lambda: Path(sys.argv[1]), 2), int(sys.argv[2])
    def job(number):
        with turns.turn(60):
            begun = time.monotonic()
            time.sleep(0.02)
            return begun, time.monotonic()
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(60) as threads:
        for span in threads.map(job, range(jobs)):
            print(*span, flush=True)
"""


def start_workers(folder: Path, count: int, jobs: int) -> list[subprocess.Popen[str]]:
    """Start `count` workers, and let all of them begin their jobs when all are ready."""
    command = [sys.executable, "-c", WORKER, str(folder), str(jobs)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[Any] = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(count)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return workers


def spans(printed: str) -> list[tuple[float, float]]:
    return [(float(begun), float(ended)) for begun, ended in map(str.split, printed.splitlines())]


def max_at_once(jobs: list[tuple[float, float]]) -> int:
    return max(sum(begun <= at < ended for begun, ended in jobs) for at, _ in jobs)


def test_turns_limit_all_processes_together(tmp_path: Path) -> None:
    workers = start_workers(tmp_path, 3, 60)
    done = [spans(worker.communicate(timeout=60)[0]) for worker in workers]

    assert [len(jobs) for jobs in done] == [60, 60, 60]
    assert max_at_once([job for jobs in done for job in jobs]) == 2
    # No process waits for the others to finish: each has done at least 10 jobs in the first half of the time.
    begun, ended = min(jobs[0][0] for jobs in done), max(jobs[-1][1] for jobs in done)
    for jobs in done:
        assert sum(job[1] < (begun + ended) / 2 for job in jobs) >= 10


def test_killed_process_releases_its_turns(tmp_path: Path) -> None:
    [worker] = start_workers(tmp_path, 1, 10_000)
    assert worker.stdout
    worker.stdout.readline()

    worker.kill()
    worker.communicate(timeout=10)

    with Turns(lambda: tmp_path, 1).turn(5):
        pass


def start_waiting(turns: Turns, order: list[int], number: int, seconds: float) -> threading.Thread:
    """Start a thread that waits for a turn and then appends `number` to `order`; return once it waits."""

    def wait() -> None:
        try:
            with turns.turn(seconds):
                order.append(number)
        except NoTurn:
            order.append(-number)

    thread, before = threading.Thread(target=wait), len(turns.waiting)
    thread.start()
    wait_until(lambda: len(turns.waiting) > before, "the thread waits")
    return thread


def test_turns_come_in_order_of_arrival_except_for_those_that_gave_up(tmp_path: Path) -> None:
    turns, order = Turns(lambda: tmp_path, 1), list[int]()
    with turns.turn(0):
        threads = [start_waiting(turns, order, number, 1 if number == 3 else 30) for number in range(1, 6)]
        threads[2].join(10)

    for thread in threads:
        thread.join(10)
    assert order == [-3, 1, 2, 4, 5]


def test_waiting_thread_gets_the_first_turn_that_another_process_releases(tmp_path: Path) -> None:
    """The threads of two Turns lock different open files, as those of two processes do."""
    mine, theirs, order = Turns(lambda: tmp_path, 2), Turns(lambda: tmp_path, 2), list[int]()
    with theirs.turn(0):
        with theirs.turn(0):
            thread = start_waiting(mine, order, 1, 30)
        thread.join(10)  # the other turn is still held
        assert order == [1]


def test_waiting_thread_borrows_the_turn_that_another_process_leaves_free(tmp_path: Path) -> None:
    turns = Turns(lambda: tmp_path, 2)

    with turns.turn(0), turns.turn(10), pytest.raises(NoTurn), turns.turn(0.05):
        pass


def test_a_process_gets_its_own_turn_before_another_gets_a_second_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(web.turns, "KEEP", 0.0)  # so that the turn becomes free for both
    monkeypatch.setattr(web.turns, "BORROW_AFTER", 0.5)
    mine, theirs, order = Turns(lambda: tmp_path, 2), Turns(lambda: tmp_path, 2), list[int]()
    with mine.turn(0):
        with theirs.turn(0):
            threads = [start_waiting(mine, order, 1, 30), start_waiting(theirs, order, 2, 30)]
        for thread in threads:
            thread.join(10)
    assert order == [2, 1]


def test_error_in_a_turn_affects_no_other(tmp_path: Path) -> None:
    turns = Turns(lambda: tmp_path, 1)

    with pytest.raises(ZeroDivisionError), turns.turn(0):
        1 // 0  # noqa: B018
    with turns.turn(0):
        pass


def test_without_a_folder_each_process_has_its_own_turns(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns(lambda: Path("/proc/nothing"), 1)

    for _ in range(3):
        # A thread that had waited for the last turn in vain may still hold it for a moment.
        with turns.turn(5), pytest.raises(NoTurn), turns.turn(0.05):
            pass
    with turns.memory(settings.MAX_DECODE_BYTES, 1):
        pass

    assert len([line for line in caplog.messages if "limits decoding by itself" in line]) == 1


def test_memory_of_an_image_that_failed_is_free_when_another_gets_it(tmp_path: Path) -> None:
    """Its error, which is still on its way to the response, must not keep it alive."""
    turns = Turns(lambda: tmp_path)
    alive: list[object] = []
    seen: list[tuple[str, int]] = []

    class Pixels:
        def __init__(self) -> None:
            alive.append(self.__class__)

        def __del__(self) -> None:
            alive.clear()

    def prepare() -> None:
        pixels = Pixels()
        raise ValueError(f"{pixels} can't be decoded")

    lock = turns.locks.lock

    def noticed(name: str, how: int = 0) -> Any:
        release = lock(name, how)

        def look_and_release() -> None:
            seen.append((name, len(alive)))
            if release:
                release()

        return release and look_and_release

    turns.locks.lock = noticed  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="decoded"), turns.memory(settings.MAX_DECODE_BYTES, 1):
        prepare()

    assert {count for name, count in seen if name.startswith("share-")} == {0}


def test_memory_wait_ends_at_its_limit(tmp_path: Path) -> None:
    turns, half, got = Turns(lambda: tmp_path, 4), settings.MAX_DECODE_BYTES // 2, threading.Event()

    def take_half() -> None:
        with turns.memory(half, 30):
            got.set()

    waiting = threading.Thread(target=take_half)
    with turns.memory(half, 1), turns.memory(half, 1):
        with turns.memory(1_000_000, 0):
            pass  # small images need no share
        with pytest.raises(NoTurn), turns.memory(half, 0.05):
            pass
        waiting.start()
        assert not got.wait(0.1)

    assert got.wait(10)
    waiting.join(10)
    with turns.memory(settings.MAX_DECODE_BYTES, 5):
        pass


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5, id="version 2"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2, id="parent cgroup"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 0.5, id="a container"),
        pytest.param("0::/a\n", {"a/cpu.max": "max 100000"}, float("inf"), id="no quota"),
        pytest.param("0::/a\n", {}, float("inf"), id="no file"),
        pytest.param("0::/a\n", {"a/cpu.max": "rubbish"}, float("inf"), id="malformed"),
        pytest.param(
            "5:cpu,cpuacct:/a\n3:memory:/m\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 3,
            id="version 1",
        ),
        pytest.param(
            "5:cpu,cpuacct:/docker/1234\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "50000"}, 2,
            id="version 1 in a container",
        ),
        pytest.param(
            "5:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, float("inf"),
            id="version 1 without quota",
        ),
    ],
)  # fmt: skip
def test_available_cores_respect_cgroup_quotas(tmp_path: Path, own: str, files: dict[str, str], cores: float) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)

    assert cgroup_quota(tmp_path / "own", tmp_path / "root") == cores


def test_available_cores_respect_the_affinity() -> None:
    command = ["taskset", "--cpu-list", "0", sys.executable, "-c", "import helpers; print(helpers.available_cores())"]

    assert subprocess.check_output(command, cwd=ROOT, text=True) == "1\n"


@pytest.mark.slow("decodes six images of 49 megapixels")
def test_six_largest_images_at_once_take_less_than_a_gigabyte(
    service: Service, record_property: Callable[[str, object], None]
) -> None:
    """RGBA images of 49 megapixels are the costliest: transparency is blended onto white. Counts both web processes."""
    side, most = 7000, list[int]()
    rows = (b"\0" + b"\x20\x40\x60\x80" * side) * side
    image = make_png(header(side, side, color=6), rows=rows)
    del rows
    before = sum(map(resident_bytes, web_processes(service.url)))
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(service.post, image) for _ in range(6)]
        while not all(answer.done() for answer in answers):
            most.append(sum(map(resident_bytes, web_processes(service.url))))
            time.sleep(0.01)

    # On a busy machine the last images may get no turn in time.
    statuses = [answer.result().status_code for answer in answers]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 2
    assert len(most) > 20
    assert max(most) < 1e9
    record_property("figures", f"at most {max(most) / 1e6:.0f} MB")
    # One of these images has 196 MB of pixels.
    wait_until(lambda: sum(map(resident_bytes, web_processes(service.url))) < before + 1e8, "the memory is freed")
