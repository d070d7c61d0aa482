"""From a file to a Keras model that the service can use: one image goes in, one row of values comes out.

Only classifier.py imports this, since it imports Keras.
"""

import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from helpers import StartupError
from model_server import model_checks
from model_server.keras2_files import rewrite
from model_server.model_file import shown

SAVE = "save it again with model.save('name.keras')"
SHOWN_LAYERS = 3  # in one line, of those that can't be loaded
KERAS_PACKAGES = ("keras", "keras_hub", "keras_cv", "keras_nlp")  # that Keras itself loads classes from
# What gives probabilities: one class of several, or each class by itself.
PROBABLE = ("softmax", "sigmoid", "hard_sigmoid", "sparsemax", "sparse_sigmoid")
# Layers and operations that leave probabilities what they are, and logits too.
TRANSPARENT = {
    *("Activation", "Flatten", "Reshape", "Permute", "Dropout", "SpatialDropout2D", "ActivityRegularization"),
    *("Identity", "Cast", "Squeeze", "Transpose", "Mean", "GetItem", "Average", "Concatenate", "Maximum", "Minimum"),
    *("GlobalAveragePooling2D", "GlobalMaxPooling2D", "AveragePooling2D", "MaxPooling2D", "Cropping2D"),
}
LINEAR = {"BatchNormalization", "LayerNormalization", "GroupNormalization", "Normalization", "Rescaling"}


def load_file(path: Path) -> Any:
    """Return the model in a .keras or HDF5 file, by its content, whatever its name ends in. Code in it is not run.

    Raises StartupError where it is another kind of file, and what Keras raises where Keras can't load it.
    """
    form = model_checks.whole_model(path)
    version = model_checks.saved_by(path, form)
    if version >= (3,) and path.suffix == f".{form}":
        return _load(path)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model.{form}")  # Keras goes by the end of the name
        if version >= (3,) or not rewrite(path, link, model_checks.configuration(path, form)):
            link.symlink_to(path.resolve())
        return _load(link)


def _load(path: Path) -> Any:
    return keras.saving.load_model(path, compile=False, safe_mode=True)


def why_not(path: Path, error: Exception) -> str:
    """Return why the model in a file can't be loaded, and what to do, for the end of a line. Raises StartupError."""
    form = model_checks.whole_model(path)
    foreign = list(dict.fromkeys(_foreign(model_checks.configuration(path, form))))
    if foreign:
        some = " and ".join(foreign[:SHOWN_LAYERS]) + (" and more" if foreign[SHOWN_LAYERS:] else "")
        return f"has {some}, whose code is not Keras' own and is not run here: {_in_place_of(some, path)}, and {SAVE}"
    version = model_checks.saved_by(path, form)
    if version[:1] == (2,):
        return (
            f"was saved by Keras {_text(version)} in a way that Keras 3 can't read ({gist(error)}): build the same "
            f"model in Keras 3, fill it with model.load_weights('{shown(path.name)}'), and {SAVE}"
        )
    if version[:2] > _version(keras.__version__)[:2]:
        newer = f"was saved by Keras {_text(version)}, newer than {keras.__version__} here ({gist(error)})"
        return f"{newer}: .venv/bin/pip install keras=={_text(version)}"
    return f"can't be loaded as a Keras model ({gist(error)}): load it where it was made, and {SAVE}"


def _in_place_of(layers: str, path: Path) -> str:
    for package in KERAS_PACKAGES[1:]:
        if f"from {package}" in layers:
            return (
                f"install it with .venv/bin/pip install {package.replace('_', '-')}, or use Keras' own layers instead"
            )
    own = "use Keras' own layers (as Rescaling) and keras.ops instead"
    return f"{own}, or `preprocessing` in {shown(path.with_suffix('.json'))}" if "a Lambda layer" in layers else own


def _foreign(config: Any, layer: str = "") -> Iterator[str]:
    """Yield, for people, what of a model's `config` Keras can't make: Lambda layers, and classes that it lacks."""
    if isinstance(config, list):
        for each in config:
            yield from _foreign(each, layer)
    if not isinstance(config, dict):
        return
    name, inner = config.get("class_name"), config.get("config")
    if isinstance(name, str) and isinstance(inner, dict):
        layer = str(inner.get("name", layer))
    if isinstance(name, str) and (name.endswith("Lambda") or not _known(name, config)):
        yield _told(name, config, layer)
        return
    for key, value in config.items():
        if key not in ("compile_config", "build_config", "inbound_nodes", "registered_name"):
            yield from _foreign(value, layer)


