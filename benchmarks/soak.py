"""Run the service at a share of its capacity for a long time, and check that nothing grows.

    .venv/bin/python benchmarks/soak.py                    20 minutes at 80% of capacity, models/digits.keras
    MODEL=ResNet50 MODEL_WEIGHTS=random .venv/bin/python benchmarks/soak.py --minutes 60

Starts a bin/serve, measures its capacity in a closed loop, then sends requests at a fixed rate. Latencies count from
the time at which a request was due, so that a stall shows in every request that it delays. Prints a line a minute:
requests answered and lost, p50 and p99 in ms, Redis' keys (counted once a second, mean), the resident memory of each
process in MB. The end is compared with minute 2, when caches and pools are warm.

Exit code: 0 nothing grew and nothing was lost, 1 otherwise.
"""

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

import requests
from system import ROOT, Serve, command_line, descendants, resident_bytes, role, run_serve
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from stress_test import percentile

DIGITS = str(ROOT / "models/digits.keras")
IMAGES = [(ROOT / f"models/digits/{name}", label) for name, label in (("three.png", "3"), ("seven.jpg", "7"))]
CLIENTS = 256  # requests in flight at most
CAPACITY_SECONDS = 40.0
TIMEOUT = 120.0  # seconds for a request
GROWTH = 0.05  # the end may exceed minute 2 by this share
FEW_KEYS = 5  # this many additional keys are noise
DRIFT = 1.25  # p99 of the last third over p99 of the first: less is measurement noise


@dataclass
class Minute:
    """The figures of one minute."""

    number: int
    answered: int = 0
    lost: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    keys: float = 0.0
    resident_mb: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One request: when it was due in seconds after the start, its latency in seconds, and what was wrong."""

    due: float
    seconds: float
    wrong: str

    @property
    def ended(self) -> float:
        """When it was answered, in seconds after the start."""
        return self.due + self.seconds


def post(url: str, number: int, check: bool) -> str:
    """Send one of the images on a new connection, like curl; return what was wrong, or "".

    `check` compares the label as well.
    """
    path, label = IMAGES[number % len(IMAGES)]
    try:
        with path.open("rb") as image:
            response = requests.post(url, files={"image": image}, timeout=TIMEOUT)
        if response.status_code != 200:
            return f"{response.status_code} {response.json()['error']['code']}"
        return "wrong label" if check and response.json()["predictions"][0]["label"] != label else ""
    except (requests.RequestException, ValueError, LookupError) as error:
        return type(error).__name__


def capacity(url: str, check: bool) -> float:
    """Return the throughput of CLIENTS in a closed loop, in requests a second. The first half is warm-up."""
    ends: list[float] = []
    begun = time.monotonic()

    def client(number: int) -> None:
        while time.monotonic() < begun + CAPACITY_SECONDS:
            if not post(url, number, check):
                ends.append(time.monotonic())

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    half = begun + CAPACITY_SECONDS / 2
    return sum(half < end < begun + CAPACITY_SECONDS for end in ends) / (CAPACITY_SECONDS / 2)


class OpenLoop:
    """Sends at a fixed rate, however long the answers take."""

    def __init__(self, url: str, rate: float, seconds: float, check: bool) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._rate, self._check = url, rate, check
        self.count = int(rate * seconds)
        self._next = 0
        self._lock = threading.Lock()
        self._begun = time.monotonic()

    def run(self) -> None:
        """Send all requests and wait for their answers."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in range(CLIENTS):
                pool.submit(self._send)

    def stop(self) -> None:
        """Send no more requests."""
        self.count = 0

    def _send(self) -> None:
        while (number := self._take()) < self.count:
            due = number / self._rate
            time.sleep(max(0.0, self._begun + due - time.monotonic()))
            wrong = post(self._url, number, self._check)
            self.outcomes.append(Outcome(due, time.monotonic() - self._begun - due, wrong))

    def _take(self) -> int:
        with self._lock:
            self._next += 1
            return self._next - 1


