"""Print what each bomb costs the web, one JSON object per line: seconds of CPU and megabytes of memory.

Other load on the machine can double even CPU time, so the seconds are divided by the result of slowness().
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile  # noqa: E402 - the path comes first
import samples  # noqa: E402

from helpers import ServiceError  # noqa: E402
from web.image_preparation import open_image, prepare_image  # noqa: E402
from web.process import limit_malloc  # noqa: E402

IDLE_SECONDS = 0.022  # that slowness() took on an idle machine, the one where the test's limit was chosen
REPEAT_ABOVE = 0.05  # seconds


def main() -> None:
    limit_malloc()
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "HEIF", "AVIF"):
        outcome(samples.saved(hostile.SMALL, form))  # imports its decoder
    for name, make in (hostile.BOMBS | hostile.HARMLESS_BOMBS).items():
        data = make()
        costs = [in_a_child(partial(cost, data))]
        if costs[0]["seconds"] > REPEAT_ABOVE:  # take the smallest of three: other load only adds to it
            costs += [in_a_child(partial(cost, data)) for _ in range(2)]
        print(json.dumps({"name": name} | min(costs, key=lambda cost: cost["seconds"])), flush=True)


def in_a_child(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `measure` returns in a new process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(measure()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as printed:
        measured: dict[str, Any] = json.load(printed)
    os.waitpid(child, 0)
    return measured


def cost(data: bytes) -> dict[str, Any]:
    ctypes.CDLL(None).malloc_trim(0)  # otherwise reused memory would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = peak_megabytes(), time.process_time()
    result = outcome(data)
    seconds = time.process_time() - started
    return {"outcome": result, "seconds": seconds / slowness(), "megabytes": peak_megabytes() - before}


def slowness() -> float:
    """Return how many times longer than IDLE_SECONDS a fixed piece of work takes now; at least 1."""
    started = time.process_time()
    sum(number % 7 for number in range(500_000))
    return max(1.0, (time.process_time() - started) / IDLE_SECONDS)


def outcome(data: bytes) -> str:
    with tempfile.SpooledTemporaryFile(500 * 1024) as upload:  # as in Werkzeug
        upload.write(data)
        upload.seek(0)
        try:
            prepare_image(open_image(upload), (224, 224))
        except ServiceError as error:
            return type(error).__name__
    return "pixels"


def peak_megabytes() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
