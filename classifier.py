"""The Keras model: load it, warm it up, classify a batch, decode the predictions.

Only the model server imports this, since importing Keras takes seconds and hundreds of megabytes.
"""

import inspect
import itertools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Before Keras loads its backend: TensorFlow else logs a page at start (without a GPU also that it found none, as an
# error), and takes all of a GPU that others may share.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if Path("/dev/nvidiactl").exists() else "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import keras
import numpy as np
import numpy.typing as npt

import settings
from helpers import Refusal

log = logging.getLogger(__name__)

Images = npt.NDArray[np.generic]
Prediction = tuple[str, float]

SEED = 0  # of MODEL_WEIGHTS=random, so that two model servers give the same answers
KERAS_MODELS = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"  # where Keras caches downloads
LONGEST_LABELS = 10_000_000  # characters: a path like /dev/zero has no end
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # such as what changes the colours of a terminal
DOWNLOAD_TIMEOUT = 30  # seconds without a byte; Keras itself would wait for ever


def applications() -> dict[str, ModuleType]:
    """Return the module of every classifier in keras.applications, by the classifier's name.

    Each module has the preprocess_input and decode_predictions of its classifiers.
    """
    builders = inspect.getmembers(keras.applications, inspect.isfunction)
    return {name: sys.modules[builder.__module__] for name, builder in builders}


class Classifier:
    """A loaded model, compiled at a fixed set of batch shapes.

    `shape` is (height, width, channels) of an image. What is classified together need not be computed in one piece:
    warm_up() measures each shape, and a batch is covered with those that take the least time together, padded where
    that is cheaper.
    """

    def __init__(self, network: Any, labels: Sequence[str] | None, decode: Callable[..., Any] | None = None) -> None:
        """Wrap `network`: images (n, height, width, channels) to probabilities (n, classes), of any Keras backend.

        `labels` names the classes; without it `decode` does, as the decode_predictions of keras.applications.
        """
        self.shape = _image_shape()
        self._network = network
        self._labels = labels
        self._decode = decode
        self._seconds: dict[int, float] = {}

    @property
    def slowest(self) -> float:
        """Seconds that a full batch took at warm-up."""
        return sum(self._seconds[size] for size in self._cover(settings.BATCH_SIZE))

    def warm_up(self) -> None:
        """Compile and measure the model at every batch shape that it will run.

        Raises Refusal when what comes out is not one probability a label.
        """
        noise = np.random.default_rng(SEED).integers(0, 256, (settings.BATCH_SIZE, *self.shape))
        images = noise.astype(settings.IMAGE_DTYPE)
        output = np.asarray(self._network.predict_on_batch(images[:1]))
        self._check_output(output)
        list(self._top(output))
        for size in _sizes(settings.BATCH_SIZE):
            try:
                self._network.predict_on_batch(images[:size])  # compiles
                started = time.perf_counter()
                self._network.predict_on_batch(images[:size])
                self._seconds[size] = time.perf_counter() - started
            except Exception as error:
                if not (self._seconds and out_of_memory(error)):
                    raise
                log.warning(
                    "Batches of %d do not fit in memory: computing at most %d at once", size, max(self._seconds)
                )
                break

    def classify(self, images: Images) -> list[list[Prediction] | Exception]:
        """Return for each of `images` (n, height, width, channels) its TOP predictions, or what went wrong with it.

        A batch that fails is halved until the image that broke the model is alone, so that the others are answered.
        One that does not fit in memory is halved too, and the size that did not fit is not tried again.
        """
        try:
            return list(self._top(self._probabilities(images)))
        except Exception as error:
            if len(images) == 1:
                return [error]
            if not out_of_memory(error):
                log.exception("A batch of %d failed: trying its halves", len(images))
            half = len(images) // 2
            return self.classify(images[:half]) + self.classify(images[half:])

    def _probabilities(self, images: Images) -> npt.NDArray[np.floating[Any]]:
        pieces, start = [], 0
        for size in self._cover(len(images)):
            piece = images[start : start + size]
            pieces.append(self._compute(_padded(piece, size))[: len(piece)])
            start += size
        probabilities = np.concatenate(pieces)
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the model's output is not finite")
        return probabilities

    def _compute(self, images: Images) -> npt.NDArray[np.floating[Any]]:
        try:
            return np.asarray(self._network.predict_on_batch(images))
        except Exception as error:
            if out_of_memory(error) and len(images) > 1:
                self._seconds = {size: took for size, took in self._seconds.items() if size < len(images)}
                log.warning(
                    "A batch of %d does not fit in memory: computing at most %d at once",
                    len(images),
                    max(self._seconds),
                )
            raise

    def _cover(self, count: int) -> list[int]:
        """Return the batch sizes that compute `count` images in the least time, by what warm-up measured."""
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for n in range(1, count + 1):
            options = ((best[max(0, n - size)], size, took) for size, took in self._seconds.items())
            best.append(min((rest[0] + took, [size, *rest[1]]) for rest, size, took in options))
        return best[count][1]

    def _top(self, probabilities: npt.NDArray[np.floating[Any]]) -> Iterator[list[Prediction]]:
        if self._labels is None:
            assert self._decode is not None
            for decoded in self._decode(probabilities, top=settings.TOP):
                yield [(label, float(probability)) for _, label, probability in decoded]
            return
        for row in probabilities:
            yield [(self._labels[i], float(row[i])) for i in row.argsort()[::-1][: settings.TOP]]

    def _check_output(self, probabilities: npt.NDArray[np.floating[Any]]) -> None:
        classes = len(self._labels) if self._labels is not None else probabilities.shape[-1]
        if probabilities.shape != (1, classes):
            raise Refusal(
                f"MODEL={settings.MODEL} gives {probabilities.shape[1:]} values an image, but there are {classes} "
                f"labels: LABELS must name a file with one class a line."
            )
        if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-3):
            raise Refusal(f"MODEL={settings.MODEL} does not give probabilities: end it with a softmax or a sigmoid.")


