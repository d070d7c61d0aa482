"""run_model_server.py with a faulty model: a white image kills the process, as a bug in a driver would.

With IMAGES_THAT_FIT set, larger batches run out of memory. No real Keras model does either on demand.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tensorflow

import run_model_server
from model_server.classifier import Classifier

warm_up = Classifier.warm_up


class Deadly:
    """Wraps a network and adds these faults."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.fit = int(os.environ.get("IMAGES_THAT_FIT", "1000"))

    def predict_on_batch(self, images: Any) -> Any:
        if any(image.min() == 255 for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(images) > self.fit:
            raise tensorflow.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return self.network.predict_on_batch(images)


def warm_up_and_break(self: Classifier) -> None:
    warm_up(self)
    self._network = Deadly(self._network)


if __name__ == "__main__":
    Classifier.warm_up = warm_up_and_break  # type: ignore[method-assign]
    sys.exit(run_model_server.main())