def _told(name: str, config: dict[str, Any], layer: str) -> str:
    where = f" `{shown(layer)}`" if layer else ""
    if name == "Lambda":
        return f"a Lambda layer{where}"
    if name == "function":
        return f"the function {shown(config.get('config'))} in the layer{where}" if layer else "a function of its own"
    if name.endswith("Lambda"):
        return f"a TensorFlow operation{where} ({shown(name)})"
    package = _package(config)
    of = f"the layer{where} of " if layer else ""
    return f"{of}the class {shown(name)}" + (f" from {package}" if package in KERAS_PACKAGES else "")


def _known(name: str, config: dict[str, Any]) -> bool:
    """Whether Keras has the class or function that `config` names."""
    package = _package(config)
    if name.startswith("__") or (package == "builtins" and name != "function"):
        return True  # a tensor, a slice: no class
    if name == "function":
        return hasattr(keras.activations, str(config.get("config")))
    if package in KERAS_PACKAGES[1:]:
        return importlib.util.find_spec(package) is not None
    if "module" in config:
        return package in ("keras", "tf_keras", "tensorflow")  # the last two are of Keras 2
    # Keras 2 named no module in an HDF5 file.
    kinds = (
        keras.layers,
        keras.models,
        keras.initializers,
        keras.regularizers,
        keras.constraints,
        keras.dtype_policies,
    )
    return name in ("Functional", "Policy", "TensorShape", "ListWrapper") or any(hasattr(kind, name) for kind in kinds)


def _package(config: dict[str, Any]) -> str:
    return str(config.get("module") or "").split(".", 1)[0]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def gist(error: Exception) -> str:
    """Return the line of an exception that says most: Keras and its backends write pages, with colours."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.rpartition("Exception encountered: ")[2].splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception encountered when")]
    return shown((said or [type(error).__name__])[0]).rstrip(".:")


def one_to_one(model: Any, setting: str) -> Any:
    """Return `model` with one tensor as its input and one as its output, out of a list or dict too. Raises StartupError."""
    inputs, outputs = _ports(model, "inputs"), _ports(model, "outputs")
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
            f"{setting} gives {len(outputs)} outputs ({_names(outputs)}), but one with a probability a class is "
            "needed: save one of them with keras.Model(model.inputs, model.outputs[0]).save('name.keras')."
        )
    if isinstance(model, keras.Sequential) or (model.input is inputs[0] and model.output is outputs[0]):
        return model
    return keras.Model(inputs[0], outputs[0])


def _ports(model: Any, which: str) -> list[Any]:
    try:
        return list(keras.tree.flatten(getattr(model, which)))
    except (AttributeError, ValueError):  # it was never built
        return []


def _names(tensors: list[Any]) -> str:
    return ", ".join(shown(tensor._keras_history.operation.name) for tensor in tensors)


def ending(model: Any) -> str:
    """Return the activation that makes the output of a model, as "softmax"; empty where it can't be told."""
    try:
        return _ending(model.outputs[0])
    except (AttributeError, IndexError):
        return ""


def _ending(tensor: Any) -> str:
    operation, node, index = tensor._keras_history
    if isinstance(operation, keras.Model):
        return _ending(operation.outputs[index])
    activation = _activation(operation)
    if activation != "linear" or type(operation).__name__ not in TRANSPARENT:
        return activation
    ends = [_ending(each) for each in operation._inbound_nodes[node].input_tensors]
    return next((end for end in ends if end not in PROBABLE), ends[0])


def _activation(operation: Any) -> str:
    kind = type(operation)
    if (
        kind.__module__.startswith(("keras.src.ops.nn", "keras.src.layers.activations"))
        and kind.__name__ != "Activation"
    ):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    function = getattr(operation, "activation", None)
    if function is not None:
        own = getattr(function, "__module__", "").startswith("keras.")
        return str(getattr(function, "__name__", type(function).__name__)).lower() if own else ""
    return "linear" if kind.__name__ in TRANSPARENT | LINEAR else ""
