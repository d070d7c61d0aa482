"""The limit on images decoded at once, in all web processes together."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import ROOT, Service, resident_bytes, wait_until, web_processes
from hostile.png import header, make_png

import settings
from helpers import cgroup_quota
from web.turns import MemoryTimeout, Turns

# A process that runs jobs of 20 ms and prints when each began and ended.
WORKER = """if True:
    import sys, time
    from pathlib import Path
    from web.turns import Turns
    turns = Turns(lambda: Path(sys.argv[1]), 2)
    def job():
        begun = time.monotonic()
        time.sleep(0.02)
        return begun, time.monotonic()
    sys.stdin.readline()
    for future in [turns.submit(job) for _ in range(int(sys.argv[2]))]:
        print(*future.result(60), flush=True)
"""


def start_worker(folder: Path, jobs: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(jobs)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def spans(printed: str) -> list[tuple[float, float]]:
    return [(float(begun), float(ended)) for begun, ended in map(str.split, printed.splitlines())]


def max_at_once(jobs: list[tuple[float, float]]) -> int:
    return max(sum(begun <= at < ended for begun, ended in jobs) for at, _ in jobs)


def test_turns_limit_all_processes_together(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path, 60) for _ in range(3)]
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("\n")
        worker.stdin.flush()

    done = [spans(worker.communicate(timeout=60)[0]) for worker in workers]

    assert [len(jobs) for jobs in done] == [60, 60, 60]
    assert max_at_once([job for jobs in done for job in jobs]) == 2
    # No process waits for the others to finish: each has done at least 10 jobs in the first half of the time.
    begun, ended = min(jobs[0][0] for jobs in done), max(jobs[-1][1] for jobs in done)
    for jobs in done:
        assert sum(job[1] < (begun + ended) / 2 for job in jobs) >= 10


def test_killed_process_releases_its_turns(tmp_path: Path) -> None:
    worker = start_worker(tmp_path, 10_000)
    worker.stdin.write("\n")  # type: ignore[union-attr]
    worker.stdin.flush()  # type: ignore[union-attr]
    worker.stdout.readline()  # type: ignore[union-attr]

    worker.kill()
    worker.communicate(timeout=10)

    assert Turns(lambda: tmp_path, 2).submit(lambda: "mine").result(5) == "mine"


def test_jobs_run_in_order_and_can_be_canceled_before(tmp_path: Path) -> None:
    turns, held, order = Turns(lambda: tmp_path, 1), threading.Event(), list[int]()
    first = turns.submit(lambda: held.wait(30))
    others = [turns.submit(lambda number=number: order.append(number)) for number in range(5)]  # type: ignore[misc]

    assert others[2].cancel()
    held.set()

    assert first.result(10)
    others[4].result(10)
    assert order == [0, 1, 3, 4]


def test_error_of_a_job_affects_no_other(tmp_path: Path) -> None:
    turns = Turns(lambda: tmp_path, 1)

    with pytest.raises(ZeroDivisionError):
        turns.submit(lambda: 1 // 0).result(10)
    assert turns.submit(lambda: "next").result(10) == "next"


def test_without_a_folder_each_process_has_its_own_turns(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns(lambda: Path("/proc/nothing"), 1)

    for _ in range(3):
        assert turns.submit(lambda: 5).result(10) == 5
    with turns.memory(settings.MAX_DECODE_BYTES, 1):
        pass

    assert len([line for line in caplog.messages if "limits decoding by itself" in line]) == 1


def test_memory_wait_ends_at_its_limit(tmp_path: Path) -> None:
    turns, half, got = Turns(lambda: tmp_path, 4), settings.MAX_DECODE_BYTES // 2, threading.Event()

    def take_half() -> None:
        with turns.memory(half, 30):
            got.set()

    waiting = threading.Thread(target=take_half)
    with turns.memory(half, 1), turns.memory(half, 1):
        with turns.memory(1_000_000, 0):
            pass  # small images need no share
        with pytest.raises(MemoryTimeout), turns.memory(half, 0.05):
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
    wait_until(lambda: sum(map(resident_bytes, web_processes(service.url))) < 3e8, "the memory is freed")
