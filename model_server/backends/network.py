"""What every backend's compiled model looks like."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from helpers import Pixels

Output = npt.NDArray[np.floating[Any]]


class Network(Protocol):
    """A compiled model, which several threads may call at once. Only the first call with a batch size compiles."""

    def predict_on_batch(self, images: Pixels) -> Output:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        ...
