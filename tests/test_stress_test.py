"""stress_test.py, run as a user runs it."""

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_service import (
    BAD_ADDRESSES,
    HANG_UP,
    HTML,
    IMAGE,
    LIMIT,
    OK,
    Behavior,
    FakeService,
    Reply,
    Serve,
    always,
    as_reply,
    assert_one_line,
    environment,
    error_reply,
    first_then_hang,
    run,
    run_with_closed_output,
)  # fmt: skip
from harness import ROOT
from PIL import Image

import stress_test
from stress_test import Figures, Result, summarize

pytest_plugins = ["client_fixtures"]
MODES = (("--interval", "0.01"), ("--interval", "0"), ("--concurrency", "3"))


class Outcome(NamedTuple):
    code: int
    lines: list[str]
    summary: list[str]
    figures: dict[str, Any]
    stderr: str


def outcome(done: "subprocess.CompletedProcess[str]", report: Path) -> Outcome:
    lines = done.stdout.splitlines()
    threads = [line for line in lines if line.startswith("[INFO] thread ")]
    summary = [line for line in lines if line not in threads]
    return Outcome(done.returncode, threads, summary, json.loads(report.read_text()), done.stderr)


def stress(url: str, image: Path, *arguments: object) -> Outcome:
    report = image.with_name("figures.json")
    done = run(ROOT / "stress_test.py", "--url", url, "--image", image, "--json", report, *arguments)
    return outcome(done, report)


def in_groups_of(count: int) -> Behavior:
    """Answer requests only when `count` of them are waiting."""
    barrier = threading.Barrier(count)

    def answer(_service: FakeService, _number: int) -> Reply:
        barrier.wait(LIMIT / 2)
        return OK

    return answer


def test_characters_that_the_terminal_lacks_are_escaped(serve: Serve, image: Path) -> None:
    service = serve(always(error_reply(503, "\u6ee1")))
    arguments = ("--url", service.url, "--image", image, "--requests", "1", "--interval", "0")

    done = run(ROOT / "stress_test.py", *arguments, PYTHONIOENCODING="latin-1")

    assert "[INFO] failed: 1 x 503 \\u6ee1" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("reply", "code"), [(OK, 0), (error_reply(503, "queue_full"), 1)])
def test_closed_output_neither_stops_it_nor_changes_its_exit_code(
    serve: Serve, image: Path, reply: Reply, code: int
) -> None:
    service, report = serve(always(reply)), image.with_name("figures.json")
    command = (ROOT / "stress_test.py", "--url", service.url, "--image", image, "--requests", 100, "--concurrency", 8)

    done = run_with_closed_output(*command, "--json", report)

    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(json.loads(report.read_text())["results"]) == len(service.bodies) == 100

    # and with standard error closed too
    assert run_with_closed_output(*command, "--json", "/dev/stdout", errors_too=True).returncode == code


def test_the_json_file_has_the_printed_figures(serve: Serve, image: Path) -> None:
    # given
    service = serve(lambda _service, number: error_reply(503, "queue_full") if number % 3 == 0 else OK)

    # when
    done = stress(service.url, image, "--requests", 30, "--interval", 0.002)

    # then
    listed = done.figures.pop("results")
    again = summarize([Result(**entry) for entry in listed], asked=30)
    figures = Figures(**done.figures)
    assert figures.latency_ms == pytest.approx(again.latency_ms)
    assert figures.duration_s == pytest.approx(again.duration_s)
    assert figures.throughput_per_s == pytest.approx(again.throughput_per_s)
    assert figures.answered + figures.failed + figures.unfinished == figures.requests == len(listed) == 30
    assert [entry["thread"] for entry in listed] == list(range(30))
    assert min(entry["started_s"] for entry in listed) == 0.0
    assert all(0 < entry["latency_s"] < LIMIT for entry in listed)
    assert sorted(entry["status"] for entry in listed) == [200] * 20 + [503] * 10
    assert done.summary == list(stress_test.summary_lines(figures))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_failures_exits_with_0(serve: Serve, image: Path, mode: tuple[str, str]) -> None:
    # given
    service = serve(always(OK))

    # when
    done = stress(service.url, image, "--requests", 12, *mode)

    # then
    assert done.code == 0
    assert sorted(done.lines) == sorted(f"[INFO] thread {number} OK" for number in range(12))
    assert done.summary[0] == "[INFO] 12 requests: 12 answered, 0 failed"
    assert "12/12" in done.stderr
    assert len(service.bodies) == 12
    assert all(IMAGE in body and b'name="image"' in body for body in service.bodies)


