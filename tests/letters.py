"""A second model: the digits model with letters as labels, so that an answer shows which model gave it."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import ROOT, Process, Service, running

LABELS = list("abcdefghij")  # a for 0, b for 1, ...


def save_letters(path: Path) -> Path:
    """Save the model as `path`, with its JSON file."""
    shutil.copy(ROOT / "models/digits.keras", path)
    about = {"description": "letters", "preprocessing": "none", "labels": LABELS}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


@contextmanager
def run_letters(service: Service, folder: Path, name: str = "letters") -> Iterator[Process]:
    """Serve the model under `name` beside those of `service`; the block starts when it is loaded."""
    model = save_letters(folder / f"{name}.keras")
    command = [sys.executable, "run_model_server.py", "--model", str(model)]
    with running(command, folder / f"{name}-log", IMAGE_QUEUE=service.queue) as process:
        process.wait_for_log("* Model loaded")
        yield process