def sizes_mb(serve: int) -> dict[str, float]:
    """Return the resident memory of each process in MB, by program and pid.

    Apache's workers come and go, so they count together.
    """
    sizes: dict[str, float] = {}
    for pid in descendants(serve):
        with suppress(OSError):
            kind, size = role(command_line(pid)), resident_bytes(pid) / 2**20
            name = kind if kind == "Apache" else f"{kind} {pid}"
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def watch(loop: OpenLoop, serve: Serve, minutes: int) -> list[Minute]:
    """Return the figures of each minute while `loop` runs; print each as it ends."""
    seen = []
    begun = time.monotonic()
    progress = tqdm(total=minutes * 60, unit="s", disable=not sys.stderr.isatty())
    for number in range(1, minutes + 1):
        keys = []
        while time.monotonic() < begun + 60 * number:
            keys.append(serve.redis.dbsize())
            time.sleep(max(0.0, min(1.0, begun + 60 * number - time.monotonic())))
            progress.update(int(time.monotonic() - begun) - progress.n)
        ended = [outcome for outcome in list(loop.outcomes) if 60 * (number - 1) <= outcome.ended < 60 * number]
        ascending = sorted(outcome.seconds for outcome in ended) or [0.0]
        right = sum(not outcome.wrong for outcome in ended)
        p50, p99 = (percentile(ascending, percent) * 1000 for percent in (50, 99))
        seen.append(Minute(number, right, len(ended) - right, p50, p99, fmean(keys), sizes_mb(serve.process.popen.pid)))
        tqdm.write(heading(seen[0]) + row(seen[0], seen[0]) if number == 1 else row(seen[-1], seen[0]))
    progress.close()
    return seen


def heading(first: Minute) -> str:
    """Return the first two lines of the Markdown table."""
    names = [re.sub(r" \d+$", "", name) for name in sorted(first.resident_mb)]
    columns = ["minute", "answered", "lost", "p50 ms", "p99 ms", "keys", *(f"{name} MB" for name in names)]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def row(minute: Minute, first: Minute) -> str:
    """Return a line of the Markdown table, with the processes of the first minute."""
    sizes = " | ".join(f"{minute.resident_mb.get(name, float('nan')):.0f}" for name in sorted(first.resident_mb))
    return (
        f"| {minute.number} | {minute.answered} | {minute.lost} | {minute.p50_ms:.0f} | {minute.p99_ms:.0f} "
        f"| {minute.keys:.0f} | {sizes} |"
    )


def verdicts(seen: list[Minute], sent: int, answered: int) -> list[tuple[bool, str]]:
    """Return whether each condition holds, with its figures. Needs four minutes or more."""
    base, end = seen[1], seen[-1]
    results = [(answered == sent, f"{sent} requests, {sent - answered} lost")]
    for name, before in sorted(base.resident_mb.items()):
        after = end.resident_mb.get(name)
        if after is None:
            results.append((False, f"{name} is gone"))
        else:
            results.append((after <= before * (1 + GROWTH), f"{name}: {before:.1f} MB, then {after:.1f} MB"))
    few = end.keys <= base.keys + FEW_KEYS
    results.append((few or end.keys <= base.keys * (1 + GROWTH), f"keys: {base.keys:.1f}, then {end.keys:.1f}"))
    third = max(1, (len(seen) - 1) // 3)
    first, last = (median(minute.p99_ms for minute in part) for part in (seen[1 : 1 + third], seen[-third:]))
    results.append((last <= first * DRIFT, f"p99 of the first third {first:.0f} ms, of the last {last:.0f} ms"))
    return results


def parse_arguments() -> argparse.Namespace:
    """Return the options; exits with code 2 if one is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20, help="at least 4 (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    arguments = parser.parse_args()
    if arguments.minutes < 4 or not 0 < arguments.share <= 1:
        parser.error("--minutes must be at least 4, and --share between 0 and 1")
    return arguments


def main() -> int:
    """Run the soak; return the exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stops bin/serve too
    log = Path(f"/tmp/soak-{os.getpid()}.log")  # noqa: S108 - kept, to see what failed
    with run_serve(log, MODEL=os.environ.get("MODEL", DIGITS)) as serve:
        serve.process.wait_for_log("* Ready on port")
        check, url = os.environ.get("MODEL", DIGITS) == DIGITS, f"{serve.url}/predict"
        most = capacity(url, check)
        rate = most * arguments.share
        print(f"capacity {most:.1f} requests/s in a closed loop of {CLIENTS}; sending {rate:.1f}/s", flush=True)
        loop = OpenLoop(url, rate, 60.0 * arguments.minutes, check)
        sender = threading.Thread(target=loop.run)
        sender.start()
        try:
            seen = watch(loop, serve, arguments.minutes)
            sender.join(TIMEOUT)
        finally:
            loop.stop()
    for wrong, times in Counter(outcome.wrong for outcome in loop.outcomes if outcome.wrong).items():
        print(f"{times} x {wrong}")
    results = verdicts(seen, int(rate * 60.0 * arguments.minutes), sum(not outcome.wrong for outcome in loop.outcomes))
    for holds, text in results:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    if arguments.json:
        figures = {"capacity": most, "rate": rate, "minutes": [asdict(minute) for minute in seen]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(holds for holds, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
