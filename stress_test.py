#!/usr/bin/env python3
"""Send images many times at once, count the answers, and print throughput and latencies.

    stress_test.py                     500 threads, one started every 0.05 s, one request each
    stress_test.py --interval 0        500 threads that send at the same instant
    stress_test.py --concurrency 32    32 clients, each sending its next request after its last answer
    stress_test.py --image photos --plot load.png    send a folder's images in turn, and draw a chart of the latencies
    stress_test.py --model digits,lite    send to these models in turn, and print the figures of each

A request counts as answered if its status is 200 and its JSON says success. With --model, the header X-Model must name
the model too; otherwise the request counts as failed with wrong_model. Its latency includes connecting (once for each
client of --concurrency) and receiving the whole answer. Percentiles are nearest-rank: p95 is the smallest latency that
at least 95% of the answered requests did not exceed. Each request is printed on one line, with the number of its
thread. With --concurrency, a thread sends many requests, so the number is that of the request.

Exit code: 0 if all were answered, 1 if some were not, 2 for bad arguments, 130 after Ctrl-C.
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
DAY = 86400.0  # seconds; much larger values overflow the system's time functions
START_LIMIT = 60.0  # seconds that a thread waits for the others before they all send at once
GRACE = 5.0  # seconds that a thread may take to report after its time limit
TICK = 0.1  # seconds between checks for Ctrl-C
STACK_BYTES = 512 * 1024  # 500 threads with the default of 8 MiB fail where address space is limited
BATCH = re.compile(r'desc="batch of (\d{1,6})"')
# Files with these suffixes are the images in a folder.
SUFFIXES = {f".{end}" for end in ["jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "heic", "heif", "avif"]}
SPARE_FILES = 64  # open files other than the connections
RANKS = {"p50": 50, "p95": 95, "p99": 99, "max": 100}  # the percentiles of the summary


# --- figures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The outcome of one request; `code` is None if it was answered, `status` is None if no answer came."""

    thread: int
    started_s: float
    latency_s: float
    status: int | None
    code: str | None
    batch: int | None = None  # images in the batch that the service computed, including this one
    model: str = ""  # that was asked for, empty without --model

    @property
    def failure(self) -> str:
        """The name of the failure, such as `503 queue_full` or `timeout`."""
        return " ".join(str(part) for part in (self.status, self.code) if part is not None)

    def __str__(self) -> str:
        """Return the line that the tutorial prints."""
        outcome = "OK" if self.code is None else f"FAILED ({self.failure})"
        return f"[INFO] thread {self.thread} {outcome}"


@dataclass(frozen=True)
class Figures:
    """The summary of a run; `unfinished` requests had neither an answer nor an error when it ended.

    `by_model` has the figures of each model if there are several.
    """

    requests: int
    answered: int
    failed: int
    unfinished: int
    failures: dict[str, int]
    duration_s: float
    throughput_per_s: float
    latency_ms: dict[str, float] | None
    by_model: dict[str, "Figures"] = field(default_factory=dict)


