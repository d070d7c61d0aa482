"""The compiled call on TensorFlow."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import settings
from helpers import Pixels
from model_server.model_file import first_line

log = logging.getLogger(__name__)

Function = Callable[[Pixels], Any]

MAX_CONSTANT_BYTES = 1_900_000_000  # a TensorFlow graph can't hold 2 GiB


class TensorFlow:
    """A model as one TensorFlow graph for any batch size, with the weights as constants.

    Constants let TensorFlow precompute what depends only on weights, fuse each convolution with the next operations,
    and keep filters in oneDNN's layout: on a CPU, ResNet50 takes a quarter less time for one image and a tenth less in
    batches. The weights stay variables if XLA compiles the model or if they are too large.
    """

    def __init__(self, model: Any) -> None:
        variables = settings.XLA or weights_bytes(model) >= MAX_CONSTANT_BYTES
        session = None if variables else _session(model)
        self._predict = session or _function(model, variables=variables)

    def predict_on_batch(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        return np.asarray(self._predict(images), np.float32)


def _session(model: Any) -> Function | None:
    """Return `model` as a call of a TensorFlow 1 session; None if the model can't be computed in one.

    A tf.function would hold four more copies of the constants while it compiles, and two afterwards. But a session
    can't compute a layer with tensors that are not weights, such as Normalization.
    """
    one = np.zeros((1, *model.input_shape[1:]), settings.IMAGE_DTYPE)
    try:
        session = _compiled_session(model)
        session(one)
    except Exception as error:
        log.info("TensorFlow computes this model in a function, which takes more memory (%s)", first_line(error))
        return None
    return session


def _compiled_session(model: Any) -> Function:
    import tensorflow as tf  # noqa: PLC0415 - only this backend needs it

    weights = _weights(model, variables=False)
    graph = tf.Graph()
    with graph.as_default():
        images = tf.compat.v1.placeholder(settings.IMAGE_DTYPE, model.input_shape)
        probabilities = model.stateless_call(*weights, images, training=False)[0]
    config = tf.compat.v1.ConfigProto()
    # Drop the graphs before and after optimization, once the executor has its own.
    config.experimental.optimize_for_static_graph = True
    config.experimental.disable_output_partition_graphs = True
    rewriting = config.graph_options.rewrite_options
    # This pass looks for tensors that a GPU could swap out, for which it copies the constants six times.
    rewriting.memory_optimization = type(rewriting).NO_MEM_OPT
    session = tf.compat.v1.Session(graph=graph, config=config)
    return lambda pixels: session.run(probabilities, {images: pixels})


def _function(model: Any, *, variables: bool) -> Function:
    """Return `model` as a tf.function, whose weights are constants or `variables`."""
    import tensorflow as tf  # noqa: PLC0415 - only this backend needs it

    weights = _weights(model, variables=variables)
    pixels = tf.TensorSpec(model.input_shape, settings.IMAGE_DTYPE)

    @tf.function(input_signature=[pixels], autograph=False, jit_compile=settings.XLA or None)  # type: ignore[untyped-decorator]
    def predict(images: Any) -> Any:
        return model.stateless_call(*weights, images, training=False)[0]

    compiled = predict.get_concrete_function()
    return lambda images: compiled(tf.constant(images))


def _weights(model: Any, *, variables: bool) -> list[list[Any]]:
    groups = model.trainable_variables, model.non_trainable_variables
    return [[variable.value if variables else variable.numpy() for variable in group] for group in groups]


def weights_bytes(model: Any) -> int:
    """Return how many bytes the weights of `model` take in float32."""
    return sum(math.prod(variable.shape) * 4 for variable in model.variables)
