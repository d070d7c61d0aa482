"""Checks MODEL, MODEL_WEIGHTS and LABELS by name and file content, without Keras.

run_model_server.py and bin/serve call check() first, so that a misspelled name is reported at once: importing Keras
takes seconds.
"""

import ast
import difflib
import importlib.util
import json
import os
import re
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import settings
from helpers import StartupError
from model_server import model_file
from model_server.model_file import shown

APPLICATION_FILES = Path(__file__).parents[1] / "models"
NAME = re.compile(r"[\w-]+")  # of a classifier; any other text in MODEL is a path
HEAD = 1024  # bytes of a file, enough to tell its format

ZIP, HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
SAVE_AGAIN = "save the original Keras model with model.save('name.keras')"
COPY_AGAIN = "copy the whole file here again"
NOT_KERAS = "the service needs a Keras model, saved with model.save('name.keras')"
UNPACK = "unpack it, and set MODEL to the model's file"
CONVERT_FOLDER = SAVE_AGAIN + ", or `pip install tf_keras` and run tf_keras.models.load_model('{path}').save('name.h5')"

# Files often mistaken for Keras models: offset and pattern of their bytes, what they are, what to do.
FOREIGN = (
    (0, rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (0, rb"(?i)\s*(<!doctype|<html|<\?xml)", "a web page, probably from a failed download", "download the file itself"),
    (4, rb"TFL3", "a TensorFlow Lite model", SAVE_AGAIN),
    (0, rb"\x80[\x02-\x05]", "a Python pickle, such as PyTorch's", NOT_KERAS),
    (8, rb"\{\"", "a safetensors file", NOT_KERAS),
    (0, rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!|.{257}ustar", "a compressed file or archive", UNPACK),
    (0, rb"\s*\{", "a JSON file, at most a model's architecture", "save the whole model with model.save('name.keras')"),
)
SUFFIXES = {
    ".pb": ("a part of a TensorFlow SavedModel, which is a folder", SAVE_AGAIN),
    ".tflite": ("a TensorFlow Lite model", SAVE_AGAIN),
    ".onnx": ("an ONNX model", NOT_KERAS),
    ".pt": ("a PyTorch model", NOT_KERAS),
    ".pth": ("a PyTorch model", NOT_KERAS),
    ".ckpt": ("a checkpoint, which holds only weights", SAVE_AGAIN),
}


def check() -> None:
    """Raise StartupError if MODEL, MODEL_WEIGHTS, LABELS or a file beside the model is invalid."""
    if is_path(settings.MODEL):
        path = Path(settings.MODEL)
        whole_model(path)
        file = model_file.read(path.with_suffix(".json"))
        if file.weights:
            raise file.invalid("weights", file.weights, "left out, as the model's file has them")
        model_file.labels_of(file, settings.LABELS)
        return
    if settings.MODEL not in application_names():
        raise _unknown(settings.MODEL)
    file = application_file(settings.MODEL)
    if settings.LABELS or file.labels:
        model_file.labels_of(file, settings.LABELS)
    weights = application_weights(file)
    if weights not in ("imagenet", "random"):
        file_format("MODEL_WEIGHTS", Path(weights))


def application_file(name: str) -> model_file.ModelFile:
    """Return what `models/<name>.json` says about a model of keras.applications. Raises StartupError."""
    file = model_file.read(APPLICATION_FILES / f"{name}.json")
    if file.preprocessing != "none":
        raise file.invalid("preprocessing", file.preprocessing, f"left out, since {name} has its own")
    return file


def application_weights(file: model_file.ModelFile) -> str:
    """Return the weights of a model of keras.applications: its file's, otherwise MODEL_WEIGHTS."""
    if file.weights in ("", "imagenet", "random"):
        return file.weights or settings.MODEL_WEIGHTS
    return str(file.path.parent / file.weights)


def is_path(model: str) -> bool:
    """Whether `model` is the path of a file rather than a name in keras.applications."""
    return not NAME.fullmatch(model) or (model not in application_names() and os.path.exists(model))


@cache
def application_names() -> list[str]:
    """Return the names of the classifiers in keras.applications, from its source: importing it takes seconds."""
    keras = importlib.util.find_spec("keras")  # does not import it
    if keras is None or not keras.submodule_search_locations:
        raise StartupError("Keras is not installed: .venv/bin/pip install -r requirements/service.txt")
    source = Path(keras.submodule_search_locations[0], "applications/__init__.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    return sorted(name.name for node in imports for name in node.names if name.name[0].isupper())


def _unknown(name: str) -> StartupError:
    names = {re.sub(r"[_-]", "", each).lower(): each for each in application_names()}
    near = difflib.get_close_matches(re.sub(r"[_-]", "", name).lower(), names, n=1)
    it = f"did you mean {names[near[0]]}? It" if near else "it"
    allowed = f"the path of a .keras or .h5 file or one of {', '.join(application_names())}"
    return StartupError(f"MODEL={shown(name)} is invalid: {it} must be {allowed}.")


def whole_model(path: Path) -> str:
    """Return the format of the file at `path`: "keras" or "h5". Raises StartupError unless it holds a whole model."""
    form = file_format("MODEL", path)
    if form == "h5" and "model_config" not in _attributes(path):
        raise StartupError(
            f"MODEL={shown(path)} holds at most weights, not a model: save the whole model with "
            "model.save('name.keras'), or set MODEL to a name in keras.applications and MODEL_WEIGHTS to this file."
        )
    return form


def file_format(setting: str, path: Path) -> str:
    """Return the format of the file that `setting` names, by its content: "keras" or "h5". Raises StartupError."""
    data = _head(setting, path)
    if data.startswith(HDF5):
        return "h5"
    what, todo = _in_zip(path) if data.startswith(ZIP) else _foreign(path, data)
    if what:
        raise StartupError(f"{setting}={shown(path)} is {what}: {todo}.")
    return "keras"


def _head(setting: str, path: Path) -> bytes:
    try:
        if path.is_dir():
            what, todo = _folder(path)
            raise StartupError(f"{setting}={shown(path)} is {what}: {todo}.")
        if path.exists() and not path.is_file():
            raise StartupError(f"{setting}={shown(path)} is not a file: set {setting} to the path of one.")
        with path.open("rb") as file:
            data = file.read(HEAD)
    except (FileNotFoundError, NotADirectoryError):
        allowed = "the path of a .keras or .h5 file" if setting == "MODEL" else "imagenet, random, or a weights file"
        raise StartupError(f"{setting}={shown(path)} does not exist: it must be {allowed}.") from None
    except OSError as error:
        reason = f"can't be read ({error.strerror}): let this user read it"
        raise StartupError(f"{setting}={shown(path)} {reason}.") from error
    if not data:
        raise StartupError(f"{setting}={shown(path)} is empty: {COPY_AGAIN}.")
    return data


def _folder(path: Path) -> tuple[str, str]:
    if (path / "saved_model.pb").exists():
        return "a TensorFlow SavedModel folder, which Keras 3 does not load", CONVERT_FOLDER.format(path=shown(path))
    if (path / "config.json").exists():
        return "a folder", "save the model as one file with model.save('name.keras')"
    return "a folder", "set it to the path of a file in it"


def _in_zip(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "cut off or damaged", COPY_AGAIN
    if "config.json" in names:
        return "", ""
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch model", NOT_KERAS
    return "a zip file without a Keras model at its top level", UNPACK


def _foreign(path: Path, data: bytes) -> tuple[str, str]:
    for offset, pattern, what, todo in FOREIGN:
        if re.match(pattern, data[offset:], re.DOTALL):
            return what, todo
    return SUFFIXES.get(path.suffix.lower(), ("not a file that Keras writes, or damaged", NOT_KERAS))


def saved_by(path: Path, form: str) -> tuple[int, ...]:
    """Return the version of Keras that saved the model at `path`, such as (2, 15, 0); empty if unknown."""
    with suppress(KeyError, OSError, ValueError, TypeError):
        about = _attributes(path) if form == "h5" else _member(path, "metadata.json")
        return version_of(about["keras_version"])
    return ()


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers in the text of a version, such as (2, 15, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def configuration(path: Path, form: str) -> Any:
    """Return the architecture of the model at `path`, as Keras describes it. Raises ValueError, OSError, KeyError."""
    return json.loads(_attributes(path)["model_config"]) if form == "h5" else _member(path, "config.json")


def _member(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(name))


def _attributes(path: Path) -> dict[str, str]:
    """Return the attributes of an HDF5 file that Keras writes. Raises StartupError."""
    import h5py  # noqa: PLC0415 - only HDF5 files need it

    try:
        with h5py.File(path, "r") as file:
            texts = {key: file.attrs[key] for key in ("model_config", "keras_version") if key in file.attrs}
    except OSError as error:
        raise StartupError(f"MODEL={shown(path)} is cut off or damaged: {COPY_AGAIN}.") from error
    return {key: text.decode() if isinstance(text, bytes) else str(text) for key, text in texts.items()}
