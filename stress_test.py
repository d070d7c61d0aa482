#!/usr/bin/env python3
"""Send images many times at once, count what comes back, and print the figures.

    stress_test.py                     500 threads, one started every 0.05 s, one request each
    stress_test.py --interval 0        500 threads that send at the same instant
    stress_test.py --concurrency 32    32 clients, each sending its next request after its last answer
    stress_test.py --image photos --plot load.png    the images of a folder by turns, and a picture of the latencies

A request counts as answered when its status is 200 and its JSON says success. Its latency runs from before it
connects (a client of --concurrency connects once) to the end of the answer. Percentiles are nearest-rank: the
smallest measured latency that at least so many per cent of the answered requests did not exceed. A line per
request names its thread; with --concurrency, where a thread sends many, the number of the request.

Exit code: 0 all answered, 1 some were not, 2 bad arguments, 130 stopped by Ctrl-C.
"""

import argparse
import errno
import importlib.util
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TextIO
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

KERAS_REST_API_URL = "http://localhost:8080/predict"
IMAGE_PATH = Path(__file__).parent / "images" / "cat.jpg"
NUM_REQUESTS = 500
SLEEP_COUNT = 0.05  # seconds between two starts

TIMEOUT = 120.0  # seconds one request may take
DAY = 86400.0  # seconds; beyond some such limit the system's own time functions overflow
START_LIMIT = 60.0  # seconds a thread waits for the others before all send at once
GRACE = 5.0  # seconds a thread may need to report after its time limit
TICK = 0.1  # seconds until Ctrl-C is noticed
STACK_BYTES = 512 * 1024  # the usual 8 MiB times 500 is refused where address space is limited
BATCH = re.compile(r'desc="batch of (\d{1,6})"')
# Of the images in a folder.
SUFFIXES = {f".{end}" for end in ["jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "heic", "heif", "avif"]}
SPARE_FILES = 64  # open files besides the connections


# --- figures: pure functions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of one request; `code` is None when it was answered, `status` when no answer came."""

    thread: int
    started_s: float
    latency_s: float
    status: int | None
    code: str | None
    batch: int | None = None  # images that the service computed together with this one, itself included

    @property
    def ended_s(self) -> float:
        """The moment the answer was complete, or the request had failed."""
        return self.started_s + self.latency_s

    @property
    def failure(self) -> str:
        """The name a failure is counted under, such as `503 queue_full` or `timeout`."""
        return " ".join(str(part) for part in (self.status, self.code) if part is not None)

    def __str__(self) -> str:
        """Return the tutorial's line."""
        outcome = "OK" if self.code is None else f"FAILED ({self.failure})"
        return f"[INFO] thread {self.thread} {outcome}"


@dataclass(frozen=True)
class Figures:
    """The summary of a run; `unfinished` are requests that had no outcome when the run ended."""

    requests: int
    answered: int
    failed: int
    unfinished: int
    failures: dict[str, int]
    duration_s: float
    throughput_per_s: float
    latency_ms: dict[str, float] | None


def percentile(ascending: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile of values sorted in ascending order."""
    rank = -(-percent * len(ascending) // 100)  # rounded up, in integers: 0.07 * 100 is more than 7
    return ascending[max(rank, 1) - 1]


def latency_figures(answered: Sequence[Result]) -> dict[str, float] | None:
    """Return the percentiles in milliseconds, None where nothing was answered."""
    if not answered:
        return None
    ascending = sorted(result.latency_s * 1000 for result in answered)
    ranks = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: percentile(ascending, percent) for name, percent in ranks.items()}


def seconds_until_last(results: Sequence[Result], first_start: float) -> float:
    """Return the time from the first start to the last end among `results`."""
    return max((result.ended_s for result in results), default=first_start) - first_start


def summarise(results: Sequence[Result], asked: int) -> Figures:
    """Return the figures of a run that was asked to send so many requests."""
    answered = [result for result in results if result.code is None]
    failures = Counter(result.failure for result in results if result.code is not None)
    first_start = min((result.started_s for result in results), default=0.0)
    # Up to the last answer: a request that hangs until its time limit says nothing about the others' rate.
    answering_s = seconds_until_last(answered, first_start)
    return Figures(
        requests=asked,
        answered=len(answered),
        failed=len(results) - len(answered),
        unfinished=asked - len(results),
        failures=dict(failures.most_common()),
        duration_s=seconds_until_last(results, first_start),
        throughput_per_s=len(answered) / answering_s if answering_s > 0 else 0.0,
        latency_ms=latency_figures(answered),
    )


def summary_lines(figures: Figures) -> Iterator[str]:
    """Return the figures as a person reads them."""
    yield f"[INFO] {figures.requests} requests: {figures.answered} answered, {figures.failed} failed" + (
        f", {figures.unfinished} unfinished" if figures.unfinished else ""
    )
    yield from (f"[INFO] failed: {count} x {name}" for name, count in figures.failures.items())
    yield f"[INFO] duration: {figures.duration_s:.2f} s"
    yield f"[INFO] throughput: {figures.throughput_per_s:.1f} answered requests/s until the last answer"
    if figures.latency_ms:
        yield "[INFO] latency: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in figures.latency_ms.items())


def as_json(figures: Figures, results: Sequence[Result]) -> str:
    """Return the figures and every request, with starts counted from the first one."""
    first_start = min((result.started_s for result in results), default=0.0)
    ordered = sorted(results, key=lambda result: result.thread)
    listed = [asdict(result) | {"started_s": result.started_s - first_start} for result in ordered]
    return json.dumps(asdict(figures) | {"results": listed}, indent=2) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the latency of each request over time, how the latencies are distributed, and the batches they were in."""
    import matplotlib as mpl  # noqa: PLC0415 - only who wants a picture needs it

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    axes: Any
    answered = [result for result in results if result.code is None]
    failed = [result for result in results if result.code is not None]
    first_start = min((result.started_s for result in results), default=0.0)
    drawing, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=(2, 1, 1))
    for some, colour, label in ((answered, "tab:blue", "answered"), (failed, "tab:red", "failed")):
        if some:
            starts = [result.started_s - first_start for result in some]
            axes[0].scatter(starts, [1000 * result.latency_s for result in some], s=8, color=colour, label=label)
    axes[0].set(xlabel="seconds from the first start", ylabel="latency, ms", ylim=(0, None))
    axes[0].legend(frameon=False)
    ascending = sorted(1000 * result.latency_s for result in answered)
    axes[1].plot(ascending, [100 * rank / len(ascending) for rank in range(1, len(ascending) + 1)])
    axes[1].set(xlabel="latency, ms", ylabel="per cent of the answered requests", xlim=(0, None), ylim=(0, 100))
    sizes = Counter(result.batch for result in answered if result.batch)
    axes[2].bar(list(sizes), [requests / size for size, requests in sizes.items()])
    axes[2].set(xlabel="images in a batch", ylabel="batches")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


# --- one request --------------------------------------------------------------------------------------------


def answer_code(response: requests.Response) -> str | None:
    """Return None for an answer with success, else the code of the failure."""
    try:
        answer = json.loads(response.content)
        if response.status_code == requests.codes.ok and answer["success"] is True:
            return None
        return " ".join(str(answer["error"]["code"]).split())  # on one line, whatever it was
    except ValueError:
        return "not_json"
    except (KeyError, TypeError):
        return "unexpected_json"


def batch_size(response: requests.Response) -> int | None:
    """Return how many images were computed together, where the service says so."""
    found = BATCH.search(response.headers.get("Server-Timing", ""))
    return int(found[1]) if found else None


def fault_code(error: BaseException) -> str:
    """Name what kept a request from getting any answer."""
    cause: BaseException | None = error
    # Silence in the middle of an answer is a TimeoutError, but deep inside a requests.ConnectionError.
    while cause is not None:
        if isinstance(cause, TimeoutError | requests.Timeout):
            return "timeout"
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:  # this machine's limit, no refusal
            return "too_many_open_files"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "connection_error"
    return type(error).__name__


@dataclass(frozen=True)
class Target:
    """What the threads send, by turns: encoded once, as 500 encodings would take time from the sending."""

    encoded: Sequence[requests.PreparedRequest]
    timeout: float
    environment: dict[str, Any]

    @classmethod
    def prepare(cls, address: str, images: Sequence[bytes], timeout: float, key: str = "") -> "Target":
        """Encode the requests, and look up here once what requests would look up in every thread."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with requests.Session() as session:
            encoded = [
                session.prepare_request(requests.Request("POST", address, files={"image": image}, headers=headers))
                for image in images
            ]
            # Proxies and certificates named by the environment, as requests.post would use them.
            environment = session.merge_environment_settings(encoded[0].url or address, {}, False, None, None)
        return cls(encoded, timeout, dict(environment))

    def post(self, session: requests.Session, thread: int) -> Result:
        """Send one request; whatever happens becomes a result."""
        started = time.perf_counter()
        try:
            response = self.send(session, thread)
            latency = time.perf_counter() - started
            return Result(thread, started, latency, response.status_code, answer_code(response), batch_size(response))
        except Exception as error:
            return Result(thread, started, time.perf_counter() - started, None, fault_code(error))

    def send(self, session: requests.Session, thread: int) -> requests.Response:
        """Return the whole answer; a redirect is not followed, as it would become a GET of something else."""
        request = self.encoded[thread % len(self.encoded)]
        return session.send(request, timeout=self.timeout, allow_redirects=False, **self.environment)


# --- many requests ------------------------------------------------------------------------------------------


@dataclass
class StressTest:
    """The main thread starts the others and alone prints and counts what they put into the inbox.

    The others are daemons that never print, so one that hangs holds no lock and can be left behind.
    """

    target: Target
    total: int
    bar: "tqdm[NoReturn]"
    inbox: "SimpleQueue[Result]" = field(default_factory=SimpleQueue)
    results: list[Result] = field(default_factory=list)
    stopped: bool = False

    def stop(self, *_: object) -> None:
        """Handle Ctrl-C: a flag only, as the signal may come while the bar is being drawn."""
        self.stopped = True

    def run(self, interval: float, clients: int | None) -> None:
        """Send all requests and report them; comes back in limited time, whatever the service does."""
        if clients is not None:
            self.closed_loop(clients)
        elif interval == 0:
            self.at_once()
        else:
            self.paced(interval)
        self.gather()

    def paced(self, interval: float) -> None:
        """Start one thread per interval, as the tutorial does; by the clock, so that delays do not add up."""
        first = time.perf_counter()
        for thread in range(self.total):
            while (wait := first + thread * interval - time.perf_counter()) > 0 and not self.stopped:
                self.take(min(wait, TICK))
            if self.stopped:
                return
            self.start(self.send_one, thread)

    def at_once(self) -> None:
        """Let all threads send at the same instant or, where the system has not that many, none."""
        barrier = threading.Barrier(self.total)
        for thread in range(self.total):
            if self.stopped:
                return
            if not self.start(self.send_together, thread, barrier):
                barrier.abort()

    def closed_loop(self, clients: int) -> None:
        """Let so many clients share out the requests, each waiting for its answer before it sends again."""
        rest: SimpleQueue[int] = SimpleQueue()
        for thread in range(clients, self.total):
            rest.put(thread)
        for thread in range(min(clients, self.total)):
            self.start(self.send_many, thread, rest)

    def start(self, send: Callable[..., None], thread: int, *arguments: object) -> bool:
        """Start a thread; where the system has no more of them, count that and return False."""
        arguments = (requests.Session(), thread, *arguments)  # made here: the threads are for sending only
        try:
            threading.Thread(target=send, args=arguments, daemon=True).start()
        except RuntimeError:
            self.not_sent(thread, "no_thread")
            return False
        return True

    def not_sent(self, thread: int, code: str) -> None:
        """Count a request that could not even be sent."""
        self.inbox.put(Result(thread, time.perf_counter(), 0.0, None, code))

    def send_one(self, session: requests.Session, thread: int) -> None:
        """Send one request on a connection of its own."""
        with session:
            self.inbox.put(self.target.post(session, thread))

    def send_together(self, session: requests.Session, thread: int, barrier: threading.Barrier) -> None:
        """Send one request as soon as every other thread is ready to."""
        try:
            barrier.wait(START_LIMIT)
        except threading.BrokenBarrierError:
            self.not_sent(thread, "no_common_start")
        else:
            self.send_one(session, thread)

    def send_many(self, session: requests.Session, thread: int, rest: "SimpleQueue[int]") -> None:
        """Send requests on one kept connection until none is left."""
        with session, suppress(Empty):
            while not self.stopped:
                self.inbox.put(self.target.post(session, thread))
                thread = rest.get_nowait()

    def take(self, wait_s: float) -> bool:
        """Report the next result; False where none came in time."""
        try:
            result = self.inbox.get(timeout=wait_s)
        except Empty:
            return False
        self.results.append(result)
        tqdm.write(str(result))
        self.bar.update()
        return True

    def gather(self) -> None:
        """Report results until all are there, or for too long none came; what is missing stays unfinished."""
        silence_limit = 2 * self.target.timeout + GRACE  # requests limits connecting and silence, each
        last_news = time.perf_counter()
        while not self.finished() and time.perf_counter() - last_news < silence_limit:
            if self.take(TICK):
                last_news = time.perf_counter()
        while self.take(0):
            pass  # what came back just before Ctrl-C

    def finished(self) -> bool:
        """Tell whether there is nothing left to wait for."""
        return self.stopped or len(self.results) >= self.total


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, 256 on some systems, as far as the system lets it."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - neither the module nor the limit exists on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft not in (-1, resource.RLIM_INFINITY) and soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard < 0 else min(count, hard), hard))


class Output(io.FileIO):
    """Standard output or error, where it does no harm that its reader has left, as `head -1` does after a line."""

    def write(self, data: Any) -> int:
        """Write, or pass over what nobody would read."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def bear_a_reader_that_leaves() -> None:
    """Let standard output and error be such an Output."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream:  # none where the shell has closed it
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            at_once = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, None, stream.isatty(), at_once)
            setattr(sys, name, text)


# --- command line -------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Complains in one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """Return a number of threads or requests."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def interval(text: str) -> float:
    """Return seconds between two starts."""
    if not 0 <= (seconds := float(text)) <= DAY:
        raise argparse.ArgumentTypeError(f"must be seconds from 0 to {DAY:.0f}, not {text}")
    return seconds


def time_limit(text: str) -> float:
    """Return seconds to wait."""
    if not 0 < (seconds := float(text)) <= DAY:
        raise argparse.ArgumentTypeError(f"must be seconds above 0 and up to {DAY:.0f}, not {text}")
    return seconds


def address(text: str) -> str:
    """Return the address, with /predict added where only the host was given."""
    try:
        parts = urlsplit(text)
        full = text if parts.path.strip("/") else parts._replace(path="/predict").geturl()
        requests.Session().get_adapter(requests.Request("POST", full).prepare().url or "")
    except ValueError as error:  # whatever requests finds wrong with an address is one of these
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as http://host:port") from error
    return full


def api_key(text: str) -> str:
    """Return the key, without the line's end that a file or a paste may have left."""
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise argparse.ArgumentTypeError("must be letters, digits and signs on one line")
    return key


def image_files(text: str) -> list[bytes]:
    """Return the image, or those of a folder, read once for all threads."""
    path = Path(text)
    try:
        if not path.is_dir():
            return [path.read_bytes()]
        images = [each.read_bytes() for each in sorted(path.iterdir()) if each.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text} ({error.strerror})") from error
    if not images:
        raise argparse.ArgumentTypeError(f"cannot read {text} (no image is in this folder)")
    return images


def picture(text: str) -> Path:
    """Return the path of a picture that can be drawn, tried before the load rather than after it."""
    if not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("needs matplotlib: install it, as in .venv/bin/pip install matplotlib")
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, not {text}")
    return writable(text)


def writable(text: str) -> Path:
    """Return the path of a file that can be written, tried before the load rather than after it."""
    try:
        Path(text).open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text} ({error.strerror})") from error
    return Path(text)


def command_line() -> argparse.Namespace:
    """Return the checked arguments."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", type=address, default=KERAS_REST_API_URL, help="default: %(default)s")
    add("--image", type=image_files, default=str(IMAGE_PATH), help="or a folder of them; default: %(default)s")
    add("--requests", type=count, default=NUM_REQUESTS, help="how many in all (%(default)s)")
    add("--interval", type=interval, default=SLEEP_COUNT, help="seconds between two starts (%(default)s)")
    add("--concurrency", type=count, metavar="N", help="N clients share out the requests; no --interval then")
    add("--timeout", type=time_limit, default=TIMEOUT, metavar="SECONDS", help="per request (%(default)s)")
    key = os.environ.get("API_KEY", "")
    add("--api-key", type=api_key, default=key, metavar="KEY", help="default: the environment's API_KEY")
    add("--json", type=writable, metavar="FILE", help="write the figures and every request there")
    add("--plot", type=picture, metavar="FILE", help="draw latencies and batch sizes there")
    return parser.parse_args()


def exit_code(figures: Figures, stopped: bool) -> int:
    """Return 130 for Ctrl-C, as a shell does; else 0 only where every request was answered."""
    if stopped:
        return 130
    return 0 if figures.answered == figures.requests else 1


def main() -> int:
    """Run the test and return the exit code."""
    options = command_line()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have letters that the terminal lacks
    threading.stack_size(STACK_BYTES)
    allow_open_files(min(options.requests, options.concurrency or options.requests) + SPARE_FILES)
    target = Target.prepare(options.url, options.image, options.timeout, options.api_key)
    with tqdm(total=options.requests, unit="request") as bar:
        test = StressTest(target, options.requests, bar)
        signal.signal(signal.SIGINT, test.stop)
        test.run(options.interval, options.concurrency)
    figures = summarise(test.results, options.requests)
    print(*summary_lines(figures), sep="\n")
    if options.plot:
        plot(test.results, options.plot)
    if options.json:
        sys.stdout.flush()  # the file may be /dev/stdout
        with suppress(BrokenPipeError):
            options.json.write_text(as_json(figures, test.results))
    return exit_code(figures, test.stopped)


if __name__ == "__main__":
    bear_a_reader_that_leaves()
    sys.exit(main())
