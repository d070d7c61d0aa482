"""The compiled call on JAX."""

from typing import Any

import numpy as np
import numpy.typing as npt

from helpers import Pixels


class Jax:
    """A model as one function that XLA compiles for each batch size. All share the weights, which are arguments."""

    def __init__(self, model: Any) -> None:
        import jax  # noqa: PLC0415 - only this backend needs it

        groups = model.trainable_variables, model.non_trainable_variables
        self._weights = jax.device_put([[variable.value for variable in group] for group in groups])

        def predict(weights: Any, images: Any) -> Any:
            return model.stateless_call(*weights, images, training=False)[0]

        self._predict = jax.jit(predict)

    def predict_on_batch(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        return np.asarray(self._predict(self._weights, images), np.float32)
