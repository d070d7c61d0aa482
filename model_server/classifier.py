"""The classifier: computes batches of images with a loaded model, and decodes its probabilities.

load() creates one, and imports Keras only then, since that takes seconds and hundreds of megabytes.
"""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

import settings
from helpers import Pixels, Shape, base64_encode_image, model_name
from model_server import model_checks, output_checks
from model_server.backends import Network
from model_server.batching import BatchSizes
from model_server.keras_import import import_keras
from model_server.memory import sparing_memory
from model_server.model_errors import blame_model, out_of_memory
from model_server.model_file import Facts

log = logging.getLogger(__name__)

Probabilities = npt.NDArray[np.floating[Any]]  # (classes,) of one image, or (n, classes)
Prediction = tuple[str, float]

HALF = 2  # bytes of a float16 or bfloat16 value; NumPy can't sort bfloat16


class Classifier:
    """A loaded model, compiled for the batch sizes in `sizes`, which warm_up() measures.

    `shape` is (height, width, channels) of an image. `binary` says that the network's single output is the probability
    of the second of two labels, as in Keras' binary classifiers; the first label gets the rest.
    """

    def __init__(self, network: Network, facts: Facts) -> None:
        """Wrap `network`, whose predict_on_batch() turns images (n, *facts.shape) into probabilities (n, classes)."""
        self.facts = facts
        self.shape = facts.shape
        self.sizes = BatchSizes()
        self.binary = False
        self._network = network
        self._labels = facts.labels

    @property
    def about(self) -> dict[str, Any]:
        """What the service reports about its model."""
        optional = {"description": self.facts.description} if self.facts.description else {}
        return {
            "model": model_name(settings.MODEL),
            "weights": self.facts.weights,
            "version": self.facts.version,
            "shape": self.shape,
            "classes": len(self._labels),
            "batch_size": self.batch_size,
            **optional,
        }

    @property
    def batch_size(self) -> int:
        """The most images that are worth computing together."""
        return self.sizes.best

    @property
    def slowest(self) -> float:
        """Seconds that a full batch took at warm-up."""
        return self.sizes.seconds[self.batch_size]

    def warm_up(self) -> None:
        """Check the model's output, then compile and measure each batch size.

        Raises StartupError when the model can't be computed, or does not give one probability for each label.
        """
        noise = np.random.default_rng(0).integers(0, 256, (settings.BATCH_SIZE, *self.shape), np.uint8)
        images = noise.astype(settings.IMAGE_DTYPE)
        with blame_model(f"can't be computed with images of {_size(self.shape)}"):
            with sparing_memory():
                output = self._compute(images[:1])
            self.binary = output_checks.is_binary(output.shape, self.facts)
            one_value = output.shape[1] == 1
            output_checks.check_probabilities(self._compute, images[:1], self.facts, one_value=one_value)
            self.sizes.measure(self._network.predict_on_batch, images)

    def classify(self, images: Pixels) -> list[Probabilities | Exception]:
        """Return the probabilities of each of `images` (n, height, width, channels), or the error that it caused.

        A batch that fails is halved until the image that broke the model is alone, so that the others are answered.
        A batch that does not fit in memory is halved too, and its size is not tried again.
        """
        try:
            return list(self._probabilities(images))
        except Exception as error:
            if len(images) == 1:
                return [error]
            if not out_of_memory(error):
                log.exception("A batch of %d failed: trying its halves", len(images))
            half = len(images) // 2
            return self.classify(images[:half]) + self.classify(images[half:])

    def decode(self, probabilities: Probabilities, top: int = 0) -> list[Prediction]:
        """Return (label, probability) of the `top` most probable classes, highest first; 0 means TOP."""
        return [(self._labels[i], float(probabilities[i])) for i in self._best(probabilities, top)]

    def scores(self, probabilities: Probabilities, top: int = 0) -> dict[str, Any]:
        """Return what an answer with scores has besides the predictions of decode(): see Job."""
        best = self._best(probabilities, top)
        return {"scores": base64_encode_image(probabilities.astype("<f4")), "indices": best.tolist()}

    def _best(self, probabilities: Probabilities, top: int) -> npt.NDArray[np.intp]:
        """Return the indices of the `top` most probable classes, highest first; 0 means TOP."""
        top = min(top or settings.TOP or self.facts.top, len(probabilities))
        best = np.argpartition(probabilities, -top)[-top:]
        return best[np.argsort(probabilities[best])[::-1]]

    def _probabilities(self, images: Pixels) -> Probabilities:
        pieces, start = [], 0
        for size in self.sizes.cover(len(images)):
            piece = images[start : start + size]
            pieces.append(self._compute_piece(_padded(piece, size))[: len(piece)])
            start += size
        probabilities = np.concatenate(pieces)
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the model's output is not finite")
        return probabilities

    def _compute_piece(self, images: Pixels) -> Probabilities:
        try:
            return self._compute(images)
        except Exception as error:
            if out_of_memory(error) and len(images) > 1:
                self.sizes.limit(len(images))
            raise

    def _compute(self, images: Pixels) -> Probabilities:
        """Return the probabilities (n, classes) of `images` (n, *shape)."""
        values = np.asarray(self._network.predict_on_batch(images))
        if values.dtype.itemsize == HALF:
            values = values.astype(np.float32)
        return np.concatenate([1 - values, values], axis=1) if self.binary else values


@sparing_memory()
def load() -> Classifier:
    """Return the classifier that the settings ask for, not yet warmed up. Raises StartupError."""
    model_checks.check()
    import_keras()
    return _load()


def _load() -> Classifier:
    # Not part of load(): the frame of import_keras()' caller may stay in memory, and would keep Keras' model there.
    from model_server import applications, model_loading, pipeline  # noqa: PLC0415 - these import Keras

    with blame_model("can't be loaded"):
        source = model_loading if model_checks.is_path(settings.MODEL) else applications
        model, preprocess, facts = source.load()
    with blame_model(f"can't take images of {_size(facts.shape)}"):
        return Classifier(pipeline.compiled(model, preprocess, facts.shape), facts)


def _size(shape: Shape) -> str:
    return f"{shape[1]}x{shape[0]}"


def _padded(images: Pixels, size: int) -> Pixels:
    return images if len(images) == size else np.resize(images, (size, *images.shape[1:]))