def percentile(ascending: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile of values sorted in ascending order."""
    rank = -(-percent * len(ascending) // 100)  # rounded up, in integers because 0.07 * 100 is more than 7
    return ascending[max(rank, 1) - 1]


def first_start(results: Sequence[Result]) -> float:
    """Return the time when the first request started."""
    return min((result.started_s for result in results), default=0.0)


def seconds_until_last(results: Sequence[Result], start: float) -> float:
    """Return the time from `start` to the end of the last request."""
    return max((result.started_s + result.latency_s for result in results), default=start) - start


def summarize(results: Sequence[Result], asked: int, models: Sequence[str] = ()) -> Figures:
    """Return the figures of a run that should send `asked` requests, to `models` in turn."""
    answered = [result for result in results if result.code is None]
    failures = Counter(result.failure for result in results if result.code is not None)
    ascending = sorted(result.latency_s * 1000 for result in answered)
    start = first_start(results)
    # Throughput ends with the last answer: a request that hangs until its time limit would distort it.
    answering_s = seconds_until_last(answered, start)
    return Figures(
        requests=asked,
        answered=len(answered),
        failed=len(results) - len(answered),
        unfinished=asked - len(results),
        failures=dict(failures.most_common()),
        duration_s=seconds_until_last(results, start),
        throughput_per_s=len(answered) / answering_s if answering_s > 0 else 0.0,
        latency_ms={name: percentile(ascending, percent) for name, percent in RANKS.items()} if answered else None,
        by_model=figures_by_model(results, asked, models) if len(set(models)) > 1 else {},
    )


def figures_by_model(results: Sequence[Result], asked: int, models: Sequence[str]) -> dict[str, Figures]:
    """Return the figures of each model."""
    turns = Counter(models[number % len(models)] for number in range(asked))
    return {
        model: summarize([result for result in results if result.model == model], turns[model])
        for model in dict.fromkeys(models)
    }


def summary_lines(figures: Figures) -> Iterator[str]:
    """Yield the lines of the printed summary."""
    yield from (f"[INFO] {line}" for line in texts(figures))
    for model, its_figures in figures.by_model.items():
        yield from (f"[INFO] {model}: {line}" for line in texts(its_figures))


def texts(figures: Figures) -> Iterator[str]:
    """Yield the figures, one text for each line."""
    yield f"{figures.requests} requests: {figures.answered} answered, {figures.failed} failed" + (
        f", {figures.unfinished} unfinished" if figures.unfinished else ""
    )
    yield from (f"failed: {count} x {name}" for name, count in figures.failures.items())
    yield f"duration: {figures.duration_s:.2f} s"
    yield f"throughput: {figures.throughput_per_s:.1f} answered requests/s until the last answer"
    if figures.latency_ms:
        yield "latency: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in figures.latency_ms.items())


def as_json(figures: Figures, results: Sequence[Result]) -> str:
    """Return the figures and every request as JSON, with start times relative to the first."""
    start = first_start(results)
    ordered = sorted(results, key=lambda result: result.thread)
    listed = [asdict(result) | {"started_s": result.started_s - start} for result in ordered]
    return json.dumps(asdict(figures) | {"results": listed}, indent=2) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the latency of each request over time, the distribution of latencies, and the batch sizes."""
    import matplotlib as mpl  # noqa: PLC0415 - needed only for --plot

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    axes: Any
    answered = [result for result in results if result.code is None]
    failed = [result for result in results if result.code is not None]
    start = first_start(results)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=(2, 1, 1))
    for some, color, label in ((answered, "tab:blue", "answered"), (failed, "tab:red", "failed")):
        if some:
            starts = [result.started_s - start for result in some]
            axes[0].scatter(starts, [1000 * result.latency_s for result in some], s=8, color=color, label=label)
    axes[0].set(xlabel="seconds from the first start", ylabel="latency, ms", ylim=(0, None))
    axes[0].legend(frameon=False)
    ascending = sorted(1000 * result.latency_s for result in answered)
    axes[1].plot(ascending, [100 * rank / len(ascending) for rank in range(1, len(ascending) + 1)])
    axes[1].set(xlabel="latency, ms", ylabel="percent of the answered requests", xlim=(0, None), ylim=(0, 100))
    sizes = Counter(result.batch for result in answered if result.batch)
    axes[2].bar(list(sizes), [requests / size for size, requests in sizes.items()])
    axes[2].set(xlabel="images in a batch", ylabel="batches")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- one request --------------------------------------------------------------------------------------------


def answer_code(response: requests.Response, model: str = "") -> str | None:
    """Return None if the answer says success and is from `model`, unless that is empty; otherwise the error code."""
    try:
        answer = json.loads(response.content)
        if response.status_code == requests.codes.ok and answer["success"] is True:
            return "wrong_model" if model and response.headers.get("X-Model") != model else None
        return " ".join(str(answer["error"]["code"]).split())  # on one line
    except ValueError:
        return "not_json"
    except (KeyError, TypeError):
        return "unexpected_json"


