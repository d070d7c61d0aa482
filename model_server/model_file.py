"""Reads the files beside a model: `name.json`, which says how to serve `name.keras`, and its labels file.

With these, MODEL=path/to/name.keras is enough to serve it. The settings IMAGE_*, LABELS and TOP override `name.json`.
For a key that `name.json` leaves out, the model, `name.labels.txt` or the default decides.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marshmallow import Schema, ValidationError, fields
from marshmallow.validate import Length, OneOf, Range, Regexp

from helpers import MOST_SIDE, Shape, StartupError

MAX_BYTES = 10_000_000  # limits the read: /dev/zero, for example, has no end
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # such characters could, for example, color a terminal
DEFAULT_TOP = 5  # predictions in an answer
SHOWN = 100  # characters of an invalid value that a message shows
# What is done to pixels 0..255 before the model: nothing, scaling to 0..1, or a mode of Keras' preprocess_input.
PREPROCESSING = ("none", "scale", "tf", "torch", "caffe")
COLOR_ONLY = ("torch", "caffe")  # these subtract the mean of each of three colors


def _check_lines(value: object) -> None:
    """Raise ValidationError unless `value` is a line of plain text, or a list of one or more."""
    lines = value if isinstance(value, list) else [value]
    if not lines or not all(map(_is_line, lines)):
        raise ValidationError("")


def _is_line(value: object) -> bool:
    return isinstance(value, str) and len(value.strip().splitlines()) == 1 and not CONTROL.search(value)


SIDE = fields.Integer(strict=True, validate=Range(1, MOST_SIDE)), f"a whole number of pixels from 1 to {MOST_SIDE}"
WEIGHTS = "imagenet, random, or the name of a .h5 or .keras file beside it"
LABELS = "a list of strings, or the name of a file beside it with one class per line"
KEYS: dict[str, tuple[fields.Field[Any], str]] = {  # each with its allowed values, in words
    "width": SIDE,
    "height": SIDE,
    "channels": (fields.Integer(strict=True, validate=OneOf([1, 3])), "3 (RGB) or 1 (gray)"),
    "preprocessing": (fields.String(validate=OneOf(PREPROCESSING)), f"one of {', '.join(PREPROCESSING)}"),
    "labels": (fields.Raw(validate=_check_lines), LABELS),
    "top": (fields.Integer(strict=True, validate=Range(1, 1000)), "a whole number from 1 to 1000"),
    "weights": (fields.String(validate=Regexp(r"imagenet|random|.+\.(h5|hdf5|keras)")), WEIGHTS),
    "description": (fields.String(validate=[Length(1, 500), _check_lines]), "one line of at most 500 characters"),
}
SCHEMA = Schema.from_dict({key: field for key, (field, _) in KEYS.items()})


@dataclass(frozen=True)
class ModelFile:
    """What the file at `path` says about its model; None, 0 or empty for a missing key."""

    path: Path
    width: int | None = None
    height: int | None = None
    channels: int | None = None
    preprocessing: str = "none"
    labels: list[str] | str = ""
    top: int = 0
    description: str = ""
    weights: str = ""

    def invalid(self, key: str, value: object, allowed: str) -> StartupError:
        """Return the error for a key with an invalid value."""
        return StartupError(f"{self.path}: {key}={shown(value)} is invalid: it must be {allowed}.")


@dataclass(frozen=True)
class Facts:
    """What the service needs to know about a model besides its network.

    `shape` is (height, width, channels) of an image, `labels_from` says where the labels come from, `preprocessing`
    names what is done to pixels, `top` is the number of predictions in an answer, `activation` is the model's last
    activation, such as "softmax", or empty if unknown, and `weights` and `version` name the weights.
    """

    shape: Shape
    labels: Sequence[str]
    labels_from: str
    preprocessing: str = "none"
    top: int = DEFAULT_TOP
    description: str = ""
    activation: str = ""
    weights: str = ""
    version: str = ""


def read(path: Path) -> ModelFile:
    """Return what the file at `path` says; all defaults if there is no file. Raises StartupError."""
    try:
        content = json.loads(_text(path))
    except FileNotFoundError:
        return ModelFile(path)
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(
            f'{path} can\'t be read as JSON ({first_line(error)}): it needs an object such as {{"top": 3}}.'
        ) from error
    if not isinstance(content, dict):
        raise StartupError(f'{path} holds {shown(content)}, but it needs an object such as {{"top": 3}}.')
    try:
        return ModelFile(path, **SCHEMA().load(content))
    except ValidationError as error:
        key = next(iter(error.messages_dict))
    if key in KEYS:
        raise ModelFile(path).invalid(key, content[key], KEYS[key][1])
    raise StartupError(f"{path}: {shown(key)}={shown(content[key])} is invalid: the keys are {', '.join(KEYS)}.")


def read_labels(path: Path) -> list[str]:
    """Return the labels in the file at `path`, one per line. Raises StartupError."""
    try:
        text = _text(path)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"The labels file {path} can't be read ({first_line(error)}): it needs one class per line, in UTF-8."
        ) from error
    labels = [label.strip() for label in text.splitlines()]
    if any(map(CONTROL.search, labels)):
        raise StartupError(f"The labels file {path} is not plain text: it needs one class per line.")
    if not all(labels) or not labels:
        raise StartupError(f"The labels file {path} is empty or has an empty line: it needs one class per line.")
    return labels


def labels_of(file: ModelFile, chosen: str) -> tuple[Sequence[str], str]:
    """Return the labels of a model, and where they come from, for messages. Raises StartupError.

    `chosen` is LABELS: the path of a labels file that overrides `file`, or empty.
    """
    if chosen:
        return read_labels(Path(chosen)), f"LABELS={chosen}"
    if isinstance(file.labels, list):
        return [label.strip() for label in file.labels], f"`labels` in {file.path}"
    if not file.labels:
        path = file.path.with_suffix(".labels.txt")
        return read_labels(path), str(path)
    try:
        return read_labels(file.path.parent / file.labels), f"labels={file.labels} in {file.path}"
    except StartupError as error:
        raise file.invalid("labels", file.labels, f"{LABELS} ({str(error).rstrip('.')})") from None


def first_line(error: BaseException) -> str:
    """Return the beginning of an exception's message, to quote it in ours."""
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _text(path: Path) -> str:
    """Return the text at `path`. Raises OSError, and ValueError if it is too long or a line is not UTF-8."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES // 10**6} MB")
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8") from error


def shown(value: Any) -> str:
    """Return a user's `value` for a message: printable and short.

    A path is not shortened, since paths often differ only at the end.
    """
    text = str(value) if isinstance(value, str | Path) else json.dumps(value, ensure_ascii=False)
    text = text if isinstance(value, Path) else text[:SHOWN]
    return "".join(character if character.isprintable() else "?" for character in text)
