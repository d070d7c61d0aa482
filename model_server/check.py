"""What `run_model_server.py --check` does: tells whether the model works here, and how fast."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import settings
from helpers import Pixels, ServiceError, StartupError
from model_server.batching import BATCHES_AT_ONCE
from model_server.classifier import Classifier
from model_server.startup import load_model

CHECK_SECONDS = 3.0  # for which the speed is measured


def check(path: Path, open_file: Callable[[Path], Any], prepare: Callable[..., Pixels]) -> None:
    """Load the model, print what POST /predict says of the image at `path`, and how fast it is. Raises StartupError.

    `open_file` and `prepare` are the web's, so that images are read and resized as the service does it: open_file(path)
    raises ServiceError and OSError, prepare(image, (width, height), channels) raises ServiceError.
    """
    with _image_at_fault(path):
        image = open_file(path)
    model = load_model()
    height, width, channels = model.shape
    with _image_at_fault(path):
        pixels = prepare(image, (width, height), channels)
    [result] = model.classify(pixels[np.newaxis])
    if isinstance(result, Exception):
        raise StartupError(f"The model can't classify {path} ({result}).")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks some letters gets escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{settings.MODEL}: {summary(model)}")
    print(f"{path}: " + ", ".join(f"{label} {probability:.4f}" for label, probability in model.decode(result)))
    speed = _images_per_second(model, np.stack([pixels] * model.batch_size))
    print(f"{settings.MODEL}: {speed:.1f} images/s in batches of {model.batch_size}, {BATCHES_AT_ONCE} at once")


@contextmanager
def _image_at_fault(path: Path) -> Iterator[None]:
    """Turn the error that the service would answer, or that the file can't be read, into a StartupError."""
    try:
        yield
    except ServiceError as error:
        raise StartupError(f"{path} can't be read as an image: {error}") from None
    except OSError as error:
        raise StartupError(f"{path} can't be read as an image ({error.strerror or error}).") from None


def summary(model: Classifier) -> str:
    """Return in one line what was found out about a model."""
    facts = model.facts
    height, width, channels = facts.shape
    colors = "RGB" if channels == 3 else "grey"
    found = f"input {width}x{height} {colors}, preprocessing {facts.preprocessing}, {len(facts.labels)} labels"
    if model.binary:
        found += f", its one output taken as the probability of {facts.labels[1]}"
    return f"{found}, {facts.description}" if facts.description else found


def _images_per_second(model: Classifier, batch: Pixels) -> float:
    """Return how many images `model` computes per second, with as many batches at once as the model server computes."""
    begun = time.monotonic()

    def compute(_: int) -> int:
        done = 0
        while time.monotonic() < begun + CHECK_SECONDS:
            model.classify(batch)
            done += 1
        return done

    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        batches = sum(pool.map(compute, range(BATCHES_AT_ONCE)))
    return batches * len(batch) / (time.monotonic() - begun)
