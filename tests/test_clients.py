"""The two clients, run as a user runs them, against a service that can be told to fail.

The fake service stands only for faults that the real one cannot be made to show on demand.
"""

import ast
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import stress_test  # noqa: E402
from stress_test import Figures, Result, StressTest, Target, percentile, summarise  # noqa: E402

IMAGE = bytes(range(256)) * 40
PREDICTIONS = [
    {"label": "beagle", "probability": 0.9461532831},
    {"label": "bluetick", "probability": 0.03195896},
]
LIMIT = 60  # seconds until a test that waits gives up
MODES = (("--interval", "0.01"), ("--interval", "0"), ("--concurrency", "3"))


# --- the fake service -------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What the fake service sends: `missing` bytes are promised but never come, `silent` does not hang up.

    `retry_after` is the header of that name.
    """

    status: int
    body: bytes
    missing: int = 0
    silent: bool = False
    retry_after: str = ""


def as_reply(status: int, answer: object) -> Reply:
    return Reply(status, json.dumps(answer).encode())


def refusal(status: int, code: str, message: str = "Try again in a moment.") -> Reply:
    return as_reply(status, {"success": False, "error": {"code": code, "message": message}})


OK = as_reply(200, {"success": True, "predictions": PREDICTIONS})
HTML = Reply(200, b"<html><body>It works!</body></html>")
HANG_UP = None

Behaviour = Callable[["FakeService", int], Reply | None]
Serve = Callable[[Behaviour], "FakeService"]


def always(reply: Reply | None) -> Behaviour:
    return lambda _service, _number: reply


def first_then_hang(answered: int) -> Behaviour:
    return lambda service, number: OK if number <= answered else service.hang()


class FakeService(ThreadingHTTPServer):
    """Answers as its behaviour says, given the service and the number of the request, from 1."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []
        self.connections = self.in_flight = self.most_in_flight = 0

    def arrive(self, path: str, body: bytes, key: str | None) -> int:
        with self.changed:
            self.paths.append(path)
            self.keys.append(key)
            self.bodies.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.changed.notify_all()
            return len(self.bodies)

    def leave(self) -> None:
        with self.changed:
            self.in_flight -= 1

    def wait_for(self, arrivals: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bodies) >= arrivals, LIMIT)

    def hang(self) -> None:
        self.closing.wait(LIMIT)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep silent about clients that are gone, as some tests want them to be."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        reply = self.server.behaviour(self.server, self.server.arrive(self.path, body, key))
        self.server.leave()  # before the client can send its next one
        if reply is None:
            self.close_connection = True
        else:
            self.send(reply)

    def send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply.body) + reply.missing))
        if reply.retry_after:
            self.send_header("Retry-After", reply.retry_after)
        self.end_headers()
        self.wfile.write(reply.body)
        if reply.silent:
            self.server.hang()
        self.close_connection = reply.missing > 0

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Serve]:
    services: list[FakeService] = []

    def start(behaviour: Behaviour) -> FakeService:
        services.append(FakeService(behaviour))
        threading.Thread(target=services[-1].serve_forever, args=(0.01,), daemon=True).start()
        return services[-1]

    yield start
    for service in services:
        service.closing.set()
        service.shutdown()
        service.server_close()


