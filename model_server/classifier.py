"""The Keras model: load it, warm it up, classify a batch, decode the predictions.

Only the model server imports this, since importing Keras takes seconds and hundreds of megabytes.
"""

import errno
import http.client
import inspect
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from model_server import backends  # isort: skip - before Keras: it sets what the backends read when they are imported
import keras
import numpy as np
import numpy.typing as npt

import settings
from helpers import MOST_SIDE, USUAL_SHAPE, Shape, StartupError, as_shape, keras_downloads
from model_server import model_checks, model_file, model_loading
from model_server.model_file import ModelFile, first_line, read_labels, shown

log = logging.getLogger(__name__)

Images = npt.NDArray[np.generic]
Probabilities = npt.NDArray[np.floating[Any]]  # of one image, one a class
Prediction = tuple[str, float]

SEED = 0  # of MODEL_WEIGHTS=random, so that two model servers give the same answers
IMAGENET = "1,000 ImageNet classes: animals, plants, food, vehicles, things"  # what trained models of Keras recognise
DOWNLOAD_TIMEOUT = 30  # seconds without a byte; Keras itself would wait for ever
# Seconds that a batch costs besides its computing, for the take and the answer. Where images compute in a millisecond,
# a small batch would pay it too often.
BATCH_OVERHEAD = 0.002
# Of the least time of an image: so near, two sizes count as equal, since no measurement at warm-up is better than that.
NEAR = 1.03
LONG = 0.1  # seconds of a batch, beside which what it costs besides does not count any more
USUAL_TOP = 5  # predictions in an answer
ROUNDING = 1e-3  # that a probability may be above 1 by, as softmax in float16 makes it
HALF = 2  # bytes of float16 and bfloat16, the latter of which NumPy can't sort
NEARLY_ONE = 0.01  # that the probabilities of an image may miss 1 by, added up in half precision
# Errors that another start may not meet, so that a supervisor is to try again: the machine is at fault, not the model.
PASSING = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR)
# What a download may fail with besides the errors of urllib, which Keras turns into lines that name the address.
CUT_OFF = (TimeoutError, ConnectionError, http.client.HTTPException)
DEVICE_ERRORS = ("InternalError", "UnavailableError", "AbortedError", "XlaRuntimeError", "JaxRuntimeError")


def applications() -> dict[str, ModuleType]:
    """Return the module of every classifier in keras.applications, by the classifier's name.

    Each module has the preprocess_input and decode_predictions of its classifiers.
    """
    builders = inspect.getmembers(keras.applications, inspect.isfunction)
    return {name: sys.modules[builder.__module__] for name, builder in builders}


@dataclass(frozen=True)
class Facts:
    """What the service needs to know of a model besides its network.

    `shape` is (height, width, channels) of an image, `labels` the names of the classes, `labels_from` where they stand,
    `preprocessing` what is done to pixels before the model, `top` how many predictions an answer has, `ending` the
    activation that makes the model's output, as "softmax", or empty where it can't be told.
    """

    shape: Shape
    labels: Sequence[str]
    labels_from: str
    preprocessing: str = "none"
    top: int = USUAL_TOP
    description: str = ""
    ending: str = ""


