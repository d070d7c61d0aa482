"""A Keras model as one compiled function, for each backend that Keras runs on.

Keras' own predict_on_batch() is not used: on JAX it donates the weights to each call, so two batches can't run at once,
and on JAX and PyTorch it compiles nothing by default.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from helpers import Pixels, StartupError
from model_server.backends.jax import Jax
from model_server.backends.tensorflow import TensorFlow
from model_server.backends.torch import Torch


class Network(Protocol):
    """A compiled model, which several threads may call at once. Only the first call with a batch size compiles."""

    def predict_on_batch(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        ...


BACKENDS: dict[str, Callable[[Any], Network]] = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}


def compiled(model: Any) -> Network:
    """Return the Keras `model` compiled by Keras' backend. Raises StartupError if that is not supported."""
    import keras  # noqa: PLC0415 - slow, and import_keras() has imported it by now

    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise StartupError(f"KERAS_BACKEND={backend} is invalid: it must be one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[backend](model)
