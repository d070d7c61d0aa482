"""From raw pixels to probabilities in one compiled call: input shape, preprocessing, precision. Imports Keras."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

import settings
from helpers import MOST_SIDE, USUAL_SHAPE, Shape, StartupError, as_shape
from model_server import backends, model_file
from model_server.model_file import ModelFile

Preprocess = Callable[[Any], Any]


def compiled(model: Any, preprocess: Preprocess, shape: Shape) -> backends.Network:
    """Return preprocessing and `model` as one compiled call, which takes raw pixels (n, *shape)."""

    def prepare(pixels: Any) -> Any:
        return preprocess(keras.ops.cast(pixels, "float32"))

    pixels = keras.Input(shape, dtype=settings.IMAGE_DTYPE)
    prepared = keras.layers.Lambda(prepare, output_shape=shape, dtype="float32")(pixels)
    if settings.DTYPE_POLICY != "float32":  # with float32, keep the policies of the model, which may be quantized
        for layer in model.layers[:-1]:  # the last layer produces the probabilities
            layer.dtype_policy = settings.DTYPE_POLICY
    return backends.compiled(keras.Model(pixels, model(prepared, training=False)))


def preprocessing(file: ModelFile, shape: Shape) -> Preprocess:
    """Return the function that prepares pixels 0..255 for the model. Raises StartupError."""
    mode = file.preprocessing
    if mode in model_file.COLOR_ONLY and shape[2] == 1:
        raise file.invalid("preprocessing", mode, "none, scale or tf for a gray image")
    if mode == "none":
        return lambda pixels: pixels
    if mode == "scale":
        return lambda pixels: pixels / 255
    return partial(keras.applications.imagenet_utils.preprocess_input, data_format="channels_last", mode=mode)


def input_shape(model: Any, file: ModelFile) -> Shape:
    """Return the (height, width, channels) of the images that `model` is served with. Raises StartupError.

    The model decides each of them. If it takes any value, IMAGE_* decides, then `file`, then USUAL_SHAPE.
    """
    own = model.input_shape
    if not (isinstance(own, tuple) and len(own) == 4):
        raise StartupError(f"MODEL={settings.MODEL} takes {own}, but one image (height, width, channels) is needed.")
    given = {"height": file.height, "width": file.width, "channels": file.channels}
    for (key, value), side in zip(given.items(), own[1:], strict=True):
        if value and side not in (None, value):
            raise file.invalid(key, value, f"{side}, which is what the model takes, or left out")
    height, width, channels = (
        next(value for value in values if value) for values in zip(own[1:], given.values(), USUAL_SHAPE, strict=True)
    )
    shape = as_shape(settings.image_shape((height, width, channels)))
    _check_settings(own)
    if not shape:
        raise StartupError(
            f"MODEL={settings.MODEL} takes images of {width}x{height}x{channels}, but the service has 1 or 3 channels "
            f"(gray or RGB) and at most {MOST_SIDE} pixels a side: save the model with another input."
        )
    return shape


def _check_settings(own: tuple[int | None, ...]) -> None:
    """Raise StartupError if a setting asks for a size other than the model's `own`."""
    _, height, width, channels = own
    sides = {"IMAGE_WIDTH": width, "IMAGE_HEIGHT": height, "IMAGE_CHANS": channels}
    wrong = [f"{name}={side}" for name, side in sides.items() if side and getattr(settings, name) not in (None, side)]
    if wrong:
        raise StartupError(f"MODEL={settings.MODEL} takes images of another size: set {' and '.join(wrong)}.")
