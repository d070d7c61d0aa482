"""Functions of stress_test.py: its figures, and how it counts faults of the client's machine."""

import errno
import io
import threading

import pytest
import requests
from fake_service import LIMIT
from tqdm import tqdm

import stress_test
from stress_test import Result, StressTest, Target, percentile, summarize


class Instant(Target):
    """A target that answers at once, without a service."""

    def post(self, session: requests.Session, thread: int) -> Result:
        return Result(thread, 0.0, 0.1, 200, None)


def in_process(target: type[Target], total: int) -> StressTest:
    bar = tqdm(total=total, file=io.StringIO())
    return StressTest(target([requests.PreparedRequest()], 0.1, {}), total, bar)


def answered(thread: int, started_s: float, latency_s: float) -> Result:
    return Result(thread, started_s, latency_s, 200, None)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([10, 20, 30, 40, 50], 50, 30),
        ([10, 20, 30, 40], 50, 20),
        ([10, 20, 30, 40], 51, 30),
        (list(range(1, 101)), 95, 95),
        (list(range(1, 101)), 7, 7),
        (list(range(1, 501)), 99, 495),
        ([1, 2, 3], 100, 3),
        ([1, 2, 3], 0, 1),
        ([7], 99, 7),
    ],
)
def test_a_percentile_is_the_nearest_rank(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_a_summary_counts_failures_by_status_and_code() -> None:
    # given 100 answers of 10, 20 ... 1000 ms, shuffled, and some failures
    results = [answered(n, 50.0, 0.01 * (n * 37 % 100 + 1)) for n in range(100)]
    results += [Result(100, 49.0, 0.001, 503, "queue_full"), Result(101, 50.0, 0.002, 503, "queue_full")]
    results += [Result(102, 50.0, 9.0, None, "timeout")]

    # when
    figures = summarize(results, asked=105)

    # then
    assert (figures.requests, figures.answered, figures.failed, figures.unfinished) == (105, 100, 3, 2)
    assert figures.failures == {"503 queue_full": 2, "timeout": 1}
    assert figures.latency_ms == pytest.approx({"p50": 500, "p95": 950, "p99": 990, "max": 1000})
    assert figures.duration_s == pytest.approx(10.0)
    assert figures.throughput_per_s == pytest.approx(100 / 2.0)


@pytest.mark.parametrize("results", [[], [Result(0, 5.0, 1.0, None, "timeout")]])
def test_a_summary_without_answers_has_no_latencies(results: list[Result]) -> None:
    # when
    figures = summarize(results, asked=1)

    # then
    assert (figures.answered, figures.throughput_per_s, figures.latency_ms) == (0, 0.0, None)
    assert list(stress_test.summary_lines(figures))


def test_interval_0_sends_nothing_before_all_threads_run() -> None:
    # given
    alive: list[int] = []

    class Counting(Instant):
        def post(self, session: requests.Session, thread: int) -> Result:
            alive.append(threading.active_count())
            return super().post(session, thread)

    test = in_process(Counting, total=20)
    others = threading.active_count()

    # when
    test.run(0.0, None)

    # then
    assert alive[0] == others + 20


def test_results_just_before_ctrl_c_still_count() -> None:
    # given
    test = in_process(Instant, total=3)
    test.inbox.put(answered(0, 0.0, 0.1))
    test.inbox.put(answered(1, 0.0, 0.1))

    # when
    test.stop()
    test.run(0.001, None)

    # then
    figures = summarize(test.results, asked=3)
    assert (figures.answered, figures.unfinished) == (2, 1)


@pytest.mark.parametrize(("interval", "clients"), [(0.001, None), (0.0, None), (1.0, 4)])
def test_threads_that_cannot_be_started_are_counted(
    monkeypatch: pytest.MonkeyPatch, interval: float, clients: int | None
) -> None:
    # given a system that allows no third thread
    started = iter(range(100))
    really_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if next(started) == 2:
            raise RuntimeError("can't start new thread")
        really_start(thread)

    test = in_process(Instant, total=4)
    monkeypatch.setattr(threading.Thread, "start", start)

    # when
    test.run(interval, clients)

    # then
    failures = summarize(test.results, asked=4).failures
    assert sorted(result.thread for result in test.results) == [0, 1, 2, 3]
    assert failures == ({"no_common_start": 3, "no_thread": 1} if interval == 0 else {"no_thread": 1})


def test_an_exception_in_a_thread_is_counted_by_its_name() -> None:
    # given
    class Exhausted(Target):
        def send(self, session: requests.Session, thread: int) -> requests.Response:
            raise MemoryError

    test = in_process(Exhausted, total=3)

    # when
    test.run(0.0, None)

    # then
    assert summarize(test.results, asked=3).failures == {"MemoryError": 3}


def test_running_out_of_open_files_is_counted_as_such() -> None:
    # given
    class OutOfFiles(Target):
        def send(self, session: requests.Session, thread: int) -> requests.Response:
            raise requests.ConnectionError from OSError(errno.EMFILE, "Too many open files")

    test = in_process(OutOfFiles, total=2)

    # when
    test.run(0.0, None)

    # then
    assert summarize(test.results, asked=2).failures == {"too_many_open_files": 2}


def test_threads_that_never_report_count_as_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    # given one thread that exceeds every time limit, as when an answer arrives byte by byte
    released = threading.Event()

    class Stuck(Instant):
        def post(self, session: requests.Session, thread: int) -> Result:
            if thread == 1:
                released.wait(LIMIT)
            return super().post(session, thread)

    monkeypatch.setattr(stress_test, "GRACE", 0.2)
    test = in_process(Stuck, total=3)

    # when
    test.run(0.001, None)
    released.set()

    # then
    figures = summarize(test.results, asked=3)
    assert (figures.answered, figures.failed, figures.unfinished) == (2, 0, 1)
    assert stress_test.exit_code(figures, stopped=False) == 1


def test_the_batch_size_is_read_from_the_answer() -> None:
    answer = requests.Response()
    answer.headers["Server-Timing"] = 'prepare;dur=1.0, compute;dur=2.0;desc="batch of 17", total;dur=3.0'

    assert stress_test.batch_size(answer) == 17
    assert stress_test.batch_size(requests.Response()) is None
