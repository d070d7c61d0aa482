"""A model server whose model takes 20 ms a batch and no CPU, as a GPU would: what is left is what the service costs.

All of run_model_server.py but for the network, which is a stand-in here: it sleeps. MODEL_MS is its time a batch.
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
from helpers import USUAL_SHAPE

ONE = np.ones(1, np.float32)
SECONDS = float(os.environ.get("MODEL_MS", "20")) / 1000


class Sleeper:
    """A classifier of one class that waits for its answer."""

    shape = settings.image_shape(USUAL_SHAPE)
    slowest = SECONDS
    batch_size = settings.BATCH_SIZE
    about = {"model": "sleeper", "weights": "none"}  # noqa: RUF012

    def warm_up(self) -> None:
        """Do nothing: there is nothing to compile."""

    def classify(self, images: Any) -> Any:
        """Return the one class' probability for each image, after the time that a batch takes."""
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
