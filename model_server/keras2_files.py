"""Rewrites Keras 2 files that Keras 3 can't load only because some names or options differ.

The changes do not affect what a model computes. Keras 3 still refuses a file with other differences.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py

# What holds the architecture: an attribute of an HDF5 file, a member of a .keras file.
ATTRIBUTE, MEMBER = "model_config", "config.json"
FUNCTIONAL = {"module": "keras.src.models.functional", "class_name": "Functional", "registered_name": "Functional"}
# Options that Keras 3 has dropped. They have no effect on these layers, or only in training.
DROPPED = {
    "SeparableConv": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "DepthwiseConv": ("groups",),
    "Conv2DTranspose": ("groups",),
    "Random": ("rng_type",),
}


def rewrite(path: Path, target: Path, config: Any) -> bool:
    """Copy the model at `path`, which has this `config`, to `target` as Keras 3 would have written it.

    Return False, without copying, if there is nothing to change.
    """
    changed = as_keras3(config)
    if changed == config:
        return False
    copy = _copy_hdf5 if target.suffix == ".h5" else _copy_zip
    copy(path, target, json.dumps(changed))
    return True


def _copy_hdf5(path: Path, target: Path, config: str) -> None:
    shutil.copyfile(path, target)
    with h5py.File(target, "r+") as file:
        file.attrs[ATTRIBUTE] = config


def _copy_zip(path: Path, target: Path, config: str) -> None:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name == MEMBER:
                new.writestr(name, config)
                continue
            with old.open(name) as source, new.open(name, "w", force_zip64=True) as copy:
                shutil.copyfileobj(source, copy)


def as_keras3(config: Any) -> Any:
    """Return a Keras 2 `config`, or a part of one, with the names of Keras 3."""
    if isinstance(config, list):
        return [as_keras3(each) for each in config]
    if not isinstance(config, dict):
        return config
    config = {key: as_keras3(value) for key, value in config.items()}
    kind, inner = config.get("class_name"), config.get("config")
    if not (isinstance(kind, str) and isinstance(inner, dict)):
        return config
    if kind == "Policy":
        return inner["name"]
    if kind in ("Functional", "Model") and ".engine." in str(config.get("module")):
        config |= FUNCTIONAL
    return config | {"config": _layer(kind, inner)}


def _layer(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    axis = config.get("axis")
    if kind == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        config = config | {"axis": axis[0]}
    shape = config.get("batch_input_shape")
    if shape and kind != "InputLayer":  # the first layer of a Sequential
        config = config | {"input_shape": shape[1:]}
        del config["batch_input_shape"]
    for ports in ("input_layers", "output_layers"):  # a tensor, not a list of one
        if isinstance(config.get(ports), list) and len(config[ports]) == 1:
            config = config | {ports: config[ports][0]}
    dropped = [name for each, names in DROPPED.items() if kind.startswith(each) for name in names]
    return {key: value for key, value in config.items() if key not in dropped}
