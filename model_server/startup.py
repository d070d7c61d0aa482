"""Loads and warms up the model, quickly and without leaving copies of it in memory."""

import ctypes
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from model_server.classifier import Classifier

log = logging.getLogger(__name__)


def load_model() -> Classifier:
    """Return the model, warmed up. Raises StartupError."""
    with garbage_collected_once():
        # Imported here, because benchmarks and tests put a stand-in into sys.modules.
        from model_server.classifier import load  # noqa: PLC0415

        log.info("* Loading model...")
        model = load()
        model.warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # TensorFlow leaves several copies of the weights behind when it compiles
    return model


@contextmanager
def garbage_collected_once() -> Iterator[None]:
    """Collect garbage only at the end of the block. Later collections skip the objects that are alive then.

    A start creates hundreds of thousands of objects that stay. Searching them repeatedly takes a fifth of its time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
