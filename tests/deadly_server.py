"""run_model_server.py with a model that a white image kills on the spot, as a fault in a driver might.

No Keras model can be made to do that, nor to run out of memory at will: with IMAGES_THAT_FIT set, it does at more.
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
    """A network that has gone bad since it was warmed up."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.fit = int(os.environ.get("IMAGES_THAT_FIT", "1000"))

    def predict_on_batch(self, images: Any) -> Any:
        if any(image.min() == 255 for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(images) > self.fit:
            raise tensorflow.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return self.network.predict_on_batch(images)


def warm_up_and_go_bad(self: Classifier) -> None:
    warm_up(self)
    self._network = Deadly(self._network)


if __name__ == "__main__":
    Classifier.warm_up = warm_up_and_go_bad  # type: ignore[method-assign]
    sys.exit(run_model_server.main())
