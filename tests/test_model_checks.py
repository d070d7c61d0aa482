"""An invalid MODEL, MODEL_WEIGHTS or LABELS is refused at once, before Keras is imported."""

import os
import pwd
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, free_port

import settings
from helpers import StartupError
from model_server import applications, classifier, downloads, model_checks, model_file

CODE = """
import sys, run_model_server
sys.argv = ["run_model_server.py", *sys.argv[1:]]
code = run_model_server.main()
print("imported", sorted({"keras", "tensorflow"} & set(sys.modules)))
sys.exit(code)
"""
ZIP = b"PK\x03\x04"


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A model server that ran without Redis; the last line of its output says whether it imported Keras."""
    command = [sys.executable, "-c", CODE, *arguments]
    variables = {**os.environ, "REDIS_PORT": str(free_port()), **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"MODEL": "resnet50"}, "MODEL=resnet50 is invalid: did you mean ResNet50? It must be the path of"),
        ({"MODEL": "no/such.h5"}, "MODEL=no/such.h5 does not exist: it must be the path of a .keras or .h5 file."),
        ({"MODEL": "models/"}, "MODEL=models is a folder: set it to the path of a file in it."),
        (
            {"MODEL": "README.md"},
            "MODEL=README.md is not a file that Keras writes, or damaged: the service needs a Keras",
        ),
        ({"LABELS": "nowhere"}, "The labels file nowhere can't be read"),
        ({"MODEL": "ResNet50", "LABELS": "nowhere"}, "The labels file nowhere can't be read"),
        (
            {"MODEL": "ResNet50", "MODEL_WEIGHTS": "own.h5"},
            "MODEL_WEIGHTS=own.h5 does not exist: it must be imagenet, ",
        ),
    ],
)
def test_an_invalid_name_is_refused_before_keras_is_imported(values: dict[str, str], line: str) -> None:
    ended = started(**values)

    assert ended.returncode == 2
    assert ended.stdout == "imported []\n"
    [logged] = ended.stderr.splitlines()
    assert f"ERROR {line}" in logged


def test_the_model_option_is_checked_like_the_setting() -> None:
    ended = started("--model", "efficientnet-v2-b0", "--check")

    assert ended.returncode == 2
    assert "did you mean EfficientNetV2B0?" in ended.stderr
    assert ended.stdout == "imported []\n"


def test_an_unreadable_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "own.keras"
    path.touch()
    monkeypatch.setattr(Path, "open", _denied)  # root, which may run the tests, can read everything
    monkeypatch.setattr(settings, "MODEL", str(path))

    with pytest.raises(StartupError, match=r"own\.keras can't be read \(Permission denied\): let this user read it\."):
        model_checks.check()


def _denied(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_bin_serve_refuses_an_invalid_name_before_it_starts_anything(tmp_path: Path) -> None:
    variables = {"MODEL": "resnet50", "PORT": str(free_port()), "REDIS_PORT": str(free_port())}

    ended = subprocess.run(
        [sys.executable, ROOT / "deploy/serve.py"], cwd=tmp_path, env={**os.environ, **variables},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 1
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("bin/serve: MODEL=resnet50 is invalid: did you mean ResNet50?")


def test_application_names_match_those_of_keras() -> None:
    assert model_checks.application_names() == sorted(applications.applications())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("resnet50", "ResNet50"), ("RESNET50V2", "ResNet50V2"), ("ResNet_50", "ResNet50"), ("vgg-16", "VGG16"),
     ("efficientnetb0", "EfficientNetB0"), ("mobilnet", "MobileNet"), ("Inception_v3", "InceptionV3")],
)  # fmt: skip
def test_a_misspelled_name_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setattr(settings, "MODEL", name)

    with pytest.raises(StartupError, match=rf"MODEL={name} is invalid: did you mean {meant}\? It must be .* ResNet50,"):
        model_checks.check()


def zip_of(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"{}")

    return make


def of_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").touch()


def cut_off(path: Path) -> None:
    path.write_bytes((ROOT / "models/digits.keras").read_bytes()[:20_000])


def weights_alone(path: Path) -> None:
    import h5py  # noqa: PLC0415

    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = [1.0]


KERAS_NEEDED = "the service needs a Keras model, saved with model.save('name.keras')."
FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a.keras", of_bytes(b""), " is empty: copy the whole file here again."),
    ("a.keras", cut_off, " is cut off or damaged: copy the whole file here again."),
    ("a.h5", of_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 100), " is cut off or damaged: copy the whole file here again."),
    ("a.keras", of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), " with `git lfs pull`."),
    ("a.keras", of_bytes(b"\n<!DOCTYPE html>"), " is a web page, probably from a failed download: download the file"),
    ("a.weights.h5", weights_alone, " holds at most weights, not a model: save the whole model with"),
    ("a.h5", weights_alone, " holds at most weights, not a model"),
    ("folder", saved_model, "folder is a TensorFlow SavedModel folder, which Keras 3 does not load: save the original"),
    ("saved_model.pb", of_bytes(b"\x08\x01"), " is a part of a TensorFlow SavedModel, which is a folder: save"),
    ("a.tflite", of_bytes(b"\x1c\0\0\0TFL3"), " is a TensorFlow Lite model: save the original Keras model with"),
    ("a.keras", of_bytes(b"\x1c\0\0\0TFL3"), " is a TensorFlow Lite model"),
    ("a.onnx", of_bytes(b"\x08\x07"), f" is an ONNX model: {KERAS_NEEDED}"),
    ("a.pt", zip_of("archive/data.pkl"), f" is a PyTorch model: {KERAS_NEEDED}"),
    ("a.pkl", of_bytes(b"\x80\x04\x95"), f" is a Python pickle, such as PyTorch's: {KERAS_NEEDED}"),
    ("a.safetensors", of_bytes(b'\x10\0\0\0\0\0\0\0{"a":1}'), f" is a safetensors file: {KERAS_NEEDED}"),
    ("a.keras", zip_of("model/config.json"), " is a zip file without a Keras model at its top level: unpack it"),
    ("a.keras.gz", of_bytes(b"\x1f\x8b\x08"), " is a compressed file or archive: unpack it"),
    ("model.json", of_bytes(b'{"class_name": "Sequential"}'), " is a JSON file, at most a model's architecture: save"),
    ("a.keras", of_bytes(b"\0" * 500), f" is not a file that Keras writes, or damaged: {KERAS_NEEDED}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "line"), FILES, ids=[f"{name}{line[:30]}" for name, _, line in FILES])
def test_the_error_says_what_kind_of_file_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, make: Callable[[Path], object], line: str
) -> None:
    make(tmp_path / name)
    monkeypatch.setattr(settings, "MODEL", str(tmp_path / name))

    with pytest.raises(StartupError) as refusal:
        classifier.load()

    assert line in str(refusal.value)
    assert str(refusal.value).startswith(f"MODEL={tmp_path / name} ")
    assert str(refusal.value).isprintable()


# Labels


@pytest.mark.parametrize(
    ("data", "line"),
    [("eins\nzwei\ndr\u00fcben\n".encode("latin-1"), "line 3 is not UTF-8"),
     ("\u4e2d\n\u6587\n".encode("gbk"), "line 1 is not UTF-8"), ("a\nb\n".encode("utf-16"), "line 1 is not UTF-8"),
     (b"a\n" * 6_000_000, "it has more than 10 MB")],
    ids=["latin-1", "gbk", "utf-16", "long"],
)  # fmt: skip
def test_labels_in_another_encoding_are_refused_with_their_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes, line: str
) -> None:
    (tmp_path / "labels.txt").write_bytes(data)
    monkeypatch.setattr(settings, "LABELS", str(tmp_path / "labels.txt"))

    with pytest.raises(StartupError) as refusal:
        model_checks.check()

    assert str(refusal.value) == (
        f"The labels file {tmp_path}/labels.txt can't be read ({line}): it needs one class per line, in UTF-8."
    )


def test_a_json_file_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes('{"top": 1,\n"description": "Vögel"}'.encode("latin-1"))

    with pytest.raises(StartupError, match=r"own\.json can't be read as JSON \(line 2 is not UTF-8\)"):
        model_file.read(tmp_path / "own.json")


# Where Keras keeps its downloads


def nobody(_: int) -> None:
    raise KeyError


def test_keras_downloads_are_found_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # as in a container whose user has no name
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "cache"))
    assert downloads.keras_downloads() == tmp_path / "cache/models"

    monkeypatch.delenv("KERAS_HOME")
    assert downloads.keras_downloads() == Path("/tmp/.keras/models")
