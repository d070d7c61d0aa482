"""Loads a model from a file: one image goes in, one row of values comes out. Imports Keras."""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import keras

import settings
from helpers import StartupError
from model_server import model_checks, model_file
from model_server.facts import DEFAULT_TOP, Facts
from model_server.keras2_files import rewrite
from model_server.load_failures import SAVE, why_not
from model_server.model_errors import is_transient
from model_server.model_file import shown
from model_server.output_checks import PROBABILITIES
from model_server.pipeline import Preprocess, input_shape, preprocessing

log = logging.getLogger(__name__)

# Layers and operations that turn probabilities into probabilities, and logits into logits.
TRANSPARENT = {
    *("Activation", "Flatten", "Reshape", "Permute", "Dropout", "SpatialDropout2D", "ActivityRegularization"),
    *("Identity", "Cast", "Squeeze", "Transpose", "Mean", "GetItem", "Average", "Concatenate", "Maximum", "Minimum"),
    *("GlobalAveragePooling2D", "GlobalMaxPooling2D", "AveragePooling2D", "MaxPooling2D", "Cropping2D"),
}
LINEAR = {"BatchNormalization", "LayerNormalization", "GroupNormalization", "Normalization", "Rescaling"}


def load() -> tuple[Any, Preprocess, Facts]:
    """Return the model at the path MODEL, its preprocessing, and the facts about it. Raises StartupError."""
    path = Path(settings.MODEL)
    file = model_file.read(path.with_suffix(".json"))
    labels, labels_from = model_file.labels_of(file, settings.LABELS)
    model = one_to_one(load_file(path, "MODEL"), f"MODEL={settings.MODEL}")
    shape = input_shape(model, file)
    activation = last_activation(model)
    top = file.top or DEFAULT_TOP
    facts = Facts(shape, labels, labels_from, file.preprocessing, top, file.description, activation)
    return model, preprocessing(file, shape), facts


def load_file(path: Path, setting: str) -> Any:
    """Return the model in the .keras or HDF5 file that `setting` names, by its content, whatever its suffix.

    Code in it is not run. Raises StartupError, and transient errors as they are.
    """
    try:
        return _load_file(path)
    except Exception as error:
        if isinstance(error, StartupError) or is_transient(error):
            raise
        log.debug("load_model", exc_info=True)
        raise StartupError(f"{setting}={shown(path)} {why_not(path, error)}.") from error


def _load_file(path: Path) -> Any:
    form = model_checks.whole_model(path)
    version = model_checks.saved_by(path, form)
    if version >= (3,) and path.suffix == f".{form}":
        return _load(path)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model.{form}")  # Keras tells the format by the suffix
        if version >= (3,) or not rewrite(path, link, model_checks.configuration(path, form)):
            link.symlink_to(path.resolve())
        return _load(link)


def _load(path: Path) -> Any:
    return keras.saving.load_model(path, compile=False, safe_mode=True)


def one_to_one(model: Any, setting: str) -> Any:
    """Return `model` with one tensor as input and output, unpacked from a list or dict. Raises StartupError."""
    inputs, outputs = _tensors(model, "inputs"), _tensors(model, "outputs")
    if not inputs or not outputs:
        raise StartupError(
            f"{setting} does not say what goes in and comes out: begin it with keras.Input((height, width, channels)) "
            f"and {SAVE}."
        )
    if len(inputs) > 1:
        raise StartupError(
            f"{setting} takes {len(inputs)} inputs ({_names(inputs)}), but one image is needed: save a model of one "
            "input."
        )
    if len(outputs) > 1:
        raise StartupError(
            f"{setting} gives {len(outputs)} outputs ({_names(outputs)}), but one with a probability per class is "
            "needed: save one of them with keras.Model(model.inputs, model.outputs[0]).save('name.keras')."
        )
    if isinstance(model, keras.Sequential) or (model.input is inputs[0] and model.output is outputs[0]):
        return model
    return keras.Model(inputs[0], outputs[0])


def _tensors(model: Any, which: str) -> list[Any]:
    try:
        return list(keras.tree.flatten(getattr(model, which)))
    except (AttributeError, ValueError):  # it was never built
        return []


def _names(tensors: list[Any]) -> str:
    return ", ".join(shown(tensor._keras_history.operation.name) for tensor in tensors)


def last_activation(model: Any) -> str:
    """Return the activation that makes a model's output, such as "softmax"; empty if unknown."""
    try:
        return _activation_before(model.outputs[0])
    except (AttributeError, IndexError):
        return ""


def _activation_before(tensor: Any) -> str:
    operation, node, index = tensor._keras_history
    if isinstance(operation, keras.Model):
        return _activation_before(operation.outputs[index])
    activation = _activation(operation)
    if activation != "linear" or type(operation).__name__ not in TRANSPARENT:
        return activation
    before = [_activation_before(each) for each in operation._inbound_nodes[node].input_tensors]
    return next((each for each in before if each not in PROBABILITIES), before[0])


def _activation(operation: Any) -> str:
    kind = type(operation)
    modules = ("keras.src.ops.nn", "keras.src.layers.activations")
    if kind.__module__.startswith(modules) and kind.__name__ != "Activation":
        return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    function = getattr(operation, "activation", None)
    if function is not None:
        own = getattr(function, "__module__", "").startswith("keras.")
        return str(getattr(function, "__name__", type(function).__name__)).lower() if own else ""
    return "linear" if kind.__name__ in TRANSPARENT | LINEAR else ""
