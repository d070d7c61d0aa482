"""The compiled call on PyTorch."""

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

import settings
from helpers import Pixels
from model_server.batching import BATCHES_AT_ONCE

log = logging.getLogger(__name__)

Function = Callable[[Any], Any]


class Torch:
    """A model as TorchScript with frozen weights. Unlike torch.compile(), it needs no compiler on this machine.

    TorchScript runs no Python, and fuses each convolution with the normalization that follows it: on a CPU, ResNet50
    takes less than half of Keras' time for one image, and a small model a tenth.
    """

    def __init__(self, model: Any) -> None:
        import torch  # noqa: PLC0415 - only this backend needs it

        if settings.XLA:
            log.warning("XLA=true changes nothing with PyTorch")
        self._torch: Any = torch
        self._model = model.eval()
        self._device = next((weights.device for weights in model.parameters()), torch.device("cpu"))
        # On a CPU, TorchScript's fuser speeds up nothing, yet it may compile for seconds in any later call.
        torch._C._jit_set_texpr_fuser_enabled(self._device.type != "cpu")
        self._functions: dict[tuple[int, ...], Function] = {}  # by the shape of a batch
        self._compiling = threading.Lock()
        # cuDNN plans every convolution again in each new thread, which takes seconds for a whole network. So the same
        # threads compute all batches, and a shape counts as compiled once each thread has computed it.
        self._threads = [ThreadPoolExecutor(1, "torch") for _ in range(BATCHES_AT_ONCE)]
        self._free: SimpleQueue[ThreadPoolExecutor] = SimpleQueue()
        for thread in self._threads:
            self._free.put(thread)

    def predict_on_batch(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return the probabilities (n, classes) of `images` (n, height, width, channels)."""
        if images.shape not in self._functions:
            with self._compiling:
                self._prepare(images)
        thread = self._free.get()
        try:
            return thread.submit(self._predict, self._functions[images.shape], images).result()
        finally:
            self._free.put(thread)

    def _prepare(self, images: Pixels) -> None:
        """Compile for batches of this shape, and compute one on each thread."""
        if images.shape in self._functions:
            return  # another call compiled it while this one waited for the lock
        function = self._threads[0].submit(self._compile, images).result()
        for thread in self._threads:
            thread.submit(self._predict, function, images).result()
        self._functions[images.shape] = function

    def _predict(self, function: Function, images: Pixels) -> npt.NDArray[np.float32]:
        with self._torch.inference_mode():
            return np.asarray(function(self._on_device(images)).float().cpu())

    def _on_device(self, images: Pixels) -> Any:
        torch = self._torch
        if self._device.type != "cuda":
            return torch.tensor(images, device=self._device)
        # A GPU copies pinned memory by itself. PyTorch keeps this memory until then, and reuses it.
        pinned = torch.empty(images.shape, dtype=getattr(torch, settings.IMAGE_DTYPE), pin_memory=True)
        pinned.numpy()[:] = images
        return pinned.to(self._device, non_blocking=True)

    def _compile(self, images: Pixels) -> Function:
        """Return a function that gives correct answers for batches of this shape.

        Reuses a function for another batch size if it does. A model that can't be compiled runs uncompiled.
        """
        with self._torch.inference_mode():
            return self._checked(self._on_device(images))

    def _checked(self, batch: Any) -> Function:
        expected = self._model(batch.clone())  # a model may write into its input
        exact = settings.DTYPE_POLICY == "float32"
        tolerance = {"rtol": 0.01, "atol": 1e-4} if exact else {"rtol": 0.1, "atol": 0.02}
        reason: object = "its answers differ"
        for function in (*dict.fromkeys(self._functions.values()), None):
            try:
                compiled = function or self._frozen(batch.clone())
                if self._torch.allclose(compiled(batch.clone()).float(), expected.float(), equal_nan=True, **tolerance):
                    return compiled
            except Exception as error:
                reason = error
        log.warning("TorchScript can't compile this model (%s): running it uncompiled, which is slower", reason)
        return self._model  # type: ignore[no-any-return]

    def _frozen(self, batch: Any) -> Function:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings that sizes become constants; _checked() compares the answers
            traced = self._torch.jit.trace(self._model, batch, check_trace=False, strict=False)
            return self._torch.jit.freeze(traced.eval())  # type: ignore[no-any-return]