def test_rejected_requests_are_counted_and_make_the_exit_code_1(serve: Serve, image: Path) -> None:
    # given
    service = serve(lambda _service, number: error_reply(503, "queue_full") if number % 3 == 0 else OK)

    # when one client sends them, so that the order is known
    done = stress(service.url, image, "--requests", 9, "--concurrency", 1)

    # then
    assert done.code == 1
    outcomes = ["OK", "OK", "FAILED (503 queue_full)"] * 3
    assert done.lines == [f"[INFO] thread {number} {outcome}" for number, outcome in enumerate(outcomes)]
    assert done.summary[:2] == [
        "[INFO] 9 requests: 6 answered, 3 failed",
        "[INFO] failed: 3 x 503 queue_full",
    ]
    assert done.figures["failures"] == {"503 queue_full": 3}


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (error_reply(504, "too_late"), "504 too_late"),
        (error_reply(200, "odd\ncode"), "200 odd code"),
        (HTML, "200 not_json"),
        (Reply(302, b""), "302 not_json"),
        (as_reply(200, ["beagle"]), "200 unexpected_json"),
        (as_reply(200, {"success": "yes"}), "200 unexpected_json"),
        (as_reply(201, {"success": True}), "201 unexpected_json"),
        (HANG_UP, "connection_error"),
        (OK._replace(missing=100), "connection_error"),
    ],
)
def test_only_status_200_with_success_counts_as_answered(
    serve: Serve, image: Path, reply: Reply | None, failure: str
) -> None:
    # given
    service = serve(always(reply))

    # when
    done = stress(service.url, image, "--requests", 2, "--concurrency", 2)

    # then
    assert done.code == 1
    assert done.figures["answered"] == 0
    assert done.figures["failures"] == {failure: 2}
    assert sorted(done.lines) == [f"[INFO] thread {number} FAILED ({failure})" for number in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_refused_connections_are_counted(unused_url: str, image: Path, mode: tuple[str, str]) -> None:
    # when
    done = stress(unused_url, image, "--requests", 7, *mode)

    # then
    assert done.code == 1
    assert (done.figures["failed"], done.figures["failures"]) == (7, {"connection_error": 7})
    assert [entry["status"] for entry in done.figures["results"]] == [None] * 7


@pytest.mark.parametrize("mode", MODES)
def test_requests_over_the_time_limit_are_timeouts(serve: Serve, image: Path, mode: tuple[str, str]) -> None:
    # given
    service = serve(first_then_hang(0))

    # when
    done = stress(service.url, image, "--requests", 3, "--timeout", 0.3, *mode)

    # then
    assert done.code == 1
    assert done.figures["failures"] == {"timeout": 3}
    assert all(0.3 <= entry["latency_s"] < LIMIT for entry in done.figures["results"])


def test_silence_in_the_middle_of_an_answer_is_a_timeout(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK._replace(missing=100, silent=True)))

    # when
    done = stress(service.url, image, "--requests", 1, "--timeout", 0.3)

    # then
    assert done.figures["failures"] == {"timeout": 1}


@pytest.mark.parametrize("threads", [30, 500])
def test_interval_0_sends_all_requests_at_once(serve: Serve, image: Path, threads: int) -> None:
    # given a service that answers only when all requests have arrived
    service = serve(in_groups_of(threads))

    # when
    done = stress(service.url, image, "--requests", threads, "--interval", 0)

    # then
    assert done.code == 0
    assert (done.figures["answered"], service.most_in_flight) == (threads, threads)
    last_start = max(entry["started_s"] for entry in done.figures["results"])
    assert last_start < threads * stress_test.SLEEP_COUNT / 2


