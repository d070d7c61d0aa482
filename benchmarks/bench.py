"""Measure everything in one run on this machine, and report it as Markdown, JSON and charts.

    bin/bench                       all parts, about 40 minutes
    bin/bench limits plumbing       some of them
    bin/bench --seconds 60          longer loads, for a noisy machine

Figures are compared as ratios within one run, because the same machine can be twice as fast an hour later. The load
comes from the same cores (closed_loop.py), as cheaply as it can.
"""

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_parts
import overhead_parts
import queue_parts
import report
import several_models
from measure import Bench
from system import Missing, directory
from tqdm import tqdm

PARTS: dict[str, Callable[[Bench], None]] = {
    "limits": model_parts.limits,
    "resnet50": model_parts.resnet50,
    "bundled": model_parts.bundled,
    "tutorial": overhead_parts.tutorial,
    "plumbing": overhead_parts.plumbing,
    "mosec": overhead_parts.mosec,
    "decode": overhead_parts.decode,
    "intake": queue_parts.intake,
    "scaling": queue_parts.scaling,
    "servers": queue_parts.servers,
    "models": several_models.models,
    "precision": model_parts.precision,
    "start": model_parts.start,
}


def machine() -> dict[str, Any]:
    """Return the processor, its cores and the version of Python."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"cores": os.cpu_count(), "cpu": cpu[1] if cpu else platform.machine(), "python": platform.python_version()}


def main() -> None:
    """Run the requested parts, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=30, help="length of each load (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with directory() as scratch, tqdm(unit=" measured", disable=not sys.stderr.isatty()) as progress:
        bench = Bench(scratch, arguments.seconds, progress)
        bench.figures["machine"] = machine()
        for name in arguments.parts or PARTS:
            try:
                PARTS[name](bench)
            except (Missing, TimeoutError, RuntimeError) as error:
                sys.exit(str(error))
            report.write(bench.figures, arguments.out)
    print((arguments.out / "bench.md").read_text())


if __name__ == "__main__":
    main()
