"""Print what each bomb of hostile.py costs the web, one JSON object a line: seconds of CPU, megabytes of memory."""

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile  # noqa: E402 - the path comes first
import samples  # noqa: E402

import run_web_server as web  # noqa: E402
from helpers import ServiceError  # noqa: E402


def main() -> None:
    web.keep_memory_small()
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):  # whose decoders are imported when first used
        outcome(samples.saved(hostile.SMALL, form))
    for name, make in hostile.BOMBS.items():
        data = make()
        child = os.fork()
        if not child:
            print(json.dumps({"name": name} | cost(data)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def cost(data: bytes) -> dict[str, object]:
    ctypes.CDLL(None).malloc_trim(0)  # so that what was free before is not used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
    before, started = peak_megabytes(), time.process_time()
    end = outcome(data)
    return {"outcome": end, "seconds": time.process_time() - started, "megabytes": peak_megabytes() - before}


def outcome(data: bytes) -> str:
    with tempfile.SpooledTemporaryFile(500 * 1024) as upload:  # as Werkzeug has it
        upload.write(data)
        upload.seek(0)
        try:
            web.prepare_image(web.open_image(upload), (224, 224))
        except ServiceError as error:
            return type(error).__name__
    return "pixels"


def peak_megabytes() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
