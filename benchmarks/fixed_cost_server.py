"""run_model_server.py with a model that only sleeps.

Like a model on a GPU it takes no CPU time, so the CPU time measured is the service's. MODEL_MS is the time for a batch.
LOADED_AT is the Unix time at which the model is loaded; by default it is loaded at once.
"""

import os
import sys
import time
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import run_model_server
import settings
from helpers import USUAL_SHAPE, model_name

ONE = np.ones(1, np.float32)
LOADED_AT = float(os.environ.get("LOADED_AT", "0"))
SECONDS = float(os.environ.get("MODEL_MS", "20")) / 1000


class Sleeper:
    """A classifier with one class that sleeps before it answers."""

    shape = settings.image_shape(USUAL_SHAPE)
    slowest = SECONDS
    batch_size = settings.BATCH_SIZE
    about = {"model": model_name(settings.MODEL), "weights": "none"}  # noqa: RUF012 - so it has the default queue

    def warm_up(self) -> None:
        """Wait until LOADED_AT."""
        time.sleep(max(0.0, LOADED_AT - time.time()))

    def classify(self, images: Any) -> Any:
        """Sleep for the time of a batch; return a probability of 1 for each image."""
        time.sleep(SECONDS)
        return [ONE for _ in images]

    def decode(self, _probabilities: Any, _top: int) -> list[tuple[str, float]]:
        """Return the one class."""
        return [("something", 1.0)]


stand_in: Any = types.ModuleType("model_server.classifier")
stand_in.load = Sleeper
sys.modules["model_server.classifier"] = stand_in

if __name__ == "__main__":
    sys.exit(run_model_server.main())
