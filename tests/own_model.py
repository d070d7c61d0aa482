"""A small model of a user's own, and photos that it can tell apart."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image
from samples import colors, saved

from helpers import Shape

LABELS = ["dark", "medium", "bright"]
SMALL: Shape = (64, 96, 1)  # height, width, channels
LEARN_LIMIT = 2  # seconds within which every web process learns the size of a new model


def save_model(
    path: Path, shape: tuple[int | None, int | None, int] = SMALL, facts: Any = None, gain: float = 0.1
) -> Path:
    """Save a small network, and `facts` as its JSON file. With the default gain, pixels 0..255 do not saturate it."""
    layers = [keras.Input(shape),
              keras.layers.Conv2D(4, 5, strides=3, activation="relu", kernel_initializer=initializer(1)),
              keras.layers.GlobalAveragePooling2D(),
              keras.layers.Dense(3, activation="softmax", kernel_initializer=initializer(2))]  # fmt: skip
    model = keras.Sequential(layers)
    model.set_weights([each * (gain if each.ndim == 4 else 1) for each in model.get_weights()])
    model.save(path)
    if facts is not None:
        path.with_suffix(".json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return path


def initializer(seed: int) -> Any:
    return keras.initializers.GlorotUniform(seed)


def pixels_of(shape: Shape, count: int = 2) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def photos(count: int) -> list[bytes]:
    """Pictures of several sizes, each darker than the one before, that the model can tell apart."""
    pixels = [colors(i, (150 + i, 100 + 2 * i)) * (1 - i / count) for i in range(count)]
    return [saved(Image.fromarray(each.astype(np.uint8)), "PNG") for each in pixels]
