"""Checks at warm-up that the model's outputs are probabilities, one for each label."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import settings
from helpers import Pixels, StartupError
from model_server.model_errors import is_transient
from model_server.model_file import Facts

log = logging.getLogger(__name__)

Compute = Callable[[Pixels], npt.NDArray[Any]]  # from images (n, height, width, channels) to values (n, classes)

# Activations that give probabilities: of one class out of several, or of each class on its own.
PROBABILITIES = ("softmax", "sigmoid", "hard_sigmoid", "sparsemax", "sparse_sigmoid")
ROUNDING = 1e-3  # how far a softmax in float16 may exceed 1
SUM_ERROR = 0.01  # how far the sum of an image's probabilities in half precision may differ from 1


def is_binary(shape: tuple[int, ...], facts: Facts) -> bool:
    """Whether an output of `shape`, for one image, is the probability of the second of two labels.

    Otherwise the output must have one value for each label. Raises StartupError if it has not.
    """
    classes, values = len(facts.labels), shape[1:]
    if len(shape) != 2:
        raise StartupError(
            f"MODEL={settings.MODEL} gives {values} values per image, but one per class is needed: let it end in "
            "GlobalAveragePooling2D or Flatten, and a Dense layer with softmax or sigmoid."
        )
    binary = shape == (1, 1) and classes == 2
    if shape != (1, classes) and not binary:
        raise StartupError(
            f"MODEL={settings.MODEL} gives {values} values per image, but there are {classes} "
            f"labels: {facts.labels_from} must have one per class."
        )
    return binary


def check_probabilities(compute: Compute, noise: Pixels, facts: Facts, *, one_value: bool) -> None:
    """Raise StartupError unless `compute` gives probabilities for `noise` (1, *shape) and for flat images.

    `one_value` says that the network has a single output. Other values may look like probabilities by chance, so the
    activation counts too: if it is known and not in PROBABILITIES, the values of an image must add up to 1.
    """
    values = np.concatenate([compute(noise), *_outputs_of_flat_images(compute, noise)])
    known = facts.activation in ("", *PROBABILITIES)
    because = "" if known else f", because its last activation is {facts.activation}"
    real = values.astype(np.float64)
    inside = np.isfinite(real).all() and real.min() >= 0 and real.max() <= 1 + ROUNDING
    add_up = not one_value and np.abs(real.sum(axis=1) - 1).max() < SUM_ERROR
    if values.dtype.kind in "iub" or not inside or not (known or add_up):
        raise StartupError(
            f"MODEL={settings.MODEL} does not give probabilities: end it with a softmax, or a sigmoid where "
            f"several classes may be true{because}."
        )
    if facts.activation == "softmax" and one_value:
        raise StartupError(f"MODEL={settings.MODEL} ends in a softmax of one value, which is always 1: use a sigmoid.")


def _outputs_of_flat_images(compute: Compute, like: Pixels) -> Iterator[npt.NDArray[Any]]:
    """Yield the model's finite outputs for flat images and a gradient, each computed alone; skip failures.

    A model that standardizes each image gives NaN for a flat one, and a model that uses pixels as indices may fail.
    Both may work with photos.
    """
    gradient = np.broadcast_to(np.linspace(0, 255, like.shape[2])[:, np.newaxis], like.shape)
    for image in (*(np.full_like(like, level) for level in (0, 128, 255)), gradient.astype(like.dtype)):
        try:
            values = compute(image)
        except Exception as error:
            if is_transient(error):
                raise
            log.debug("a flat image fails", exc_info=True)
            continue
        if np.isfinite(values.astype(np.float64)).all():
            yield values