def batch_size(response: requests.Response) -> int | None:
    """Return the size of the batch, or None if the answer does not say."""
    found = BATCH.search(response.headers.get("Server-Timing", ""))
    return int(found[1]) if found else None


def fault_code(error: BaseException) -> str:
    """Return a name for an error that left a request without an answer."""
    cause: BaseException | None = error
    # requests reports a timeout in the middle of an answer as a ConnectionError that contains a TimeoutError.
    while cause is not None:
        if isinstance(cause, TimeoutError | requests.Timeout):
            return "timeout"
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:  # this machine's limit, not the service's fault
            return "too_many_open_files"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "connection_error"
    return type(error).__name__


@dataclass(frozen=True)
class Target:
    """The requests that the threads send in turn. They are encoded before the run, so that the threads only send.

    `models` are asked in turn. It has an empty name if the address has none, and the service takes its default model.
    """

    encoded: Sequence[requests.PreparedRequest]
    timeout: float
    environment: dict[str, Any]
    models: Sequence[str] = ("",)

    @classmethod
    def prepare(
        cls, address: str, images: Sequence[bytes], timeout: float, key: str = "", models: Sequence[str] = ("",)
    ) -> "Target":
        """Encode the requests, and read proxies and certificates from the environment, as requests.post does."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with requests.Session() as session:
            encoded = [
                session.prepare_request(requests.Request("POST", url, files={"image": image}, headers=headers))
                for image in images
                for url in (address_of(address, model) for model in models)
            ]
            environment = session.merge_environment_settings(encoded[0].url or address, {}, False, None, None)
        return cls(encoded, timeout, dict(environment), models)

    def model(self, thread: int) -> str:
        """Return the name of the model that a request asks for."""
        return self.models[thread % len(self.models)]

    def post(self, session: requests.Session, thread: int) -> Result:
        """Send one request and return its result, even after an error."""
        model, started = self.model(thread), time.perf_counter()
        try:
            response = self.send(session, thread)
            latency = time.perf_counter() - started
            code, batch = answer_code(response, model), batch_size(response)
            return Result(thread, started, latency, response.status_code, code, batch, model)
        except Exception as error:
            return Result(thread, started, time.perf_counter() - started, None, fault_code(error), model=model)

    def send(self, session: requests.Session, thread: int) -> requests.Response:
        """Return the complete answer. Redirects are not followed, because that would turn the POST into a GET."""
        request = self.encoded[thread % len(self.encoded)]
        return session.send(request, timeout=self.timeout, allow_redirects=False, **self.environment)


# --- many requests ------------------------------------------------------------------------------------------


@dataclass
class StressTest:
    """A run. The threads that send put their results into the inbox; only the main thread counts and prints.

    The others are daemons that never print, so the program can exit while one hangs.
    """

    target: Target
    total: int
    bar: "tqdm[NoReturn]"
    inbox: "SimpleQueue[Result]" = field(default_factory=SimpleQueue)
    results: list[Result] = field(default_factory=list)
    stopped: bool = False

    def stop(self, *_: object) -> None:
        """Handle Ctrl-C. Only sets a flag, because the signal may arrive while the progress bar is drawn."""
        self.stopped = True

    def run(self, interval: float, clients: int | None) -> None:
        """Send all requests and report them. Ends in limited time, even if the service hangs."""
        if clients is not None:
            self.closed_loop(clients)
        elif interval == 0:
            self.at_once()
        else:
            self.paced(interval)
        self.gather()

    def paced(self, interval: float) -> None:
        """Start one thread per interval, as the tutorial does. Each start has a fixed time, so delays do not add up."""
        first = time.perf_counter()
        for thread in range(self.total):
            while (wait := first + thread * interval - time.perf_counter()) > 0 and not self.stopped:
                self.take(min(wait, TICK))
            if self.stopped:
                return
            self.start(self.send_one, thread)

    def at_once(self) -> None:
        """Let all threads send at the same instant; if one can't be started, none sends."""
        barrier = threading.Barrier(self.total)
        for thread in range(self.total):
            if self.stopped:
                return
            if not self.start(self.send_together, thread, barrier):
                barrier.abort()

    def closed_loop(self, clients: int) -> None:
        """Share the requests among `clients` threads. Each sends its next request after its last answer."""
        rest: SimpleQueue[int] = SimpleQueue()
        for thread in range(clients, self.total):
            rest.put(thread)
        for thread in range(min(clients, self.total)):
            self.start(self.send_many, thread, rest)

    def start(self, send: Callable[..., None], thread: int, *arguments: object) -> bool:
        """Start a thread. If the system allows no more threads, count the request as not sent and return False."""
        arguments = (requests.Session(), thread, *arguments)  # created here, so that the threads only send
        try:
            threading.Thread(target=send, args=arguments, daemon=True).start()
        except RuntimeError:
            self.not_sent(thread, "no_thread")
            return False
        return True

    def not_sent(self, thread: int, code: str) -> None:
        """Count a request that could not be sent."""
        self.inbox.put(Result(thread, time.perf_counter(), 0.0, None, code, model=self.target.model(thread)))

    def send_one(self, session: requests.Session, thread: int) -> None:
        """Send one request on a new connection."""
        with session:
            self.inbox.put(self.target.post(session, thread))

    def send_together(self, session: requests.Session, thread: int, barrier: threading.Barrier) -> None:
        """Send one request as soon as all threads are ready."""
        try:
            barrier.wait(START_LIMIT)
        except threading.BrokenBarrierError:
            self.not_sent(thread, "no_common_start")
        else:
            self.send_one(session, thread)

    def send_many(self, session: requests.Session, thread: int, rest: "SimpleQueue[int]") -> None:
        """Send requests on one connection until none is left."""
        with session, suppress(Empty):
            while not self.stopped:
                self.inbox.put(self.target.post(session, thread))
                thread = rest.get_nowait()

    def take(self, wait_s: float) -> bool:
        """Wait for the next result and report it; return False if none came in time."""
        try:
            result = self.inbox.get(timeout=wait_s)
        except Empty:
            return False
        self.results.append(result)
        tqdm.write(str(result))
        self.bar.update()
        return True

    def gather(self) -> None:
        """Report results until all have come or none came for too long. Missing requests count as unfinished."""
        silence_limit = 2 * self.target.timeout + GRACE  # requests applies its timeout to connecting and to reading
        deadline = time.perf_counter() + silence_limit
        while not self.stopped and len(self.results) < self.total and time.perf_counter() < deadline:
            if self.take(TICK):
                deadline = time.perf_counter() + silence_limit
        while self.take(0):
            pass  # results that came just before Ctrl-C


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files (256 on some systems) to `count`, or as far as the system allows."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - Windows has neither this module nor the limit

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft not in (-1, resource.RLIM_INFINITY) and soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard < 0 else min(count, hard), hard))


