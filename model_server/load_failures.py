"""Why Keras can't load the model in a file, and what to do about it. Imports Keras."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from model_server import model_checks
from model_server.model_errors import gist
from model_server.model_file import shown

SAVE = "save it again with model.save('name.keras')"
MOST_NAMED = 3  # layers that can't be loaded, in one line
KERAS_PACKAGES = ("keras", "keras_hub", "keras_cv", "keras_nlp")  # Keras itself loads classes from these
# Where Keras looks up classes of an HDF5 file of Keras 2, which names no module.
NAMESPACES = ("layers", "models", "initializers", "regularizers", "constraints", "dtype_policies")


def why_not(path: Path, error: Exception) -> str:
    """Return why the model in a file can't be loaded, and what to do, for the end of a line. Raises StartupError."""
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
            return (
                f"install it with .venv/bin/pip install {package.replace('_', '-')}, or use Keras' own layers instead"
            )
    own = "use Keras' own layers (such as Rescaling) and keras.ops instead"
    return f"{own}, or `preprocessing` in {shown(path.with_suffix('.json'))}" if "a Lambda layer" in named else own


def _foreign(config: Any, layer: str = "") -> Iterator[str]:
    """Yield, in words, each part of a model's `config` that Keras can't make: Lambda layers, and unknown classes."""
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
        return f"the function {shown(config.get('config'))} in the layer{where}" if layer else "a function of its own"
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
        return package in ("keras", "tf_keras", "tensorflow")  # the last two are of Keras 2
    known = ("Functional", "Policy", "TensorShape", "ListWrapper")
    return name in known or any(hasattr(getattr(keras, each), name) for each in NAMESPACES)


def _package(config: dict[str, Any]) -> str:
    return str(config.get("module") or "").split(".", 1)[0]