class Classifier:
    """A loaded model, compiled at a fixed set of batch shapes.

    `shape` is (height, width, channels) of an image. warm_up() measures each batch shape: `batch_size` is how many
    images are worth computing together, and other numbers are covered with the shapes that take the least time
    together, padded where that is cheaper. `of_second` says whether the network's one output is the probability of the
    second of two labels, as Keras' binary classifiers have it; the first then has the rest.
    """

    def __init__(self, network: Any, facts: Facts) -> None:
        """Wrap `network`, whose predict_on_batch() makes probabilities (n, classes) of images (n, *facts.shape)."""
        self.facts = facts
        self.shape = facts.shape
        self._network = network
        self._labels = facts.labels
        self.of_second = False
        self._seconds: dict[int, float] = {}

    @property
    def about(self) -> dict[str, Any]:
        """What the service says of its model."""
        own = model_checks.is_path(settings.MODEL)
        said = {"description": self.facts.description} if self.facts.description else {}
        return {
            "model": Path(settings.MODEL).stem if own else settings.MODEL,
            "weights": Path(settings.MODEL if own else settings.MODEL_WEIGHTS).name,
            "shape": self.shape,
            "classes": len(self._labels),
            "batch_size": self.batch_size,
            **said,
        }

    @property
    def batch_size(self) -> int:
        """The most images that are worth computing together: as many as take, each, next to the least time.

        More would only answer the first of them later. On a GPU it is BATCH_SIZE as a rule, on a CPU often less.
        """
        least = min(map(self._seconds_an_image, self._seconds))
        near = [size for size in self._seconds if self._seconds_an_image(size) <= least * NEAR]
        return min((size for size in near if self._seconds[size] >= LONG), default=max(near))

    @property
    def slowest(self) -> float:
        """Seconds that a full batch took at warm-up."""
        return self._seconds[self.batch_size]

    def warm_up(self) -> None:
        """Compile and measure the model at every batch shape that it will run, up to where larger ones gain nothing.

        Raises StartupError when the model can't be computed, or what comes out is not one probability a label.
        """
        noise = np.random.default_rng(SEED).integers(0, 256, (settings.BATCH_SIZE, *self.shape))
        images = noise.astype(settings.IMAGE_DTYPE)
        with model_at_fault(f"can't be computed with images of {_size(self.shape)}"):
            self._check_output(images[:1])
            self._measure_sizes(images)

    def _measure_sizes(self, images: Images) -> None:
        for size in _sizes(settings.BATCH_SIZE):
            try:
                self._seconds[size] = self._measure(images[:size])
            except Exception as error:
                if not (self._seconds and out_of_memory(error)):
                    raise
                log.warning(
                    "Batches of %d do not fit in memory: computing at most %d at once", size, max(self._seconds)
                )
                break
            if size >= 4 * self.batch_size:
                break
        self._seconds = {size: took for size, took in self._seconds.items() if size <= self.batch_size}

    def _measure(self, images: Images) -> float:
        """Return the seconds that these images take once compiled for.

        A short batch is measured twice and the lesser time counts, since other programs use the machine too.
        """
        self._network.predict_on_batch(images)  # compiles
        took = self._timed(images)
        return took if took >= LONG else min(took, self._timed(images))

    def _timed(self, images: Images) -> float:
        started = time.perf_counter()
        self._network.predict_on_batch(images)
        return time.perf_counter() - started

    def _seconds_an_image(self, size: int) -> float:
        return (self._seconds[size] + BATCH_OVERHEAD) / size

    def classify(self, images: Images) -> list[Probabilities | Exception]:
        """Return for each of `images` (n, height, width, channels) its probabilities, or what went wrong with it.

        A batch that fails is halved until the image that broke the model is alone, so that the others are answered.
        One that does not fit in memory is halved too, and the size that did not fit is not tried again.
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
        """Return the `top` classes (0: TOP) by their labels, most probable first."""
        top = min(top or settings.TOP or self.facts.top, len(probabilities))
        best = np.argpartition(probabilities, -top)[-top:]
        best = best[np.argsort(probabilities[best])[::-1]]
        return [(self._labels[i], float(probabilities[i])) for i in best]

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
            return self._outputs(images)
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

    def _outputs(self, images: Images) -> npt.NDArray[np.floating[Any]]:
        """Return what the model makes of `images` (n, *shape): probabilities (n, classes)."""
        values = np.asarray(self._network.predict_on_batch(images))
        if values.dtype.itemsize == HALF:
            values = values.astype(np.float32)
        return np.concatenate([1 - values, values], axis=1) if self.of_second else values

    def _check_output(self, noise: Images) -> None:
        """Raise StartupError unless the model gives probabilities, one a label, of `noise` (1, *shape) and other images."""
        self._check_shape(self._outputs(noise).shape)
        self._check_probabilities(np.concatenate([self._outputs(noise), *self._outputs_of_flat_images(noise)]))

    def _outputs_of_flat_images(self, like: Images) -> Iterator[npt.NDArray[Any]]:
        """Yield what the model makes of flat images, where it can: each is computed alone.

        A model that standardizes each image gives NaN for a flat one, and one that looks pixels up in a table may fail,
        and both are right for photos.
        """
        for image in _flat_images(like):
            try:
                values = self._outputs(image)
            except Exception as error:
                if may_pass(error):
                    raise
                log.debug("a flat image fails", exc_info=True)
                continue
            if np.isfinite(values.astype(np.float64)).all():
                yield values

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise StartupError unless values of `shape`, for one image, are one a label; note where they are of the second."""
        classes, values = len(self._labels), shape[1:]
        if len(shape) != 2:
            raise StartupError(
                f"MODEL={settings.MODEL} gives {values} values an image, but one a class is needed: let it end in "
                "GlobalAveragePooling2D or Flatten, and a Dense layer with softmax or sigmoid."
            )
        self.of_second = shape == (1, 1) and classes == 2
        if shape != (1, classes) and not self.of_second:
            raise StartupError(
                f"MODEL={settings.MODEL} gives {values} values an image, but there are {classes} "
                f"labels: {self.facts.labels_from} must have one a class."
            )

    def _check_probabilities(self, values: npt.NDArray[Any]) -> None:
        """Raise StartupError where these values (images, classes) are no probabilities, or only happen to look like some."""
        ending = self.facts.ending
        known = ending in ("", *model_loading.PROBABLE)
        because = "" if known else f", for its last activation is {ending}"
        real = values.astype(np.float64)
        inside = np.isfinite(real).all() and real.min() >= 0 and real.max() <= 1 + ROUNDING
        one_value = self.of_second or real.shape[1] == 1
        add_up = not one_value and np.abs(real.sum(axis=1) - 1).max() < NEARLY_ONE
        if values.dtype.kind in "iub" or not inside or not (known or add_up):
            raise StartupError(
                f"MODEL={settings.MODEL} does not give probabilities: end it with a softmax, or a sigmoid where "
                f"several classes may be true{because}."
            )
        if ending == "softmax" and one_value:
            raise StartupError(
                f"MODEL={settings.MODEL} ends in a softmax of one value, which is always 1: use a sigmoid."
            )


