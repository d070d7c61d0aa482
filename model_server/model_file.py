"""What stands beside a model: `name.json`, which says how `name.keras` is to be served, and its labels file.

A model that brings these is served by MODEL=path/to/name.keras alone. The settings IMAGE_*, LABELS and TOP win over
`name.json`, and what that does not say is found in the model, in `name.labels.txt`, or is the default.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marshmallow import Schema, ValidationError, fields
from marshmallow.validate import Length, OneOf, Range

from helpers import MOST_SIDE, StartupError

LONGEST = 10_000_000  # bytes: a path like /dev/zero has no end
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # such as what changes the colours of a terminal
SHOWN = 100  # characters of a wrong value
# What is done to pixels from 0 to 255 before the model: nothing, to 0 to 1, and the modes of Keras' preprocess_input.
# Those whose means are of three colours can't be for grey.
PREPROCESSING = ("none", "scale", "tf", "torch", "caffe")
FOR_COLOUR = ("torch", "caffe")


def are_labels(value: object) -> bool:
    """Whether `value` is a list of one or more labels, each a line of plain text."""
    return isinstance(value, list) and bool(value) and all(map(_is_line, value))


def _is_line(value: object) -> bool:
    return isinstance(value, str) and len(value.strip().splitlines()) == 1 and not NO_TEXT.search(value)


def _check_labels(value: object) -> None:
    if not (are_labels(value) or _is_line(value)):
        raise ValidationError("")


def _check_line(value: object) -> None:
    if not _is_line(value):
        raise ValidationError("")


SIDE = f"a whole number of pixels from 1 to {MOST_SIDE}"
ALLOWED = {
    "width": SIDE,
    "height": SIDE,
    "channels": "3 (RGB) or 1 (grey)",
    "preprocessing": "one of " + ", ".join(PREPROCESSING),
    "labels": "a list of texts, or the name of a file beside it with one class a line",
    "top": "a whole number from 1 to 1000",
    "description": "one line of at most 500 letters",
}
SCHEMA = Schema.from_dict(
    {
        "width": fields.Integer(strict=True, validate=Range(1, MOST_SIDE)),
        "height": fields.Integer(strict=True, validate=Range(1, MOST_SIDE)),
        "channels": fields.Integer(strict=True, validate=OneOf([1, 3])),
        "preprocessing": fields.String(validate=OneOf(PREPROCESSING)),
        "labels": fields.Raw(validate=_check_labels),
        "top": fields.Integer(strict=True, validate=Range(1, 1000)),
        "description": fields.String(validate=[Length(1, 500), _check_line]),
    }
)


@dataclass(frozen=True)
class ModelFile:
    """What `path`, a model's own file, says of it; None, 0 or empty where it says nothing."""

    path: Path
    width: int | None = None
    height: int | None = None
    channels: int | None = None
    preprocessing: str = "none"
    labels: list[str] | str = ""
    top: int = 0
    description: str = ""

    def refusal(self, key: str, value: object, allowed: str) -> StartupError:
        """Return the one line that says which key is wrong and what it may be."""
        return StartupError(f"{self.path}: {key}={shown(value)} is invalid: it must be {allowed}.")


def read(path: Path) -> ModelFile:
    """Return what the file at `path` says, which need not be there. Raises StartupError."""
    try:
        said = json.loads(_text(path))
    except FileNotFoundError:
        return ModelFile(path)
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(
            f'{path} can\'t be read as JSON ({first_line(error)}): it needs an object such as {{"top": 3}}.'
        ) from error
    if not isinstance(said, dict):
        raise StartupError(f'{path} holds {shown(said)}, but it needs an object such as {{"top": 3}}.')
    try:
        return ModelFile(path, **SCHEMA().load(said))
    except ValidationError as error:
        key = next(iter(error.messages_dict))
    if key in ALLOWED:
        raise ModelFile(path).refusal(key, said[key], ALLOWED[key])
    raise StartupError(f"{path}: {shown(key)}={shown(said[key])} is invalid: the keys are {', '.join(ALLOWED)}.")


def read_labels(path: Path) -> list[str]:
    """Return the labels in the file at `path`, one a line. Raises StartupError."""
    try:
        text = _text(path)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"The labels file {path} can't be read ({first_line(error)}): it needs one class a line, in UTF-8."
        ) from error
    labels = [label.strip() for label in text.splitlines()]
    if any(map(NO_TEXT.search, labels)):
        raise StartupError(f"The labels file {path} is not one of plain text: it needs one class a line.")
    if not all(labels) or not labels:
        raise StartupError(f"The labels file {path} has an empty line or none at all: it needs one class a line.")
    return labels


def labels_of(file: ModelFile, chosen: str) -> tuple[Sequence[str], str]:
    """Return the labels of a model with this file, and where they are from, for people. Raises StartupError.

    `chosen` is LABELS, the path of a labels file that wins, or empty.
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
    except StartupError as refusal:
        raise file.refusal("labels", file.labels, f"{ALLOWED['labels']} ({str(refusal).rstrip('.')})") from None


def first_line(error: BaseException) -> str:
    """Return the beginning of what an exception says, for a line of ours."""
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _text(path: Path) -> str:
    """Return the text at `path`. Raises OSError; ValueError where it is too long or a line is not UTF-8."""
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"it has more than {LONGEST // 10**6} MB")
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8") from error


def shown(value: Any) -> str:
    """Return `value`, which somebody wrote, for a line of ours: without what changes a terminal, and short.

    A path is not cut, since its end is what tells it from others.
    """
    text = str(value) if isinstance(value, str | Path) else json.dumps(value, ensure_ascii=False)
    text = text if isinstance(value, Path) else text[:SHOWN]
    return "".join(sign if sign.isprintable() else "?" for sign in text)