def test_the_interval_separates_the_starts(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = stress(service.url, image, "--requests", 6, "--interval", 0.1)

    # then the last one starts about five intervals after the first, which may itself start late
    starts = [entry["started_s"] for entry in done.figures["results"]]
    assert starts == sorted(starts)
    assert starts[-1] > 0.25


def test_starts_do_not_wait_for_answers(serve: Serve, image: Path) -> None:
    # given a service that answers only when all requests have arrived
    service = serve(in_groups_of(5))

    # when
    done = stress(service.url, image, "--requests", 5, "--interval", 0.01)

    # then
    assert done.figures["answered"] == 5


def test_a_closed_loop_has_one_request_in_flight_per_client(serve: Serve, image: Path) -> None:
    # given a service that answers four at a time
    service = serve(in_groups_of(4))

    # when
    done = stress(service.url, image, "--requests", 40, "--concurrency", 4)

    # then
    assert done.figures["answered"] == len(service.bodies) == 40
    assert service.most_in_flight == 4


def test_each_client_of_a_closed_loop_keeps_its_connection(serve: Serve, image: Path) -> None:
    # given a service that answers the first four together, so that all clients take part
    together = in_groups_of(4)
    service = serve(lambda service, number: together(service, number) if number <= 4 else OK)

    # when
    stress(service.url, image, "--requests", 40, "--concurrency", 4)

    # then
    assert service.connections == 4


def test_a_closed_loop_never_sends_more_than_requested(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = stress(service.url, image, "--requests", 2, "--concurrency", 50)

    # then
    assert (done.code, done.figures["requests"], done.figures["answered"]) == (0, 2, 2)
    assert (len(service.bodies), service.connections) == (2, 2)


@pytest.mark.parametrize(
    ("mode", "answered"),
    [
        (("--concurrency", "1"), 3),  # the fourth request is sent only after the third answer
        (("--interval", "0"), 0),
        (("--interval", "30"), 0),
    ],
)
def test_ctrl_c_prints_the_results_so_far_and_exits(
    serve: Serve, image: Path, mode: tuple[str, str], answered: int
) -> None:
    # given
    service = serve(first_then_hang(answered))
    report = image.with_name("figures.json")
    arguments = ["--url", service.url, "--image", str(image), "--json", str(report), "--requests", "8", *mode]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "stress_test.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )

    # when
    with running:
        try:
            service.wait_for(answered + 1)
            running.send_signal(signal.SIGINT)
            stdout, stderr = running.communicate(timeout=10)
        finally:
            running.kill()

    # then
    done = outcome(subprocess.CompletedProcess([], running.returncode, stdout, stderr), report)
    assert done.code == 130
    assert done.summary[0] == f"[INFO] 8 requests: {answered} answered, 0 failed, {8 - answered} unfinished"
    assert done.lines == [f"[INFO] thread {number} OK" for number in range(answered)]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests"),
        (["--requests", "many"], "--requests"),
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "-3"], "--concurrency"),
        (["--interval", "-0.1"], "--interval"),
        (["--interval", "nan"], "--interval"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "inf"], "--timeout"),
        (["--image", "/nowhere/three.png"], "cannot read /nowhere/three.png"),
        (["--image", "/"], "cannot read /"),
        (["--json", "/nowhere/figures.json"], "cannot write /nowhere/figures.json"),
        (["--speed", "1"], "--speed"),
        *[(["--url", address], f"'{address}' is not an address such as") for address in BAD_ADDRESSES],
    ],
)
def test_bad_arguments_are_rejected_in_one_line(serve: Serve, image: Path, arguments: list[str], message: str) -> None:
    # given
    service = serve(always(OK))

    # when
    good = ("--url", service.url, "--image", image, "--requests", 1)
    done = run(ROOT / "stress_test.py", *good, *arguments)

    # then
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, message)
    assert service.bodies == []


def test_a_bad_argument_leaves_an_existing_json_file_alone(image: Path) -> None:
    # given
    report = image.with_name("earlier.json")
    report.write_text("figures")

    # when
    done = run(ROOT / "stress_test.py", "--image", image, "--json", report, "--requests", 0)

    # then
    assert done.returncode == 2
    assert report.read_text() == "figures"