@pytest.fixture
def deserted_url() -> Iterator[str]:
    """An address that stays ours, so that nobody comes to listen there meanwhile."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unheard.getsockname()[1]}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "some image.png"
    path.write_bytes(IMAGE)
    return path


# --- running the clients ----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    return bare | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def run(script: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment() | variables,
        timeout=LIMIT,
        check=False,
        cwd=script.anchor,
    )


def ask(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "simple_request.py", *arguments)


class Instant(Target):
    """Answers without any service, for what only the insides of the stress test can show."""

    def post(self, session: requests.Session, thread: int) -> Result:
        return Result(thread, 0.0, 0.1, 200, None)


def in_process(target: type[Target], total: int) -> StressTest:
    bar = tqdm(total=total, file=io.StringIO())
    return StressTest(target([requests.PreparedRequest()], 0.1, {}), total, bar)


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


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr


# --- simple_request.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "shown"),
    [({"PYTHONIOENCODING": "latin-1"}, "1. \\u5c0f\\u72ac caf\u00e9: 0.9000\n"),
     ({"PYTHONIOENCODING": "ascii"}, "1. \\u5c0f\\u72ac caf\\xe9: 0.9000\n"),
     ({"PYTHONIOENCODING": "utf-8"}, "1. \u5c0f\u72ac caf\u00e9: 0.9000\n")],
    ids=["latin-1", "ascii", "utf-8"],
)  # fmt: skip
def test_simple_request_shows_letters_that_the_terminal_lacks_as_escapes(
    serve: Serve, image: Path, variables: dict[str, str], shown: str
) -> None:
    labels = [{"label": "\u5c0f\u72ac caf\u00e9", "probability": 0.9}]
    service = serve(always(as_reply(200, {"success": True, "predictions": labels})))
    command = [sys.executable, str(ROOT / "simple_request.py"), str(image), "--url", service.url]

    done = subprocess.run(command, capture_output=True, env=environment() | variables, timeout=LIMIT, check=False)

    assert done.stderr == b""
    assert done.stdout.decode(variables["PYTHONIOENCODING"]) == shown


def test_stress_test_shows_letters_that_the_terminal_lacks_as_escapes(serve: Serve, image: Path) -> None:
    service = serve(always(refusal(503, "\u6ee1")))
    arguments = ("--url", service.url, "--image", image, "--requests", "1", "--interval", "0")

    done = run(ROOT / "stress_test.py", *arguments, PYTHONIOENCODING="latin-1")

    assert "[INFO] failed: 1 x 503 \\u6ee1" in done.stdout
    assert "Traceback" not in done.stderr


def test_simple_request_prints_the_predictions_in_the_order_of_the_answer(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = ask(image, "--url", f"{service.url}/predict")

    # then
    assert done.stdout == "1. beagle: 0.9462\n2. bluetick: 0.0320\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_simple_request_posts_the_file_unchanged_as_the_field_image(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    ask(image, "--url", service.url)

    # then
    assert len(service.bodies) == 1
    assert b'name="image"' in service.bodies[0]
    assert IMAGE in service.bodies[0]


def test_simple_request_asks_about_each_of_several_images_and_folders(serve: Serve, tmp_path: Path) -> None:
    # given
    service = serve(always(OK))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.JPG", "a.png", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "alone.gif").write_bytes(b"alone")

    # when
    done = ask(tmp_path / "alone.gif", folder, "--url", service.url)

    # then
    lines = ["1. beagle: 0.9462", "2. bluetick: 0.0320"]
    names = [str(tmp_path / "alone.gif"), str(folder / "a.png"), str(folder / "b.JPG")]
    assert done.stdout.splitlines() == [line for name in names for line in (name, *lines)]
    assert (done.returncode, done.stderr) == (0, "")
    for content, body in zip((b"alone", b"a.png", b"b.JPG"), service.bodies, strict=True):
        assert content in body


def test_simple_request_reads_standard_input(serve: Serve) -> None:
    service = serve(always(OK))
    command = [sys.executable, str(ROOT / "simple_request.py"), "-", "--url", service.url]

    printed = subprocess.check_output(command, input=IMAGE, env=environment(), timeout=LIMIT)

    assert printed.startswith(b"1. beagle")
    assert IMAGE in service.bodies[0]


def test_simple_request_prints_json_for_programs(serve: Serve, image: Path) -> None:
    done = ask(image, image, "--json", "--url", serve(always(OK)).url)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [{"image": str(image), "predictions": PREDICTIONS}] * 2


def test_simple_request_goes_on_after_an_image_that_is_refused(serve: Serve, image: Path, tmp_path: Path) -> None:
    # given
    service = serve(lambda _service, number: refusal(400, "bad_image", "Not an image.") if number == 1 else OK)

    # when
    done = ask(image, tmp_path / "missing.png", image, "--url", service.url)

    # then
    first, second = done.stderr.splitlines()
    assert first == f"{image}: Not an image. (status 400)"
    assert "missing.png" in second
    assert done.stdout.splitlines()[:2] == [str(image), "1. beagle: 0.9462"]
    assert done.returncode == 1


def run_for_nobody(*command: object, nor_errors: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a client whose reader has left, as `head -1` has after a line: that of its output, or of its errors too."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, *map(str, command)], stdout=writing, stderr=writing if nor_errors else subprocess.PIPE,
            text=True, env=environment(), timeout=LIMIT, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_simple_request_is_quiet_when_its_reader_leaves_and_asks_no_more(
    serve: Serve, image: Path, options: list[str]
) -> None:
    service = serve(always(OK))

    done = run_for_nobody(ROOT / "simple_request.py", image, image, image, "--url", service.url, *options)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(service.bodies) == 1


def test_simple_request_keeps_its_exit_code_when_nobody_reads_its_errors(deserted_url: str, image: Path) -> None:
    done = run_for_nobody(ROOT / "simple_request.py", image, "--url", deserted_url, nor_errors=True)

    assert done.returncode == 1


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
def test_a_client_s_help_is_quiet_when_its_reader_leaves(script: str) -> None:
    done = run_for_nobody(ROOT / script, "--help")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("reply", "code"), [(OK, 0), (refusal(503, "queue_full"), 1)])
def test_the_stress_test_goes_on_and_keeps_its_exit_code_when_its_reader_leaves(
    serve: Serve, image: Path, reply: Reply, code: int
) -> None:
    service, report = serve(always(reply)), image.with_name("figures.json")
    command = (ROOT / "stress_test.py", "--url", service.url, "--image", image, "--requests", 400, "--concurrency", 8)

    done = run_for_nobody(*command, "--json", report)

    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(json.loads(report.read_text())["results"]) == len(service.bodies) == 400

    # and where nobody reads its progress either, or the figures
    assert run_for_nobody(*command, "--json", "/dev/stdout", nor_errors=True).returncode == code


@pytest.mark.parametrize("status", [429, 503])
def test_simple_request_tries_again_when_the_service_says_when_to(serve: Serve, image: Path, status: int) -> None:
    # given
    busy = refusal(status, "queue_full")._replace(retry_after="1")
    service = serve(lambda _service, number: busy if number <= 2 else OK)

    # when
    done = ask(image, "--url", service.url)

    # then
    assert done.stdout.startswith("1. beagle")
    assert done.stderr == "The service asks to wait 1 s before another try.\n" * 2
    assert len(service.bodies) == 3
    assert service.bodies[2] == service.bodies[0]


@pytest.mark.parametrize(
    ("reply", "options", "tries"),
    [
        (refusal(503, "queue_full"), [], 1),
        (refusal(400, "bad_image")._replace(retry_after="1"), [], 1),
        (refusal(503, "queue_full")._replace(retry_after="1"), ["--retries", "0"], 1),
        (refusal(503, "queue_full")._replace(retry_after="0"), ["--retries", "2"], 3),
    ],
)
def test_simple_request_tries_no_more_often_than_it_should(
    serve: Serve, image: Path, reply: Reply, options: list[str], tries: int
) -> None:
    service = serve(always(reply))

    done = ask(image, "--url", service.url, *options)

    assert (done.returncode, len(service.bodies)) == (1, tries)
    assert done.stderr.endswith(f"Try again in a moment. (status {reply.status})\n")


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
@pytest.mark.parametrize(
    ("given", "posted"),
    [("", "/predict"), ("/", "/predict"), ("/predict", "/predict"), ("/v2/ask", "/v2/ask")],
)
def test_a_client_adds_the_path_only_where_none_is_given(
    serve: Serve, image: Path, script: str, given: str, posted: str
) -> None:
    # given
    service = serve(always(OK))
    arguments = [image] if script == "simple_request.py" else ["--image", image, "--requests", 1]

    # when
    done = run(ROOT / script, *arguments, "--url", service.url + given)

    # then
    assert done.returncode == 0
    assert service.paths == [posted]


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
@pytest.mark.parametrize(
    ("arguments", "variable", "sent"),
    [
        ([], "", None),
        (["--api-key", "key-1"], "", "Bearer key-1"),
        ([], "key-2\n", "Bearer key-2"),
        (["--api-key", "key-1"], "key-2", "Bearer key-1"),
    ],
    ids=["none", "argument", "environment", "both"],
)
def test_a_client_sends_the_key_that_it_is_given(
    serve: Serve, script: str, arguments: list[str], variable: str, sent: str | None
) -> None:
    # given
    service = serve(always(OK))
    once = [] if script == "simple_request.py" else ["--requests", 1]

    # when
    done = run(ROOT / script, *once, "--url", service.url, *arguments, API_KEY=variable)

    # then
    assert done.returncode == 0
    assert service.keys == [sent]


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
def test_a_client_refuses_a_key_that_no_header_can_carry_and_does_not_show_it(script: str) -> None:
    # when
    done = run(ROOT / script, "--api-key", "schl\u00fcssel")

    # then
    assert done.returncode == 2
    assert "--api-key: must be letters, digits and signs on one line" in done.stderr
    assert "schl" not in done.stderr


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
def test_a_client_works_alone_on_another_machine_with_the_image_beside_it(
    serve: Serve, tmp_path: Path, script: str
) -> None:
    # given
    service = serve(always(OK))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.jpg").write_bytes(IMAGE)
    arguments = ["--requests", 1] if script == "stress_test.py" else []

    # when
    done = run(Path(shutil.copy(ROOT / script, tmp_path)), "--url", service.url, *arguments)

    # then
    assert done.returncode == 0
    assert IMAGE in service.bodies[0]


@pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])
def test_a_client_imports_nothing_but_the_standard_library_requests_and_tqdm(script: str) -> None:
    """And urllib3, which requests brings; and where a picture is wanted, matplotlib."""
    # given
    nodes = list(ast.walk(ast.parse((ROOT / script).read_text())))

    # when
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}

    # then
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names | {
        "requests",
        "tqdm",
        "urllib3",
        "matplotlib",
    }


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            refusal(503, "queue_full", "The queue is full:\ntry later."),
            "The queue is full: try later. (status 503)\n",
        ),
        (refusal(400, "no_image", "Send an image."), "Send an image. (status 400)\n"),
        (refusal(200, "odd", "It did not work."), "It did not work. (status 200)\n"),
    ],
)
def test_simple_request_passes_on_the_message_of_the_service(
    serve: Serve, image: Path, reply: Reply, sentence: str
) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


@pytest.mark.parametrize(
    "reply",
    [
        HTML,
        Reply(502, b"<html>Bad gateway</html>"),
        Reply(204, b""),
        as_reply(200, ["beagle"]),
        as_reply(200, {"success": True}),
        as_reply(200, {"success": True, "predictions": [{"label": "beagle", "probability": "high"}]}),
        as_reply(404, {"detail": "Not Found"}),
        as_reply(500, {"success": False, "error": "broken"}),
        as_reply(201, {"success": True, "predictions": PREDICTIONS}),
    ],
)
def test_simple_request_says_when_another_service_answers(serve: Serve, image: Path, reply: Reply) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, f"status {reply.status}", "--url")


def test_simple_request_says_what_to_do_when_nobody_listens(deserted_url: str, image: Path) -> None:
    # when
    done = ask(image, "--url", deserted_url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, deserted_url, "start the service")


@pytest.mark.parametrize("reply", [HANG_UP, OK._replace(missing=100)])
def test_simple_request_says_what_to_do_when_the_service_hangs_up(
    serve: Serve, image: Path, reply: Reply | None
) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, "start the service")


def test_simple_request_gives_up_after_its_time_limit(serve: Serve, image: Path) -> None:
    # given
    service = serve(first_then_hang(0))

    # when
    done = ask(image, "--url", service.url, "--timeout", "0.3")

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, "in 0.3 s", "--timeout")


@pytest.mark.parametrize("name", ["", "missing.png"])
def test_simple_request_says_what_to_do_about_a_missing_file_or_a_directory(
    deserted_url: str, tmp_path: Path, name: str
) -> None:
    # when
    done = ask(tmp_path / name, "--url", deserted_url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, f"Cannot read {tmp_path / name} (", "give the path")


BAD_ADDRESSES = [
    "",
    "nonsense",
    "localhost:8080",
    "http://",
    "ftp://localhost/",
    "http://[::1",
    "http://localhost:99999",
]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_simple_request_says_how_an_address_looks(image: Path, address: str) -> None:
    # when
    done = ask(image, "--url", address)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, f"'{address}' is not an address", "http://host:port")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e300", "soon"])
def test_simple_request_refuses_an_absurd_time_limit(deserted_url: str, image: Path, seconds: str) -> None:
    # when
    done = ask(image, "--url", deserted_url, "--timeout", seconds)

    # then
    assert done.returncode == 2
    assert "--timeout" in done.stderr.splitlines()[-1]


# --- stress_test.py: figures ------------------------------------------------------------------------------


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


def test_a_summary_counts_by_status_and_code_and_takes_latencies_of_answers_only() -> None:
    # given 100 answers of 10, 20 ... 1000 ms in shuffled order, and failures among them
    results = [answered(n, 50.0, 0.01 * (n * 37 % 100 + 1)) for n in range(100)]
    results += [Result(100, 49.0, 0.001, 503, "queue_full"), Result(101, 50.0, 0.002, 503, "queue_full")]
    results += [Result(102, 50.0, 9.0, None, "timeout")]

    # when
    figures = summarise(results, asked=105)

    # then
    assert (figures.requests, figures.answered, figures.failed, figures.unfinished) == (105, 100, 3, 2)
    assert figures.failures == {"503 queue_full": 2, "timeout": 1}
    assert figures.latency_ms == pytest.approx({"p50": 500, "p95": 950, "p99": 990, "max": 1000})
    assert figures.duration_s == pytest.approx(10.0)
    assert figures.throughput_per_s == pytest.approx(100 / 2.0)


@pytest.mark.parametrize("results", [[], [Result(0, 5.0, 1.0, None, "timeout")]])
def test_a_summary_without_any_answer_has_no_latencies(results: list[Result]) -> None:
    # when
    figures = summarise(results, asked=1)

    # then
    assert (figures.answered, figures.throughput_per_s, figures.latency_ms) == (0, 0.0, None)
    assert list(stress_test.summary_lines(figures))


def test_the_json_file_adds_up_and_repeats_the_printed_figures(serve: Serve, image: Path) -> None:
    # given
    service = serve(lambda _service, number: refusal(503, "queue_full") if number % 3 == 0 else OK)

    # when
    done = stress(service.url, image, "--requests", 30, "--interval", 0.002)

    # then
    listed = done.figures.pop("results")
    again = summarise([Result(**entry) for entry in listed], asked=30)
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


# --- stress_test.py: what it counts and prints ------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_failures_reports_every_request_and_exits_with_0(
    serve: Serve, image: Path, mode: tuple[str, str]
) -> None:
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


def test_each_refused_request_is_named_counted_and_makes_the_exit_code_1(serve: Serve, image: Path) -> None:
    # given
    service = serve(lambda _service, number: refusal(503, "queue_full") if number % 3 == 0 else OK)

    # when one client sends them, so that the order is known
    done = stress(service.url, image, "--requests", 9, "--concurrency", 1)

    # then
    assert done.code == 1
    said = ["OK", "OK", "FAILED (503 queue_full)"] * 3
    assert done.lines == [f"[INFO] thread {number} {outcome}" for number, outcome in enumerate(said)]
    assert done.summary[:2] == [
        "[INFO] 9 requests: 6 answered, 3 failed",
        "[INFO] failed: 3 x 503 queue_full",
    ]
    assert done.figures["failures"] == {"503 queue_full": 3}


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (refusal(504, "too_late"), "504 too_late"),
        (refusal(200, "odd\ncode"), "200 odd code"),
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
def test_every_refused_connection_is_counted(deserted_url: str, image: Path, mode: tuple[str, str]) -> None:
    # when
    done = stress(deserted_url, image, "--requests", 7, *mode)

    # then
    assert done.code == 1
    assert (done.figures["failed"], done.figures["failures"]) == (7, {"connection_error": 7})
    assert [entry["status"] for entry in done.figures["results"]] == [None] * 7


@pytest.mark.parametrize("mode", MODES)
def test_every_request_beyond_its_time_limit_is_counted_as_a_timeout(
    serve: Serve, image: Path, mode: tuple[str, str]
) -> None:
    # given
    service = serve(first_then_hang(0))

    # when
    done = stress(service.url, image, "--requests", 3, "--timeout", 0.3, *mode)

    # then
    assert done.code == 1
    assert done.figures["failures"] == {"timeout": 3}
    assert all(0.3 <= entry["latency_s"] < LIMIT for entry in done.figures["results"])


def test_silence_in_the_middle_of_an_answer_is_a_timeout_too(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK._replace(missing=100, silent=True)))

    # when
    done = stress(service.url, image, "--requests", 1, "--timeout", 0.3)

    # then
    assert done.figures["failures"] == {"timeout": 1}


def test_a_redirect_is_not_followed(serve: Serve, image: Path) -> None:
    # given
    class Redirecting(Handler):
        def send_header(self, keyword: str, value: str) -> None:
            super().send_header("Location" if keyword == "Content-Type" else keyword, value)

    service = serve(always(Reply(307, b"")))
    service.RequestHandlerClass = Redirecting

    # when
    done = stress(service.url, image, "--requests", 1)
    asked = ask(image, "--url", service.url)

    # then
    assert done.figures["failures"] == {"307 not_json": 1}
    assert_one_line(asked.stderr, "status 307")
    assert service.paths == ["/predict", "/predict"]


# --- stress_test.py: how it sends -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [30, 500])
def test_with_interval_0_all_requests_are_under_way_together(serve: Serve, image: Path, threads: int) -> None:
    # given a service that answers nobody until all have arrived
    everybody = threading.Barrier(threads)

    def answer_together(_service: FakeService, _number: int) -> Reply:
        everybody.wait(LIMIT / 2)
        return OK

    service = serve(answer_together)

    # when
    done = stress(service.url, image, "--requests", threads, "--interval", 0)

    # then
    assert done.code == 0
    assert (done.figures["answered"], service.most_in_flight) == (threads, threads)
    last_start = max(entry["started_s"] for entry in done.figures["results"])
    assert last_start < threads * stress_test.SLEEP_COUNT / 2


def test_with_interval_0_no_thread_sends_before_all_are_started() -> None:
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


def test_an_interval_lies_between_the_starts(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = stress(service.url, image, "--requests", 6, "--interval", 0.1)

    # then the last starts five intervals after the first, less what the first took to get going
    starts = [entry["started_s"] for entry in done.figures["results"]]
    assert starts == sorted(starts)
    assert starts[-1] > 0.25


def test_starts_do_not_wait_for_answers(serve: Serve, image: Path) -> None:
    # given a service that answers nobody until all have arrived
    everybody = threading.Barrier(5)

    def answer_together(_service: FakeService, _number: int) -> Reply:
        everybody.wait(LIMIT / 2)
        return OK

    # when
    done = stress(serve(answer_together).url, image, "--requests", 5, "--interval", 0.01)

    # then
    assert done.figures["answered"] == 5


def test_a_closed_loop_has_one_request_in_flight_per_client_never_more(serve: Serve, image: Path) -> None:
    # given a service that answers four at a time
    four = threading.Barrier(4)

    def answer_four(_service: FakeService, _number: int) -> Reply:
        four.wait(LIMIT / 2)
        return OK

    service = serve(answer_four)

    # when
    done = stress(service.url, image, "--requests", 40, "--concurrency", 4)

    # then
    assert done.figures["answered"] == len(service.bodies) == 40
    assert service.most_in_flight == 4


def test_each_client_of_a_closed_loop_keeps_its_connection(serve: Serve, image: Path) -> None:
    # given a service that answers the first four together, so that no client can do all the work
    four = threading.Barrier(4)

    def answer(_service: FakeService, number: int) -> Reply:
        if number <= 4:
            four.wait(LIMIT / 2)
        return OK

    service = serve(answer)

    # when
    stress(service.url, image, "--requests", 40, "--concurrency", 4)

    # then
    assert service.connections == 4


def test_a_closed_loop_sends_no_more_than_asked_however_many_clients(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = stress(service.url, image, "--requests", 2, "--concurrency", 50)

    # then
    assert (done.code, done.figures["requests"], done.figures["answered"]) == (0, 2, 2)
    assert (len(service.bodies), service.connections) == (2, 2)


# --- stress_test.py: how it ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "came_back"),
    [
        (("--concurrency", "1"), 3),  # the fourth is sent only after the third has come back
        (("--interval", "0"), 0),
        (("--interval", "30"), 0),
    ],
)
def test_ctrl_c_prints_what_came_back_and_does_not_hang(
    serve: Serve, image: Path, mode: tuple[str, str], came_back: int
) -> None:
    # given
    service = serve(first_then_hang(came_back))
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
            service.wait_for(came_back + 1)
            running.send_signal(signal.SIGINT)
            stdout, stderr = running.communicate(timeout=10)
        finally:
            running.kill()

    # then
    done = outcome(subprocess.CompletedProcess([], running.returncode, stdout, stderr), report)
    assert done.code == 130
    assert done.summary[0] == f"[INFO] 8 requests: {came_back} answered, 0 failed, {8 - came_back} unfinished"
    assert done.lines == [f"[INFO] thread {number} OK" for number in range(came_back)]
    assert "Traceback" not in stderr


def test_what_came_back_just_before_ctrl_c_still_counts() -> None:
    # given
    test = in_process(Instant, total=3)
    test.inbox.put(answered(0, 0.0, 0.1))
    test.inbox.put(answered(1, 0.0, 0.1))

    # when
    test.stop()
    test.run(0.001, None)

    # then
    figures = summarise(test.results, asked=3)
    assert (figures.answered, figures.unfinished) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
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
def test_bad_arguments_are_refused_in_one_line_before_anything_is_sent(
    serve: Serve, image: Path, arguments: list[str], complaint: str
) -> None:
    # given
    service = serve(always(OK))

    # when
    good = ("--url", service.url, "--image", image, "--requests", 1)
    done = run(ROOT / "stress_test.py", *good, *arguments)

    # then
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, complaint)
    assert service.bodies == []


def test_a_bad_argument_leaves_an_earlier_json_file_as_it_was(image: Path) -> None:
    # given
    report = image.with_name("earlier.json")
    report.write_text("figures")

    # when
    done = run(ROOT / "stress_test.py", "--image", image, "--json", report, "--requests", 0)

    # then
    assert done.returncode == 2
    assert report.read_text() == "figures"


# --- stress_test.py: faults of the client's own machine, which need its insides ---------------------------


@pytest.mark.parametrize(("interval", "clients"), [(0.001, None), (0.0, None), (1.0, 4)])
def test_threads_that_the_system_refuses_are_counted(
    monkeypatch: pytest.MonkeyPatch, interval: float, clients: int | None
) -> None:
    # given a system that has no third thread
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
    failures = summarise(test.results, asked=4).failures
    assert sorted(result.thread for result in test.results) == [0, 1, 2, 3]
    assert failures == ({"no_common_start": 3, "no_thread": 1} if interval == 0 else {"no_thread": 1})


def test_an_exception_in_a_thread_is_counted_under_its_name() -> None:
    # given
    class Exhausted(Target):
        def send(self, session: requests.Session, thread: int) -> requests.Response:
            raise MemoryError

    test = in_process(Exhausted, total=3)

    # when
    test.run(0.0, None)

    # then
    assert summarise(test.results, asked=3).failures == {"MemoryError": 3}


def test_a_machine_out_of_open_files_is_not_taken_for_a_service_that_refuses() -> None:
    # given
    class OutOfFiles(Target):
        def send(self, session: requests.Session, thread: int) -> requests.Response:
            raise requests.ConnectionError from OSError(errno.EMFILE, "Too many open files")

    test = in_process(OutOfFiles, total=2)

    # when
    test.run(0.0, None)

    # then
    assert summarise(test.results, asked=2).failures == {"too_many_open_files": 2}


def test_threads_that_never_report_are_left_behind_as_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    # given one thread that hangs beyond every limit, as with an answer that comes byte by byte for ever
    for_ever = threading.Event()

    class Stuck(Instant):
        def post(self, session: requests.Session, thread: int) -> Result:
            if thread == 1:
                for_ever.wait(LIMIT)
            return super().post(session, thread)

    monkeypatch.setattr(stress_test, "GRACE", 0.2)
    test = in_process(Stuck, total=3)

    # when
    test.run(0.001, None)
    for_ever.set()

    # then
    figures = summarise(test.results, asked=3)
    assert (figures.answered, figures.failed, figures.unfinished) == (2, 0, 1)
    assert stress_test.exit_code(figures, stopped=False) == 1


def test_the_stress_test_sends_the_images_of_a_folder_by_turns(serve: Serve, tmp_path: Path) -> None:
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


def test_the_stress_test_draws_what_it_measured(serve: Serve, image: Path, tmp_path: Path) -> None:
    # given
    def some_fail(_service: FakeService, number: int) -> Reply:
        return OK if number % 3 else refusal(503, "queue_full")

    # when
    stress(serve(some_fail).url, image, "--requests", 30, "--interval", 0, "--plot", tmp_path / "load.png")

    # then
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > picture.height > 300
        blue, red = (31, 119, 180), (214, 39, 40)  # of what was answered and of what failed
        colors = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
        assert {blue, red} <= colors


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--plot", "picture.gif"), "must end in"), (("--image", "/proc/self/fdinfo"), "no image is in this folder")],
)
def test_the_stress_test_says_at_once_what_it_can_not_do(
    deserted_url: str, arguments: tuple[str, str], reason: str
) -> None:
    done = run(ROOT / "stress_test.py", "--url", deserted_url, *arguments)

    assert done.returncode == 2
    assert_one_line(done.stderr, reason)


def test_the_size_of_the_batch_is_read_from_the_answer() -> None:
    answer = requests.Response()
    answer.headers["Server-Timing"] = 'prepare;dur=1.0, compute;dur=2.0;desc="batch of 17", total;dur=3.0'

    assert stress_test.batch_size(answer) == 17
    assert stress_test.batch_size(requests.Response()) is None