class Output(io.FileIO):
    """Standard output or error that ignores a closed pipe, as after `| head -1`."""

    def write(self, data: Any) -> int:
        """Write `data`, or drop it if the pipe is closed."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def ignore_closed_pipes() -> None:
    """Replace standard output and error by an Output."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream:  # None if the shell has closed it
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            unbuffered = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, None, stream.isatty(), unbuffered)
            setattr(sys, name, text)


# --- command line -------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Prints errors on one line, without the usage."""

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
    """Return the URL, with the path /predict if it has none."""
    try:
        parts = urlsplit(text)
        full = text if parts.path.strip("/") else parts._replace(path="/predict").geturl()
        requests.Session().get_adapter(requests.Request("POST", full).prepare().url or "")
    except ValueError as error:  # every exception of requests about an invalid URL is a ValueError
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as http://host:port") from error
    return full


def address_of(address: str, model: str) -> str:
    """Return the address with the name of the model at the end of its path, unless the name is empty."""
    parts = urlsplit(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{model}").geturl() if model else address


def model_names(text: str) -> list[str]:
    """Return names of models that are separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names):
        raise argparse.ArgumentTypeError(f"must be names of models, separated by commas, not {text!r}")
    return names


def api_key(text: str) -> str:
    """Return the key without whitespace around it, such as the newline of a file."""
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise argparse.ArgumentTypeError("must be letters, digits and symbols on one line")
    return key


def image_files(text: str) -> list[bytes]:
    """Return the content of the image, or of each image in a folder."""
    path = Path(text)
    try:
        if not path.is_dir():
            return [path.read_bytes()]
        images = [each.read_bytes() for each in sorted(path.iterdir()) if each.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text} ({error.strerror})") from error
    if not images:
        raise argparse.ArgumentTypeError(f"cannot read {text} (this folder has no images)")
    return images


def chart(text: str) -> Path:
    """Return the path of a chart. Checks that it can be drawn before the test runs."""
    if not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("needs matplotlib: .venv/bin/pip install matplotlib")
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, not {text}")
    return writable(text)


def writable(text: str) -> Path:
    """Return the path of a file. Checks that it can be written before the test runs."""
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
    add("--model", type=model_names, default=[""], metavar="NAME[,NAME...]",
        help="models to send to in turn, a name given twice counts twice (the default model)")  # fmt: skip
    add("--image", type=image_files, default=str(IMAGE_PATH), help="a file or folder; default: %(default)s")
    add("--requests", type=count, default=NUM_REQUESTS, help="total number of requests (%(default)s)")
    add("--interval", type=interval, default=SLEEP_COUNT, help="seconds between starts (%(default)s)")
    add("--concurrency", type=count, metavar="N", help="share the requests among N clients; ignores --interval")
    add("--timeout", type=time_limit, default=TIMEOUT, metavar="SECONDS", help="limit for each request (%(default)s)")
    key = os.environ.get("API_KEY", "")
    add("--api-key", type=api_key, default=key, metavar="KEY", help="default: the environment variable API_KEY")
    add("--json", type=writable, metavar="FILE", help="write the figures and every request to this file")
    add("--plot", type=chart, metavar="FILE", help="draw latencies and batch sizes to this file")
    return parser.parse_args()


def exit_code(figures: Figures, stopped: bool) -> int:
    """Return 130 after Ctrl-C, as shells do, 0 if every request was answered, otherwise 1."""
    if stopped:
        return 130
    return 0 if figures.answered == figures.requests else 1


def main() -> int:
    """Run the test and return the exit code."""
    options = command_line()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack characters of an answer
    threading.stack_size(STACK_BYTES)
    allow_open_files(min(options.requests, options.concurrency or options.requests) + SPARE_FILES)
    target = Target.prepare(options.url, options.image, options.timeout, options.api_key, options.model)
    with tqdm(total=options.requests, unit="request") as bar:
        test = StressTest(target, options.requests, bar)
        signal.signal(signal.SIGINT, test.stop)
        test.run(options.interval, options.concurrency)
    figures = summarize(test.results, options.requests, options.model)
    print(*summary_lines(figures), sep="\n")
    if options.plot:
        plot(test.results, options.plot)
    if options.json:
        sys.stdout.flush()  # the file may be /dev/stdout
        with suppress(BrokenPipeError):
            options.json.write_text(as_json(figures, test.results))
    return exit_code(figures, test.stopped)


if __name__ == "__main__":
    ignore_closed_pipes()
    sys.exit(main())