def test_the_images_of_a_folder_are_sent_in_turn(serve: Serve, tmp_path: Path) -> None:
    # given
    service = serve(always(OK))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.JPG", "notes.txt"):
        (folder / name).write_bytes(f"content of {name}".encode())

    # when
    done = run(ROOT / "stress_test.py", "--url", service.url, "--image", folder, "--requests", 6, "--interval", 0)

    # then
    assert done.returncode == 0
    sent = [name for body in service.bodies for name in (b"a.png", b"b.JPG") if b"content of " + name in body]
    assert sorted(sent) == [b"a.png"] * 3 + [b"b.JPG"] * 3


def test_the_chart_shows_answers_and_failures(serve: Serve, image: Path, tmp_path: Path) -> None:
    # given
    def some_fail(_service: FakeService, number: int) -> Reply:
        return OK if number % 3 else error_reply(503, "queue_full")

    # when
    stress(serve(some_fail).url, image, "--requests", 30, "--interval", 0, "--plot", tmp_path / "load.png")

    # then
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > picture.height > 300
        blue, red = (31, 119, 180), (214, 39, 40)  # answered and failed requests
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24) or []}
        assert {blue, red} <= colors


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--plot", "picture.gif"), "must end in"), (("--image", "/proc/self/fdinfo"), "this folder has no images")],
)
def test_a_bad_chart_or_folder_is_rejected_before_the_test(
    unused_url: str, arguments: tuple[str, str], reason: str
) -> None:
    done = run(ROOT / "stress_test.py", "--url", unused_url, *arguments)

    assert done.returncode == 2
    assert_one_line(done.stderr, reason)


def each_model(service: FakeService, number: int) -> Reply:
    """Answer for the model in the path, except that every tenth answer is from another one."""
    model = service.paths[number - 1].removeprefix("/predict/")
    return OK._replace(model="another" if number % 10 == 0 else model)


@pytest.mark.parametrize("mode", MODES)
def test_models_are_asked_in_turn_and_reported_one_by_one(serve: Serve, image: Path, mode: tuple[str, str]) -> None:
    # given
    service = serve(each_model)

    # when
    done = stress(service.url, image, "--requests", 40, "--model", "digits,lite,digits,birds", *mode)

    # then
    assert done.code == 1
    asked = {"digits": 20, "lite": 10, "birds": 10}
    assert Counter(service.paths) == {f"/predict/{name}": count for name, count in asked.items()}
    by_model = done.figures["by_model"]
    assert {name: its["requests"] for name, its in by_model.items()} == asked
    assert sum(its["failures"].get("200 wrong_model", 0) for its in by_model.values()) == 4
    assert done.summary[:2] == ["[INFO] 40 requests: 36 answered, 4 failed", "[INFO] failed: 4 x 200 wrong_model"]
    lite = by_model["lite"]
    assert f"[INFO] lite: 10 requests: {lite['answered']} answered, {lite['failed']} failed" in done.summary
    assert f"[INFO] lite: latency: p50 {lite['latency_ms']['p50']:.0f} ms" in " ".join(done.summary)
    for entry in done.figures["results"]:
        assert entry["model"] == ["digits", "lite", "digits", "birds"][entry["thread"] % 4]


def test_each_model_gets_each_image_of_a_folder(serve: Serve, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    service = serve(each_model)

    stress(service.url, tmp_path, "--requests", 8, "--model", "digits,lite", "--concurrency", 1)

    sent = [(path, b"a.png" in body) for path, body in zip(service.paths, service.bodies, strict=True)]
    assert Counter(sent) == {(f"/predict/{name}", first): 2 for name in ("digits", "lite") for first in (True, False)}


def test_one_model_has_no_figures_of_its_own_and_must_name_itself(serve: Serve, image: Path) -> None:
    service = serve(always(OK))

    done = stress(service.url, image, "--requests", 2, "--model", "digits", "--interval", 0)

    assert done.figures["failures"] == {"200 wrong_model": 2}
    assert done.figures["by_model"] == {}
    assert not [line for line in done.summary if "digits" in line]


def test_requests_that_were_not_sent_count_for_their_model() -> None:
    results = [Result(0, 1.0, 0.1, 200, None, model="a"), Result(1, 1.0, 0.0, None, "no_thread", model="b")]

    figures = summarize(results, 5, ["a", "b"])

    counts = {name: (its.requests, its.answered, its.failed) for name, its in figures.by_model.items()}
    assert counts == {"a": (3, 1, 0), "b": (2, 0, 1)}