def load() -> Classifier:
    """Return the classifier that the settings ask for, not yet warmed up. Raises Refusal."""
    if settings.MODEL.endswith(".keras"):
        return _from_file(Path(settings.MODEL))
    return _from_applications(settings.MODEL)


def fetch() -> None:
    """Download what MODEL with its ImageNet weights needs, unless Keras has it cached; exit with one line if not."""
    try:
        _from_applications(settings.MODEL)
    except Refusal as refusal:
        raise SystemExit(str(refusal)) from None


def describe() -> dict[str, str]:
    """Return what the service says of its model: its name and its weights."""
    if settings.MODEL.endswith(".keras"):
        return {"model": Path(settings.MODEL).stem, "weights": Path(settings.MODEL).name}
    return {"model": settings.MODEL, "weights": Path(settings.MODEL_WEIGHTS).name}


def out_of_memory(error: Exception) -> bool:
    """Whether a backend could not allocate: each has its own exception, some only a word in its message."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in text
        or "out of memory" in text.lower()
        or "can't allocate memory" in text
        or (type(error).__name__ in ("ResourceExhaustedError", "OutOfMemoryError"))
    )


def _from_file(path: Path) -> Classifier:
    if not path.is_file():
        raise Refusal(f"MODEL={path} is not there: set MODEL to the path of a .keras file.")
    labels = _read_labels(Path(settings.LABELS) if settings.LABELS else path.with_suffix(".labels.txt"))
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:
        log.debug("load_model", exc_info=True)
        raise Refusal(f"MODEL={path} can't be loaded as a Keras 3 model ({_first_line(error)}).") from error
    _check_input(model)
    return Classifier(_with_preprocessing(model, lambda pixels: pixels), labels)


def _from_applications(name: str) -> Classifier:
    known = applications()
    if name not in known:
        raise Refusal(
            f"MODEL={name} makes no sense: it must be the path of a .keras file or one of {', '.join(sorted(known))}."
        )
    module: Any = known[name]
    weights = settings.MODEL_WEIGHTS
    labels = _application_labels(weights)
    builder = getattr(keras.applications, name)
    keras.utils.set_random_seed(SEED)
    if weights in ("random", "imagenet"):
        model = _download(lambda: builder(weights=None if weights == "random" else weights))
    else:
        model = _with_weights(builder(weights=None, classes=1000 if labels is None else len(labels)), Path(weights))
    _check_input(model)
    if labels is None:  # fetches ImageNet's class names now, not at the first request
        _download(lambda: module.decode_predictions(np.zeros((1, 1000)), top=1))
    return Classifier(_with_preprocessing(model, module.preprocess_input), labels, module.decode_predictions)


def _application_labels(weights: str) -> list[str] | None:
    if settings.LABELS:
        return _read_labels(Path(settings.LABELS))
    # Untrained weights recognise nothing, and to say "beagle" would hide it.
    return [f"class_{i}" for i in range(1000)] if weights == "random" else None


def _with_weights(model: Any, path: Path) -> Any:
    if not path.is_file():
        raise Refusal(f"MODEL_WEIGHTS={path} is not there: it must be imagenet, random, or the path of a weights file.")
    try:
        if path.suffix == ".keras":
            return keras.saving.load_model(path, compile=False)
        model.load_weights(path)
    except Exception as error:
        raise Refusal(f"MODEL_WEIGHTS={path} does not fit MODEL={settings.MODEL} ({_first_line(error)}).") from error
    return model


def _download(fetch: Callable[[], Any]) -> Any:
    """Call `fetch`, which makes Keras download what it has not cached, with a limit on its patience."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return fetch()
    except Exception as error:
        url = next((word.rstrip(":") for word in str(error).split() if word.startswith("https:")), "")
        if not url:
            raise
        raise Refusal(
            f"{url} can't be fetched ({_first_line(error).rpartition(' -- ')[2]}): get it where there is internet and "
            f"put it in {KERAS_MODELS}/, or set MODEL=models/digits.keras, which needs nothing."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _with_preprocessing(model: Any, preprocess: Callable[[Any], Any]) -> Any:
    """Return `model` behind its own preprocessing, so that raw pixels go in and one compiled call does it all."""

    def prepare(pixels: Any) -> Any:
        return preprocess(keras.ops.cast(pixels, "float32"))

    pixels = keras.Input(_image_shape(), dtype=settings.IMAGE_DTYPE)
    prepared = keras.layers.Lambda(prepare, output_shape=_image_shape(), dtype="float32")(pixels)
    whole = keras.Model(pixels, model(prepared, training=False))
    whole.compile(jit_compile=False)
    return whole


def _check_input(model: Any) -> None:
    shape = model.input_shape
    if not (isinstance(shape, tuple) and len(shape) == 4):
        raise Refusal(f"MODEL={settings.MODEL} takes {shape}, but one image (height, width, channels) is needed.")
    _, height, width, channels = shape
    wanted = {"IMAGE_WIDTH": width, "IMAGE_HEIGHT": height, "IMAGE_CHANS": channels}
    wrong = [f"{name}={value}" for name, value in wanted.items() if value not in (None, getattr(settings, name))]
    if wrong:
        raise Refusal(f"MODEL={settings.MODEL} takes images of another size: set {' and '.join(wrong)}.")


def _read_labels(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a mark of it
            text = file.read(LONGEST_LABELS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            f"The labels file {path} can't be read ({_first_line(error)}): it needs one class a line."
        ) from error
    labels = [label.strip() for label in text.splitlines()]
    if len(text) > LONGEST_LABELS or any(map(NO_TEXT.search, labels)):
        raise Refusal(f"The labels file {path} is not one of plain text: it needs one class a line.")
    if not all(labels) or not labels:
        raise Refusal(f"The labels file {path} has an empty line or none at all: it needs one class a line.")
    return labels


def _image_shape() -> tuple[int, int, int]:
    return settings.IMAGE_HEIGHT, settings.IMAGE_WIDTH, settings.IMAGE_CHANS


def _sizes(most: int) -> list[int]:
    """Return the batch sizes to compile: the powers of two below `most`, and `most`."""
    return [*itertools.takewhile(lambda size: size < most, (2**i for i in itertools.count())), most]


def _padded(images: Images, size: int) -> Images:
    return images if len(images) == size else np.resize(images, (size, *images.shape[1:]))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
