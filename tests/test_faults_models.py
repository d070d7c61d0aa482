"""Several models, or a new version of one, under load: no request is lost, and no answer is another model's.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from harness import ROOT, Serve, command_line, model_servers, wait_until
from load import Known, same_answer

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

CHANGES = 20
LABELS = (ROOT / "models/digits.labels.txt").read_text().split()


def save_rolled(path: Path) -> Path:
    """Save a digits model that answers each digit with the next one: as probable, and just as wrong."""
    model = keras.saving.load_model(ROOT / "models/digits.keras", compile=False)
    last = [layer for layer in model.layers if layer.get_weights()][-1]
    last.set_weights([np.roll(each, 1, axis=-1) for each in last.get_weights()])
    model.save(path)
    shutil.copy(ROOT / "models/digits.json", path.with_suffix(".json"))
    shutil.copy(ROOT / "models/digits.labels.txt", path.parent)
    return path


def rolled(answer: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple((LABELS[(LABELS.index(label) + 1) % len(LABELS)], probability) for label, probability in answer)


@dataclass(frozen=True)
class OfEachVersion(Known):
    """An image whose right answer depends on the version that the response names."""

    versions: dict[str, bool]  # whether a version's answers are rolled

    def is_right(self, body: Any, version: str = "") -> bool:
        if version not in self.versions:
            return False
        return same_answer(body, rolled(self.answer) if self.versions[version] else self.answer)


def server_of(serve: Serve, model: str) -> int:
    """The pid of the server of a model; waits for one."""
    mark = str(serve.redis.connection_pool.connection_kwargs["port"])
    pids: list[int] = wait_until(
        lambda: [pid for pid in model_servers(mark) if f"--model {model} " in command_line(pid)], f"{model} is served"
    )
    return pids[0]
