"""Loads a model from a file, or explains why it can't be loaded. Imports Keras."""

import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

import settings
from helpers import StartupError
from model_server import model_checks, model_file
from model_server.keras2_files import rewrite
from model_server.model_errors import gist, is_transient
from model_server.model_file import DEFAULT_TOP, Facts, ModelFile, shown
from model_server.model_version import version_of
from model_server.output_checks import PROBABILITIES
from model_server.pipeline import Preprocess, input_shape, preprocessing

log = logging.getLogger(__name__)

SAVE = "save it again with model.save('name.keras')"
MOST_NAMED = 3  # a message names at most this many layers that can't be loaded
KERAS_PACKAGES = ("keras", "keras_hub", "keras_cv", "keras_nlp")  # Keras itself loads classes from these
# Keras 2 HDF5 files name classes without their modules. Keras looks them up in these.
NAMESPACES = ("layers", "models", "initializers", "regularizers", "constraints", "dtype_policies")
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
    files = [path, file.path, labels_file(file)]
    version = version_of(files)
    labels, labels_from = model_file.labels_of(file, settings.LABELS)
    model = one_to_one(load_file(path, "MODEL"), f"MODEL={settings.MODEL}")
    if version_of(files) != version:
        log.info("* Loading the model again, because its files have changed meanwhile")
        return load()
    shape = input_shape(model, file)
    activation = last_activation(model)
    top = file.top or DEFAULT_TOP
    facts = Facts(shape, labels, labels_from, file.preprocessing, top, file.description, activation, path.name, version)
    return model, preprocessing(file, shape), facts


def labels_file(file: ModelFile) -> Path:
    """Return the file that the labels of a model come from, which need not exist."""
    named = file.labels if isinstance(file.labels, str) and file.labels else file.path.with_suffix(".labels.txt").name
    return Path(settings.LABELS) if settings.LABELS else file.path.parent / named


def load_file(path: Path, setting: str) -> Any:
    """Return the model in the .keras or HDF5 file that `setting` names. Its content decides the format, not its suffix.

    Code in the file is not run. Raises StartupError, and passes on transient errors.
    """
    try:
        return _load_file(path)
    except Exception as error:
        if isinstance(error, StartupError) or is_transient(error):
            raise
        log.debug("load_model", exc_info=True)
        raise StartupError(f"{setting}={shown(path)} {_why_not(path, error)}.") from error


def _load_file(path: Path) -> Any:
    form = model_checks.whole_model(path)
    version = model_checks.saved_by(path, form)
    if version >= (3,) and path.suffix == f".{form}":
        return _load(path)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model.{form}")  # Keras decides by the suffix
        if version >= (3,) or not rewrite(path, link, model_checks.configuration(path, form)):
            link.symlink_to(path.resolve())
        return _load(link)


def _load(path: Path) -> Any:
    return keras.saving.load_model(path, compile=False, safe_mode=True)


def _why_not(path: Path, error: Exception) -> str:
    """Return why the model in a file can't be loaded, and what to do, to end a message. Raises StartupError."""
    form = model_checks.whole_model(path)
    foreign = list(dict.fromkeys(_foreign(model_checks.configuration(path, form))))
    if foreign:
        named = " and ".join(foreign[:MOST_NAMED]) + (" and more" if foreign[MOST_NAMED:] else "")
        return f"has {named}, whose code is not Keras' own and is not run here: {_remedy(named, path)}, and {SAVE}"
    version = model_checks.saved_by(path, form)
    text = ".".join(map(str, version))
    if version[:1] == (2,):
        return (
            f"was saved by Keras {text} in a way that Keras 3 can't read ({gist(error)}): build the same "
            f"model in Keras 3, fill it with model.load_weights('{shown(path.name)}'), and {SAVE}"
        )
    if version[:2] > model_checks.version_of(keras.__version__)[:2]:
        newer = f"was saved by Keras {text}, newer than {keras.__version__} here ({gist(error)})"
        return f"{newer}: .venv/bin/pip install keras=={text}"
    return f"can't be loaded as a Keras model ({gist(error)}): load it where it was made, and {SAVE}"


def _remedy(named: str, path: Path) -> str:
    for package in KERAS_PACKAGES[1:]:
        if f"from {package}" in named:
            pip = f".venv/bin/pip install {package.replace('_', '-')}"
            return f"install it with {pip}, or use Keras' own layers instead"
    own = "use Keras' own layers (such as Rescaling) and keras.ops instead"
    return f"{own}, or `preprocessing` in {shown(path.with_suffix('.json'))}" if "a Lambda layer" in named else own


def _foreign(config: Any, layer: str = "") -> Iterator[str]:
    """Yield a phrase for each part of a model's `config` that Keras can't create: Lambda layers and unknown classes."""
    if isinstance(config, list):
        for each in config:
            yield from _foreign(each, layer)
    if not isinstance(config, dict):
        return
    name, inner = config.get("class_name"), config.get("config")
    if isinstance(name, str) and isinstance(inner, dict):
        layer = str(inner.get("name", layer))
    if isinstance(name, str) and (name.endswith("Lambda") or not _is_known(name, config)):
        yield _in_words(name, config, layer)
        return
    for key, value in config.items():
        if key not in ("compile_config", "build_config", "inbound_nodes", "registered_name"):
            yield from _foreign(value, layer)


def _in_words(name: str, config: dict[str, Any], layer: str) -> str:
    where = f" `{shown(layer)}`" if layer else ""
    if name == "Lambda":
        return f"a Lambda layer{where}"
    if name == "function":
        return f"the function {shown(config.get('config'))} in the layer{where}" if layer else "a custom function"
    if name.endswith("Lambda"):
        return f"a TensorFlow operation{where} ({shown(name)})"
    package = _package(config)
    of = f"the layer{where} of " if layer else ""
    return f"{of}the class {shown(name)}" + (f" from {package}" if package in KERAS_PACKAGES else "")


def _is_known(name: str, config: dict[str, Any]) -> bool:
    """Whether Keras has the class or function that `config` names."""
    package = _package(config)
    if name.startswith("__") or (package == "builtins" and name != "function"):
        return True  # a tensor or a slice, not a class
    if name == "function":
        return hasattr(keras.activations, str(config.get("config")))
    if package in KERAS_PACKAGES[1:]:
        return importlib.util.find_spec(package) is not None
    if "module" in config:
        return package in ("keras", "tf_keras", "tensorflow")  # the last two in files of Keras 2
    known = ("Functional", "Policy", "TensorShape", "ListWrapper")
    return name in known or any(hasattr(getattr(keras, each), name) for each in NAMESPACES)


def _package(config: dict[str, Any]) -> str:
    return str(config.get("module") or "").split(".", 1)[0]


def one_to_one(model: Any, setting: str) -> Any:
    """Return `model` with one tensor as input and output, unpacked from a list or dict. Raises StartupError."""
    inputs, outputs = _tensors(model, "inputs"), _tensors(model, "outputs")
    if not inputs or not outputs:
        raise StartupError(
            f"{setting} has no defined input and output: begin it with keras.Input((height, width, channels)) "
            f"and {SAVE}."
        )
    if len(inputs) > 1:
        needed = "but one image is needed: save a model with one input"
        raise StartupError(f"{setting} takes {len(inputs)} inputs ({_names(inputs)}), {needed}.")
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
    except (AttributeError, ValueError):  # the model was never built
        return []


def _names(tensors: list[Any]) -> str:
    return ", ".join(shown(tensor._keras_history.operation.name) for tensor in tensors)


def last_activation(model: Any) -> str:
    """Return the activation that produces a model's output, such as "softmax"; empty if unknown."""
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
