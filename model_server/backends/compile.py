"""The choice of the backend.

Keras' own predict_on_batch() is not used: on JAX it donates the weights to each call, which breaks two batches at once,
and on JAX and PyTorch it compiles nothing unless told to.
"""

from collections.abc import Callable
from typing import Any

from helpers import StartupError
from model_server.backends.jax import Jax
from model_server.backends.network import Network
from model_server.backends.tensorflow import TensorFlow
from model_server.backends.torch import Torch

BACKENDS: dict[str, Callable[[Any], Network]] = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}


def compiled(model: Any) -> Network:
    """Return the Keras `model` as a function of Keras' backend. Raises StartupError for unsupported backends."""
    import keras  # noqa: PLC0415 - takes seconds, and import_keras() has prepared it by now

    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise StartupError(f"KERAS_BACKEND={backend} is invalid: it must be one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[backend](model)
