"""`run_model_server.py --check`: classifies one image, and measures how fast the model is."""

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

CHECK_SECONDS = 3.0  # how long the speed is measured


def check(path: Path, open_file: Callable[[Path], Any], prepare: Callable[..., Pixels]) -> None:
    """Load the model, print its predictions for the image at `path` and how fast it is. Raises StartupError.

    `open_file` and `prepare` are the web's, so that the image is read and resized as in the service. open_file(path)
    raises ServiceError and OSError; prepare(image, (width, height), channels) raises ServiceError.
    """
    with _blame_image(path):
        image = open_file(path)
    model = load_model()
    height, width, channels = model.shape
    with _blame_image(path):
        pixels = prepare(image, (width, height), channels)
    [result] = model.classify(pixels[np.newaxis])
    if isinstance(result, Exception):
        raise StartupError(f"The model can't classify {path} ({result}).")
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape the letters that a terminal can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{settings.MODEL}: {summary(model)}")
    print(f"{path}: " + ", ".join(f"{label} {probability:.4f}" for label, probability in model.decode(result)))
    speed = _images_per_second(model, np.stack([pixels] * model.batch_size))
    print(f"{settings.MODEL}: {speed:.1f} images/s in batches of {model.batch_size}, {BATCHES_AT_ONCE} at once")


@contextmanager
def _blame_image(path: Path) -> Iterator[None]:
    """Turn an error of the image or of reading its file into a StartupError."""
    try:
        yield
    except ServiceError as error:
        raise StartupError(f"{path} can't be read as an image: {error}") from None
    except OSError as error:
        raise StartupError(f"{path} can't be read as an image ({error.strerror or error}).") from None


def summary(model: Classifier) -> str:
    """Return a one-line summary of a model."""
    facts = model.facts
    height, width, channels = facts.shape
    colors = "RGB" if channels == 3 else "gray"
    found = f"input {width}x{height} {colors}, preprocessing {facts.preprocessing}, {len(facts.labels)} labels"
    if model.binary:
        found += f", its one output taken as the probability of {facts.labels[1]}"
    return f"{found}, {facts.description}" if facts.description else found


def _images_per_second(model: Classifier, batch: Pixels) -> float:
    """Return how many images per second `model` computes, with BATCHES_AT_ONCE as in the model server."""
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
