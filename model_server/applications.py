"""The classifiers of keras.applications, by name, with their own preprocessing and labels. Imports Keras."""

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np

import settings
from helpers import StartupError
from model_server import model_checks, model_loading
from model_server.downloads import download
from model_server.model_errors import gist, is_transient
from model_server.model_file import DEFAULT_TOP, Facts, ModelFile, labels_of
from model_server.model_version import version_of
from model_server.pipeline import Preprocess, input_shape

SEED = 0  # for MODEL_WEIGHTS=random: all model servers must give the same answers
IMAGENET = "1,000 ImageNet classes: animals, plants, food, vehicles, things"  # what Keras' trained models recognize


def applications() -> dict[str, ModuleType]:
    """Return the module of every classifier in keras.applications, by the classifier's name.

    Each module has the preprocess_input and decode_predictions of its classifiers.
    """
    builders = inspect.getmembers(keras.applications, inspect.isfunction)
    return {name: sys.modules[builder.__module__] for name, builder in builders}


def load() -> tuple[Any, Preprocess, Facts]:
    """Return the model that MODEL names, its preprocessing, and the facts about it. Raises StartupError."""
    name = settings.MODEL
    file = model_checks.application_file(name)
    weights = model_checks.application_weights(file)
    module: Any = applications()[name]
    labels = _chosen_labels(weights, file)
    version = weights if weights in ("random", "imagenet") else version_of([Path(weights), file.path])
    build = getattr(keras.applications, name)
    keras.utils.set_random_seed(SEED)
    if weights in ("random", "imagenet"):
        model = download(lambda: build(weights=None if weights == "random" else weights))
    else:
        model = _with_weights(build(weights=None, classes=1000 if labels is None else len(labels)), Path(weights))
    facts = Facts(
        input_shape(model, file),
        labels or _imagenet_labels(module),
        f"LABELS={settings.LABELS}",
        preprocessing=f"{name}'s own",
        top=file.top or DEFAULT_TOP,
        description=file.description or (IMAGENET if weights == "imagenet" else ""),
        activation=model_loading.last_activation(model),
        weights=Path(weights).name,
        version=version,
    )
    return model, module.preprocess_input, facts


def _chosen_labels(weights: str, file: ModelFile) -> list[str] | None:
    if settings.LABELS or file.labels:
        return list(labels_of(file, settings.LABELS)[0])
    # Untrained weights recognize nothing, and a label such as "beagle" would hide that.
    return [f"class_{i}" for i in range(1000)] if weights == "random" else None


def _imagenet_labels(module: Any) -> list[str]:
    decoded = download(lambda: module.decode_predictions(np.eye(1000), top=1))
    return [label for [(_, label, _)] in decoded]


def _with_weights(model: Any, path: Path) -> Any:
    """Return `model` with the weights at `path`, or the whole model in a .keras file. Raises StartupError."""
    if path.suffix == ".keras":
        return model_loading.one_to_one(model_loading.load_file(path, "MODEL_WEIGHTS"), f"MODEL_WEIGHTS={path}")
    try:
        model.load_weights(path)
    except Exception as error:
        if is_transient(error):
            raise
        raise StartupError(
            f"MODEL_WEIGHTS={path} does not fit MODEL={settings.MODEL} ({gist(error)}): set MODEL to the "
            "model that it was saved from."
        ) from error
    return model
