"""The JSON file beside a model, and the error for an invalid one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import AS_INSTALLED, ROOT
from own_model import LABELS, SMALL, pixels_of, save_model

import settings
from helpers import StartupError
from model_server import classifier, model_checks


def load(monkeypatch: pytest.MonkeyPatch, path: Path, **values: Any) -> classifier.Classifier:
    for name, value in {"MODEL": str(path), "BATCH_SIZE": 2, **values}.items():
        monkeypatch.setattr(settings, name, value)
    model = classifier.load()
    model.warm_up()
    return model


def test_the_json_file_gives_labels_top_and_description(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"labels": LABELS, "top": 2, "description": "how bright it is", "width": 96, "height": 64, "channels": 1}
    model = load(monkeypatch, save_model(tmp_path / "own.keras", facts=facts))

    [first, _] = model.classify(pixels_of(SMALL))

    assert not isinstance(first, Exception)
    assert len(model.decode(first)) == 2
    assert {label for label, _ in model.decode(first, 3)} == set(LABELS)
    assert model.about["shape"] == SMALL
    assert model.about["description"] == "how bright it is"


def test_the_json_file_may_name_a_labels_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\nc\n")
    (tmp_path / "own.labels.txt").write_text("not\nthese\nthree\n")

    model = load(monkeypatch, save_model(tmp_path / "own.keras", facts={"labels": "names"}))

    assert list(model.facts.labels) == ["a", "b", "c"]


def test_a_setting_overrides_the_file_and_the_file_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\nc\n")
    facts = {"labels": LABELS, "top": 2, "width": 50, "height": 40}
    path = save_model(tmp_path / "any.keras", (None, None, 3), facts)
    assert load(monkeypatch, path).shape == (40, 50, 3)

    model = load(monkeypatch, path, LABELS=str(tmp_path / "names"), TOP=1, IMAGE_WIDTH=60)

    assert model.shape == (40, 60, 3)
    assert list(model.facts.labels) == ["a", "b", "c"]
    assert len(model.decode(np.array([0.1, 0.2, 0.7]))) == 1


def test_a_model_for_any_size_gets_the_default_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save_model(tmp_path / "any.keras", (None, None, 3))
    path.with_suffix(".labels.txt").write_text("\n".join(LABELS))

    assert load(monkeypatch, path).shape == (224, 224, 3)


WRONG = [
    ({"colour": 1}, "colour=1 is invalid: the keys are width, height, "),
    ({"width": "96"}, "width=96 is invalid: it must be a whole number of pixels from 1 to 4096."),
    ({"width": 96.5}, "width=96.5 is invalid: it must be a whole number"),
    ({"height": 0}, "height=0 is invalid: it must be a whole number"),
    ({"height": None}, "height=null is invalid: it must be a whole number"),
    ({"weights": "imagenet"}, "weights=imagenet is invalid: it must be left out, as the model's file has them."),
    ({"weights": "best"}, "weights=best is invalid: it must be imagenet, random, or the name of a .h5 or .keras file"),
    ({"channels": 2}, "channels=2 is invalid: it must be 3 (RGB) or 1 (gray)."),
    ({"channels": True}, "channels=true is invalid: it must be 3 (RGB) or 1 (gray)."),
    ({"width": 100}, "width=100 is invalid: it must be 96, which is what the model takes, or left out."),
    ({"channels": 3}, "channels=3 is invalid: it must be 1, which is what the model takes, or left out."),
    ({"preprocessing": "std"}, "preprocessing=std is invalid: it must be one of none, scale, tf, torch, caffe."),
    ({"preprocessing": ["tf"]}, 'preprocessing=["tf"] is invalid: it must be one of none'),
    ({"preprocessing": "caffe"}, "preprocessing=caffe is invalid: it must be none, scale or tf for a gray image."),
    ({"labels": []}, "labels=[] is invalid: it must be a list of strings, or the name of a file beside it"),
    ({"labels": ["a", 2, "c"]}, 'labels=["a", 2, "c"] is invalid: it must be a list of strings'),
    ({"labels": ["a", " ", "c"]}, "is invalid: it must be a list of strings"),
    ({"labels": ["a", "\x1b[31mb", "c"]}, "is invalid: it must be a list of strings"),
    ({"labels": "nowhere.txt"}, "labels=nowhere.txt is invalid: it must be a list of strings, or the name of a file"),
    ({"labels": ["a", "b"]}, "gives (3,) values per image, but there are 2 labels: `labels` in "),
    ({"top": 0}, "top=0 is invalid: it must be a whole number from 1 to 1000."),
    ({"description": "a\nb"}, "description=a?b is invalid: it must be one line of at most 500 characters."),
    ("[]", "holds [], but it needs an object such as"),
    ("{", "can't be read as JSON"),
    ("[" * 100_000, "can't be read as JSON"),
    ("", "can't be read as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "line"), WRONG, ids=[line[:40] for _, line in WRONG])
def test_an_invalid_json_file_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: Any, line: str
) -> None:
    facts = {"labels": LABELS} | facts if isinstance(facts, dict) else facts

    with pytest.raises(StartupError) as refusal:
        load(monkeypatch, save_model(tmp_path / "own.keras", facts=facts))

    assert line in str(refusal.value)
    assert str(tmp_path / "own.json") in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 600


def test_the_model_server_ends_with_code_2_and_that_line(tmp_path: Path) -> None:
    path = save_model(tmp_path / "own.keras", facts={"labels": LABELS, "tpo": 3})

    ended = subprocess.run(
        [sys.executable, "run_model_server.py"],
        cwd=ROOT, env={**os.environ, **AS_INSTALLED, "MODEL": str(path)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith(
        f"{tmp_path}/own.json: tpo=3 is invalid: the keys are width, height, channels, preprocessing, labels, top, "
        "weights, description."
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_with_2_or_4_channels_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: int
) -> None:
    path = save_model(tmp_path / "own.keras", (64, 96, channels), {"labels": LABELS})

    with pytest.raises(StartupError, match="the service has 1 or 3 channels"):
        load(monkeypatch, path)


def test_a_setting_that_contradicts_the_model_size_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="another size: set IMAGE_WIDTH=96 and IMAGE_CHANS=1"):
        load(monkeypatch, save_model(tmp_path / "own.keras", facts={"labels": LABELS}), IMAGE_WIDTH=100, IMAGE_CHANS=3)


@pytest.mark.slow("serves a large network")
def test_a_keras_classifier_has_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "EfficientNetV2B1", "MODEL_WEIGHTS": "random"}.items():
        monkeypatch.setattr(settings, name, value)

    assert classifier.load().shape == (240, 240, 3)


# models/<name>.json for a model of keras.applications


def application(monkeypatch: pytest.MonkeyPatch, folder: Path, facts: object) -> None:
    """Let VGG16 be the model, with these facts in the folder of the models."""
    monkeypatch.setattr(model_checks, "APPLICATION_FILES", folder)
    monkeypatch.setattr(settings, "MODEL", "VGG16")
    monkeypatch.setattr(settings, "MODEL_WEIGHTS", "imagenet")
    (folder / "VGG16.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("facts", "weights"),
    [({}, "imagenet"), ({"top": 3}, "imagenet"), ({"weights": "random"}, "random"), ({"weights": "my.h5"}, "my.h5")],
)
def test_an_application_takes_the_weights_that_its_file_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: dict[str, object], weights: str
) -> None:
    application(monkeypatch, tmp_path, facts)
    (tmp_path / "my.h5").write_bytes(model_checks.HDF5)

    model_checks.check()

    assert Path(model_checks.application_weights(model_checks.application_file("VGG16"))).name == weights


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"weights": "nowhere.h5"}, "nowhere.h5 does not exist: it must be imagenet, random, or a weights file"),
        ({"preprocessing": "tf"}, "preprocessing=tf is invalid: it must be left out, since VGG16 has its own."),
        ({"labels": "nowhere.txt"}, "labels=nowhere.txt is invalid"),
    ],
)
def test_an_invalid_file_of_an_application_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, facts: dict[str, object], line: str
) -> None:
    application(monkeypatch, tmp_path, facts)

    with pytest.raises(StartupError) as refusal:
        model_checks.check()

    assert line in str(refusal.value)


# The version


def test_the_version_changes_with_each_file_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save_model(tmp_path / "own.keras", facts={"labels": "own.txt", "top": 1})
    (tmp_path / "own.txt").write_text("\n".join(LABELS))

    def version() -> str:
        return str(load(monkeypatch, path).about["version"])

    versions = [version()]
    assert version() == versions[0]
    (tmp_path / "own.txt").write_text("\n".join(reversed(LABELS)))
    versions.append(version())
    (tmp_path / "own.json").write_text(json.dumps({"labels": "own.txt", "top": 2}))
    versions.append(version())
    save_model(path, facts={"labels": "own.txt", "top": 2}, gain=0.2)  # other weights
    versions.append(version())

    assert len(set(versions)) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", each) for each in versions)
