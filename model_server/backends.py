"""A Keras model as one compiled function, for each backend that Keras can run on. Imports Keras, quietly.

Keras' own predict_on_batch() is not used: on JAX it donates the weights to each call, so that two batches at once break
each other, and it compiles nothing there or on PyTorch unless told to.

Each class here has the same method, predict_on_batch(). It can be called from several threads at once. The first call
with a batch size compiles; a later call with that size never does.
"""

import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import settings
from helpers import BATCHES_AT_ONCE, StartupError
from model_server.import_noise import without_noise

# Keras imports these where they are installed, for training and plots. They take 3 seconds of each start.
UNUSED = ("matplotlib", "sklearn")
MOST_CONSTANTS = 1_900_000_000  # bytes: a TensorFlow graph can't hold 2 GiB

log = logging.getLogger(__name__)

Images = npt.NDArray[np.generic]
Output = npt.NDArray[np.floating[Any]]


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Let an import of these packages fail within the block, as if they were not installed."""
    names = set(packages) - sys.modules.keys()
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None is Python's own mark for it
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _import_keras() -> None:
    try:
        import keras  # noqa: PLC0415
    except (ImportError, ValueError) as error:
        raise StartupError(
            f"Keras can't be imported with KERAS_BACKEND={os.environ.get('KERAS_BACKEND', 'tensorflow')} ({error}): "
            "install that package into .venv, or choose tensorflow, torch or jax."
        ) from error
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        tf.config.list_physical_devices()  # looks for GPUs, which else the first operation does


# Without these, both take all of a GPU's memory at once.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Without this, JAX tells of each kind of accelerator that is not there.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
# 2: errors. With less, somebody wants to see what TensorFlow says.
_quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") >= "2"
with without_noise() if _quiet else nullcontext(), _hidden(*UNUSED):
    _import_keras()


class Network(Protocol):
    """A model that is ready to compute."""

    def predict_on_batch(self, images: Images) -> Output:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        ...


class TensorFlow:
    """A model as one TensorFlow function of any number of images, in which the weights are constants.

    Only then does TensorFlow work out once what depends on weights alone, merge a convolution with what follows it,
    and keep its filters in the order that oneDNN computes with: ResNet50 on a CPU takes a quarter less for one image
    and a tenth less in batches. Where XLA compiles, or the weights are too large, they stay variables.
    """

    def __init__(self, model: Any) -> None:
        import tensorflow as tf  # noqa: PLC0415 - Keras may run on another backend

        variables = settings.XLA or weights_bytes(model) >= MOST_CONSTANTS
        trainable, others = (
            [variable.value if variables else variable.numpy() for variable in group]
            for group in (model.trainable_variables, model.non_trainable_variables)
        )
        pixels = tf.TensorSpec(model.input_shape, settings.IMAGE_DTYPE)

        @tf.function(input_signature=[pixels], autograph=False, jit_compile=settings.XLA or None)  # type: ignore[untyped-decorator]
        def predict(images: Any) -> Any:
            return model.stateless_call(trainable, others, images, training=False)[0]

        self._predict = predict.get_concrete_function()
        self._constant = tf.constant

    def predict_on_batch(self, images: Images) -> Output:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        return np.asarray(self._predict(self._constant(images)), np.float32)


class Jax:
    """A model as one function that XLA compiles for each batch size; the weights are arguments, on the device once."""

    def __init__(self, model: Any) -> None:
        import jax  # noqa: PLC0415 - Keras may run on another backend

        groups = model.trainable_variables, model.non_trainable_variables
        self._weights = jax.device_put([[variable.value for variable in group] for group in groups])

        def predict(weights: Any, images: Any) -> Any:
            return model.stateless_call(*weights, images, training=False)[0]

        self._predict = jax.jit(predict)

    def predict_on_batch(self, images: Images) -> Output:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        return np.asarray(self._predict(self._weights, images), np.float32)


class Torch:
    """A model as TorchScript with frozen weights, which needs no compiler on this machine, as torch.compile() does.

    It has no Python in it, and a convolution is merged with the normalization that follows it: on a CPU ResNet50 takes
    less than half of what Keras takes for one image, and a small model a tenth.
    """

    def __init__(self, model: Any) -> None:
        import torch  # noqa: PLC0415 - Keras may run on another backend

        if settings.XLA:
            log.warning("XLA=true changes nothing with PyTorch")
        self._torch: Any = torch
        self._model = model.eval()
        self._device = next((weights.device for weights in model.parameters()), torch.device("cpu"))
        # On a CPU TorchScript's fuser fuses nothing, but it compiles for seconds at calls long after the first.
        torch._C._jit_set_texpr_fuser_enabled(self._device.type != "cpu")
        self._functions: dict[tuple[int, ...], Callable[[Any], Any]] = {}  # by the shape of a batch
        self._compiling = threading.Lock()
        # cuDNN plans a convolution anew in each thread, which takes seconds for a whole network. So the same threads
        # compute always, and each has computed a shape before it counts as compiled.
        self._threads = [ThreadPoolExecutor(1, "torch") for _ in range(BATCHES_AT_ONCE)]
        self._free: SimpleQueue[ThreadPoolExecutor] = SimpleQueue()
        for thread in self._threads:
            self._free.put(thread)

    def predict_on_batch(self, images: Images) -> Output:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        if images.shape not in self._functions:
            with self._compiling:
                self._prepare(images)
        thread = self._free.get()
        try:
            return thread.submit(self._predict, self._functions[images.shape], images).result()
        finally:
            self._free.put(thread)

    def _prepare(self, images: Images) -> None:
        """Compile for batches of this shape, and compute one on each thread."""
        if images.shape in self._functions:
            return  # another call has done it meanwhile
        function = self._threads[0].submit(self._compile, images).result()
        for thread in self._threads:
            thread.submit(self._predict, function, images).result()
        self._functions[images.shape] = function

    def _predict(self, function: Callable[[Any], Any], images: Images) -> Output:
        with self._torch.inference_mode():
            return np.asarray(function(self._on_device(images)).float().cpu())

    def _on_device(self, images: Images) -> Any:
        return self._torch.tensor(images, device=self._device)

    def _compile(self, images: Images) -> Callable[[Any], Any]:
        """Return a function that is right for batches like this one.

        It may have been compiled for another batch size. A model that can't be compiled is run as it is.
        """
        with self._torch.inference_mode():
            return self._checked(self._on_device(images))

    def _checked(self, batch: Any) -> Callable[[Any], Any]:
        plain = self._model(batch.clone())  # a model may write into its input
        exact = settings.DTYPE_POLICY == "float32"
        tolerance = {"rtol": 0.01, "atol": 1e-4} if exact else {"rtol": 0.1, "atol": 0.02}
        reason: object = "it gives other answers"
        for function in (*dict.fromkeys(self._functions.values()), None):
            try:
                compiled = function or self._frozen(batch.clone())
                if self._torch.allclose(compiled(batch.clone()).float(), plain.float(), equal_nan=True, **tolerance):
                    return compiled
            except Exception as error:
                reason = error
        log.warning("TorchScript can't compile this model (%s): computing it step by step, which is slower", reason)
        return self._model  # type: ignore[no-any-return]

    def _frozen(self, batch: Any) -> Callable[[Any], Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that become constants, for which the result is checked
            traced = self._torch.jit.trace(self._model, batch, check_trace=False, strict=False)
            return self._torch.jit.freeze(traced.eval())  # type: ignore[no-any-return]


BACKENDS: dict[str, Callable[[Any], Network]] = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}


def compiled(model: Any) -> Network:
    """Return the Keras `model` as a function of the backend that Keras runs on. Raises StartupError for other backends."""
    import keras  # noqa: PLC0415 - quietly imported above

    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise StartupError(f"KERAS_BACKEND={backend} is invalid: it must be one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[backend](model)


def weights_bytes(model: Any) -> int:
    """Return how many bytes the weights of `model` take in float32."""
    return sum(math.prod(variable.shape) * 4 for variable in model.variables)
