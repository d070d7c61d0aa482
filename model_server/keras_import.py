"""Imports Keras: quietly, and without taking a whole GPU. Whatever needs Keras calls import_keras() first."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

from helpers import StartupError
from model_server.import_noise import without_noise

# Keras imports these where they are installed, for training and plots. They would add 3 seconds to each start.
UNUSED = ("matplotlib", "sklearn")


def import_keras() -> ModuleType:
    """Return Keras, importing it if need be. Raises StartupError where its backend can't be imported."""
    # Without these two, TensorFlow and JAX take all of a GPU's memory at once.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # JAX would log each kind of accelerator that this machine lacks.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    # 2: errors only. Whoever sets it lower wants to see what TensorFlow prints.
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") >= "2"
    if "keras" in sys.modules:
        return sys.modules["keras"]
    with without_noise() if quiet else nullcontext(), _hidden(*UNUSED):
        return _import()


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Let imports of these packages fail within the block, as if they were not installed."""
    names = set(packages) - sys.modules.keys()
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # Python's own mark for "not found" is None
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _import() -> ModuleType:
    try:
        import keras  # noqa: PLC0415
    except (ImportError, ValueError) as error:
        raise StartupError(
            f"Keras can't be imported with KERAS_BACKEND={os.environ.get('KERAS_BACKEND', 'tensorflow')} ({error}): "
            "install that package into .venv, or choose tensorflow, torch or jax."
        ) from error
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        tf.config.list_physical_devices()  # looks for GPUs now, while the noise that it prints is filtered
    return keras  # type: ignore[no-any-return]