def _flat_images(like: Images) -> list[Images]:
    """Return images of one shape and type with `like` (1, height, width, channels): flat ones, and one with a slope."""
    slope = np.broadcast_to(np.linspace(0, 255, like.shape[2])[:, np.newaxis], like.shape)
    return [np.full_like(like, 0), np.full_like(like, 128), np.full_like(like, 255), slope.astype(like.dtype)]


@contextmanager
def model_at_fault(what: str) -> Iterator[None]:
    """Turn what goes wrong within into a StartupError that says `what` of MODEL, but for what may pass by itself."""
    try:
        yield
    except StartupError:
        raise
    except Exception as error:
        if may_pass(error):
            raise
        log.debug(what, exc_info=True)
        raise StartupError(f"MODEL={settings.MODEL} {what} ({model_loading.gist(error)}).") from error


def may_pass(error: Exception) -> bool:
    """Whether another start may not meet this error: memory, disk or a GPU is at fault, not the model."""
    disk = isinstance(error, OSError) and error.errno in PASSING
    return out_of_memory(error) or disk or type(error).__name__ in DEVICE_ERRORS or "CUDA" in str(error)


def load() -> Classifier:
    """Return the classifier that the settings ask for, not yet warmed up. Raises StartupError."""
    model_checks.check()
    with model_at_fault("can't be loaded"):
        return (
            _from_file(Path(settings.MODEL))
            if model_checks.is_path(settings.MODEL)
            else _from_applications(settings.MODEL)
        )


