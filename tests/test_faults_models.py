"""Several models, or a new version of one, under load: no request is lost, and no answer is another model's.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from harness import ROOT, run_serve
from load import Known, Load, Record, freeze_in_mid_batch, known_images, same_answer
from test_serve_models import reload, server_of

from model_server.model_version import version_of

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

CHANGES = 20
LABELS = (ROOT / "models/digits.labels.txt").read_text().split()


def save_rolled(path: Path) -> Path:
    """Save a digits model that answers each digit with the next one: as probable, and just as wrong."""
    model = keras.saving.load_model(ROOT / "models/digits.keras", compile=False)
    path.parent.mkdir(exist_ok=True)
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


def test_twenty_changes_of_a_model_lose_and_mix_nothing(tmp_path: Path, record_property: Record) -> None:
    """Two versions take turns, whose answers differ. Each answer is that of the version which its header names."""
    model, next_model = tmp_path / "digits.keras", tmp_path / "next"
    others = {True: save_rolled(tmp_path / "rolled/digits.keras"), False: ROOT / "models/digits.keras"}
    for file in ROOT.glob("models/digits.*"):
        shutil.copy(file, tmp_path)
    labels = [tmp_path / "digits.json", tmp_path / "digits.labels.txt"]
    versions = {version_of([file, *labels]): it_is for it_is, file in others.items()}
    images = [OfEachVersion(each.data, each.answer, versions) for each in known_images()]
    with run_serve(tmp_path / "log", MODEL=str(model)) as serve:
        serve.process.wait_for_log("* Ready on port")
        with Load(serve.url, images) as load:
            for number in range(1, CHANGES + 1):
                load.wait_for(64)
                is_rolled = number % 2 == 1
                shutil.copy(others[is_rolled], next_model)
                next_model.rename(model)
                assert reload(serve).returncode == 0
                changed = time.monotonic()
                load.wait_for(32)
                new = {each.version for each in load.outcomes if each.started > changed}
                assert new == {version for version, it_is in versions.items() if it_is == is_rolled}

    assert load.failures == {}
    record_property("figures", load.figures)


def test_killing_one_models_server_costs_no_request_of_either(tmp_path: Path, record_property: Record) -> None:
    """The other model's 99th percentile is that of a machine whose cores are also busy with starting TensorFlow."""
    other = save_rolled(tmp_path / "other.keras")
    other_images = [Known(each.data, rolled(each.answer)) for each in known_images()]
    with run_serve(tmp_path / "log", MODELS=f"models/digits.keras,{other}") as serve:
        serve.process.wait_for_log("* Ready on port")

        @contextmanager
        def both() -> Iterator[tuple[Load, Load]]:
            with (
                Load(serve.url, clients=16) as first,
                Load(serve.url, other_images, "/predict/other", clients=16) as second,
            ):
                yield first, second

        with both() as before:
            for load in before:
                load.wait_for(1000)
        with both() as (killed, beside):
            for _ in range(10):
                killed.wait_for(32)
                pid = server_of(serve, "digits")
                freeze_in_mid_batch(pid, serve.redis, "image_queue", least=2)
                os.kill(pid, signal.SIGKILL)
            killed.wait_for(32)

    assert [load.failures for load in (*before, killed, beside)] == 4 * [{}]
    longest = f"p99 {p99(beside):.2f} s, {p99(before[1]):.2f} s before"
    record_property("figures", f"{killed.figures}; the other model: {beside.figures}, {longest}")


def p99(load: Load) -> float:
    return sorted(each.seconds for each in load.outcomes)[int(0.99 * len(load.outcomes))]
