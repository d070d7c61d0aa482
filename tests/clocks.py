"""A wrong clock for a program under test."""

from pathlib import Path

from harness import AS_INSTALLED

CLOCK = """
import os, time
real, shift = time.time, float(os.environ["CLOCK_SHIFT"])
time.time = lambda: real() + shift
"""


def wrong_clock(folder: Path, shift: float) -> dict[str, str]:
    """Return variables that make the clock of a Python program `shift` seconds fast. `folder` gets a module for it."""
    as_installed = Path(AS_INSTALLED["PYTHONPATH"], "sitecustomize.py").read_text()
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(as_installed + CLOCK)
    return {"PYTHONPATH": str(folder), "CLOCK_SHIFT": str(shift)}