def fetch() -> None:
    """Download what MODEL with its ImageNet weights needs, unless Keras has it cached; exit with the reason if not."""
    try:
        _from_applications(settings.MODEL)
    except Exception as error:
        raise SystemExit(_why_not_fetched(error.__cause__ or error)) from None


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
    file = model_file.read(path.with_suffix(".json"))
    labels, labels_from = model_file.labels_of(file, settings.LABELS)
    model = model_loading.one_to_one(_loaded(path, "MODEL"), f"MODEL={settings.MODEL}")
    shape = _input_shape(model, file)
    facts = Facts(
        shape, labels, labels_from, file.preprocessing, file.top or USUAL_TOP, file.description,
        model_loading.ending(model),
    )  # fmt: skip
    return _made(model, _preprocess(file, shape), facts)


def _made(model: Any, preprocess: Callable[[Any], Any], facts: Facts) -> Classifier:
    with model_at_fault(f"can't take images of {_size(facts.shape)}"):
        return Classifier(_compiled(model, preprocess, facts.shape), facts)


def _size(shape: Shape) -> str:
    return f"{shape[1]}x{shape[0]}"


def _loaded(path: Path, setting: str) -> Any:
    try:
        return model_loading.load_file(path)
    except Exception as error:
        if isinstance(error, StartupError) or may_pass(error):
            raise
        log.debug("load_model", exc_info=True)
        raise StartupError(f"{setting}={shown(path)} {model_loading.why_not(path, error)}.") from error


def _from_applications(name: str) -> Classifier:
    module: Any = applications()[name]
    weights = settings.MODEL_WEIGHTS
    labels = _application_labels(weights)
    builder = getattr(keras.applications, name)
    keras.utils.set_random_seed(SEED)
    if weights in ("random", "imagenet"):
        model = _download(lambda: builder(weights=None if weights == "random" else weights))
    else:
        model = _with_weights(builder(weights=None, classes=1000 if labels is None else len(labels)), Path(weights))
    shape = _input_shape(model, ModelFile(Path(name)))
    facts = Facts(
        shape, labels or _imagenet_labels(module), f"LABELS={settings.LABELS}", f"{name}'s own",
        description=IMAGENET if weights == "imagenet" else "", ending=model_loading.ending(model),
    )  # fmt: skip
    return _made(model, module.preprocess_input, facts)


def _application_labels(weights: str) -> list[str] | None:
    if settings.LABELS:
        return read_labels(Path(settings.LABELS))
    # Untrained weights recognise nothing, and to say "beagle" would hide it.
    return [f"class_{i}" for i in range(1000)] if weights == "random" else None


def _imagenet_labels(module: Any) -> list[str]:
    decoded = _download(lambda: module.decode_predictions(np.eye(1000), top=1))
    return [label for [(_, label, _)] in decoded]


def _with_weights(model: Any, path: Path) -> Any:
    """Return `model` with the weights at `path`, or the whole model that is there instead. Raises StartupError."""
    if path.suffix == ".keras":
        return model_loading.one_to_one(_loaded(path, "MODEL_WEIGHTS"), f"MODEL_WEIGHTS={path}")
    try:
        model.load_weights(path)
    except Exception as error:
        if may_pass(error):
            raise
        raise StartupError(
            f"MODEL_WEIGHTS={path} does not fit MODEL={settings.MODEL} ({model_loading.gist(error)}): set MODEL to the "
            "model that it was saved from."
        ) from error
    return model


