"""Imports Keras: quietly, and without taking a whole GPU. All code that needs Keras calls import_keras() first."""

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType

from helpers import StartupError

# If these are installed, Keras imports them for training and plots. They would add 3 seconds to each start.
UNUSED = ("matplotlib", "sklearn")
# TensorFlow prints these lines before it reads TF_CPP_MIN_LOG_LEVEL, so no setting silences them: messages below error
# level and messages about a library registered twice. Without a GPU, it also reports the missing GPU.
NOISE = [
    "^[IW][0-9]{4} ",
    "^WARNING: All log messages before absl::InitializeLog",
    "Unable to register cu[A-Z]+ factory",
]
if not Path("/dev/nvidiactl").exists():
    NOISE.append("failed call to cuInit")
FILTER = ["grep", "--text", "--line-buffered", "--invert-match", "--extended-regexp", "|".join(NOISE)]
FILTER_LIMIT = 5  # seconds to wait for grep's end: a program started meanwhile may hold the pipe open


def import_keras() -> ModuleType:
    """Return Keras, importing it if needed. Raises StartupError if its backend can't be imported."""
    # Without these two, TensorFlow and JAX take all of a GPU's memory at once.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # JAX would log each kind of accelerator that this machine lacks.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    # 2: errors only. A user who sets it lower wants to see what TensorFlow prints.
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") >= "2"
    if "keras" in sys.modules:
        return sys.modules["keras"]
    with without_noise() if quiet else nullcontext(), _hidden(*UNUSED):
        keras = _import()
    gc.freeze()  # imports stay alive: searching them again would take the garbage collector half a second
    return keras


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Let imports of these packages fail within the block, as if they were not installed."""
    names = set(packages) - sys.modules.keys()
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None is how Python marks "not found"
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

        tf.config.list_physical_devices()  # looks for GPUs now, while its noise is filtered
    return keras  # type: ignore[no-any-return]


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep lines that match NOISE off standard error, including those written by C code.

    A separate process filters them, so that the last messages of a library that aborts still get through.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    # In a new session, so that Ctrl-C does not reach it.
    grep = subprocess.Popen(FILTER, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True)  # noqa: S603
    assert grep.stdin
    os.dup2(grep.stdin.fileno(), 2)
    grep.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # closes the pipe, which ends grep
        os.close(stderr)
        with suppress(subprocess.TimeoutExpired):
            grep.wait(FILTER_LIMIT)