def _download(fetch: Callable[[], Any]) -> Any:
    """Call `fetch`, which makes Keras download what it has not cached, with a limit on its patience."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return fetch()
    except Exception as error:
        url = next((word.rstrip(":") for word in str(error).split() if word.startswith(("https:", "http:"))), "")
        if not (url or isinstance(error, CUT_OFF) or "corrupted file" in str(error)):
            raise
        raise StartupError(
            f"{url or f'What MODEL={settings.MODEL} needs'} can't be fetched ({_why_not_fetched(error)}): get it where "
            f"there is internet and put it in {keras_downloads()}/, or set MODEL=models/efficientnet_lite0.keras, "
            "which needs nothing."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _why_not_fetched(error: BaseException) -> str:
    """Return the reason alone: Keras puts the address before it, and " -- " between them."""
    return first_line(error).rpartition(" -- ")[2]


def _compiled(model: Any, preprocess: Callable[[Any], Any], shape: Shape) -> backends.Network:
    """Return `model` behind its preprocessing: raw pixels of `shape` go in, and one compiled call does it all."""

    def prepare(pixels: Any) -> Any:
        return preprocess(keras.ops.cast(pixels, "float32"))

    pixels = keras.Input(shape, dtype=settings.IMAGE_DTYPE)
    prepared = keras.layers.Lambda(prepare, output_shape=shape, dtype="float32")(pixels)
    _set_precision(model)
    return backends.compiled(keras.Model(pixels, model(prepared, training=False)))


def _set_precision(model: Any) -> None:
    if settings.DTYPE_POLICY == "float32":
        return  # a model may have policies of its own, such as a quantized one
    for layer in model.layers[:-1]:  # the last makes the probabilities
        layer.dtype_policy = settings.DTYPE_POLICY


def _preprocess(file: ModelFile, shape: Shape) -> Callable[[Any], Any]:
    """Return what is done to pixels 0..255 before the model. Raises StartupError."""
    mode = file.preprocessing
    if mode in model_file.FOR_COLOUR and shape[2] == 1:
        raise file.refusal("preprocessing", mode, "none, scale or tf for a grey image")
    if mode == "none":
        return lambda pixels: pixels
    if mode == "scale":
        return lambda pixels: pixels / 255
    return partial(keras.applications.imagenet_utils.preprocess_input, data_format="channels_last", mode=mode)


def _input_shape(model: Any, file: ModelFile) -> Shape:
    """Return the (height, width, channels) to serve `model` with: its own. Raises StartupError.

    Where it takes any, it is what IMAGE_* ask for, or `file`, or the usual.
    """
    takes = model.input_shape
    if not (isinstance(takes, tuple) and len(takes) == 4):
        raise StartupError(f"MODEL={settings.MODEL} takes {takes}, but one image (height, width, channels) is needed.")
    said = {"height": file.height, "width": file.width, "channels": file.channels}
    for (key, value), own in zip(said.items(), takes[1:], strict=True):
        if value and own not in (None, value):
            raise file.refusal(key, value, f"{own}, which is what the model takes, or left out")
    height, width, channels = map(_first_given, takes[1:], said.values(), USUAL_SHAPE)
    shape = as_shape(settings.image_shape((height, width, channels)))
    _refuse_other_size(takes)
    if not shape:
        raise StartupError(
            f"MODEL={settings.MODEL} takes images of {width}x{height}x{channels}, but the service has 1 or 3 channels "
            f"(grey or RGB) and at most {MOST_SIDE} pixels a side: save the model with another input."
        )
    return shape


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value)


def _refuse_other_size(takes: tuple[int | None, ...]) -> None:
    """Raise StartupError where a setting asks for another size than the model `takes`."""
    _, height, width, channels = takes
    wanted = {"IMAGE_WIDTH": width, "IMAGE_HEIGHT": height, "IMAGE_CHANS": channels}
    asked = {name: getattr(settings, name) for name in wanted}
    wrong = [f"{name}={value}" for name, value in wanted.items() if value and asked[name] not in (None, value)]
    if wrong:
        raise StartupError(f"MODEL={settings.MODEL} takes images of another size: set {' and '.join(wrong)}.")


def _sizes(most: int) -> list[int]:
    """Return the batch sizes to compile: the powers of two below `most`, and `most`."""
    return [*itertools.takewhile(lambda size: size < most, (2**i for i in itertools.count())), most]


def _padded(images: Images, size: int) -> Images:
    return images if len(images) == size else np.resize(images, (size, *images.shape[1:]))
