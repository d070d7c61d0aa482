"""Tiny models: valid ones, and ones with the mistakes of real users' models."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

layers = keras.layers
ops = keras.ops
SHAPE = (16, 20, 3)  # height, width, channels
LABELS = ["cat", "dog", "fox"]
Model = Any
MAKERS: dict[str, tuple[Callable[[], Model], list[str]]] = {}


def maker(labels: list[str] = LABELS) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    def register(function: Callable[[], Model]) -> Callable[[], Model]:
        MAKERS[function.__name__] = function, labels
        return function

    return register


def build(name: str, folder: Path) -> Path:
    """Save the model of this name in `folder` with its labels, unless it is there already."""
    path = folder / f"{name}.keras"
    if not path.exists():
        make, labels = MAKERS[name]
        keras.utils.set_random_seed(1)
        make().save(path)
        path.with_suffix(".labels.txt").write_text("\n".join(labels) + "\n")
    return path


def image() -> Any:
    return keras.Input(SHAPE, name="image")


def features(pixels: Any) -> Any:
    return layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255)(pixels))


def ending_in(*end: Any, dtype: str = "float32") -> Model:
    begin = [image(), layers.Rescaling(1 / 255, dtype=dtype), layers.GlobalAveragePooling2D(dtype=dtype)]
    return keras.Sequential([*begin, *end])


def dense(units: int = 3, activation: Any = None, gain: float = 0, **options: Any) -> Any:
    """A layer of random weights; with `gain`, all weights have that value, which keeps the output between 0 and 1."""
    kernel = {"kernel_initializer": keras.initializers.Constant(gain)} if gain else {}
    return layers.Dense(units, activation=activation, **kernel, **options)


# One image in, one row of probabilities out


@maker()
def plain() -> Model:
    return ending_in(dense(activation="softmax"))


@maker()
def output_in_a_list() -> Model:
    pixels = image()
    return keras.Model(pixels, [dense(activation="softmax")(features(pixels))])


@maker()
def output_in_a_dict() -> Model:
    pixels = image()
    return keras.Model(pixels, {"probabilities": dense(activation="softmax")(features(pixels))})


@maker()
def input_in_a_dict() -> Model:
    pixels = image()
    return keras.Model({"image": pixels}, dense(activation="softmax")(features(pixels)))


@maker()
def built_by_its_first_image() -> Model:
    model = keras.Sequential([layers.GlobalAveragePooling2D(), dense(activation="softmax")])
    model(np.zeros((1, *SHAPE), np.float32))
    return model


@maker()
def softmax_as_a_layer() -> Model:
    return ending_in(dense(), layers.Softmax())


@maker()
def softmax_as_an_activation_layer() -> Model:
    return ending_in(dense(), layers.Activation("softmax", dtype="float32"))


@maker()
def softmax_as_an_operation() -> Model:
    pixels = image()
    return keras.Model(pixels, ops.reshape(ops.softmax(dense()(features(pixels))), (-1, 3)))


@maker()
def softmax_after_a_model_of_logits() -> Model:
    return keras.Sequential([image(), ending_in(dense()), layers.Softmax()])


@maker()
def mean_of_two_softmaxes() -> Model:
    pixels = image()
    two = [dense(activation="softmax")(features(pixels)) for _ in range(2)]
    return keras.Model(pixels, layers.Average()(two))


@maker()
def softmax_summed_up_by_groups() -> Model:
    """The last layer is linear, but the output is probabilities."""
    groups = ending_in(dense(activation="softmax"), dense(use_bias=False))
    groups.layers[-1].set_weights([np.eye(3, dtype=np.float32)])
    return groups


@maker()
def several_may_be_true() -> Model:
    return ending_in(dense(activation="sigmoid"))


@maker()
def normalization_by_a_dataset() -> Model:
    """Has tensors that are not weights, as EfficientNetB0 has: a Normalization layer with the dataset's mean."""
    normal = layers.Normalization()
    normal.adapt(np.random.default_rng(0).uniform(0, 255, (8, *SHAPE)))
    return keras.Sequential([image(), normal, layers.GlobalAveragePooling2D(), dense(activation="softmax")])


@maker()
def random_changes_in_training() -> Model:
    """Has layers with random numbers, which change nothing outside of training."""
    changes = [layers.RandomFlip(), layers.RandomRotation(0.2), layers.GaussianNoise(0.9), layers.Dropout(0.5)]
    return keras.Sequential([image(), *changes, layers.GlobalAveragePooling2D(), dense(activation="softmax")])


@maker()
def float16() -> Model:
    return ending_in(dense(activation="softmax", dtype="float16"), dtype="float16")


@maker()
def bfloat16() -> Model:
    return ending_in(dense(activation="softmax", dtype="bfloat16"), dtype="bfloat16")


@maker()
def nan_for_a_flat_image() -> Model:
    """Standardizes each image, which divides by zero if all its pixels are equal."""
    pixels = image()
    each: dict[str, Any] = {"axis": (1, 2, 3), "keepdims": True}
    normal = (pixels - ops.mean(pixels, **each)) / ops.std(pixels, **each)
    return keras.Model(pixels, dense(activation="softmax")(layers.Flatten()(normal)))


@maker(["cat", "dog"])
def one_sigmoid_for_two_labels() -> Model:
    return ending_in(dense(1, "sigmoid"))


@maker(["dog"])
def one_sigmoid_for_one_label() -> Model:
    return ending_in(dense(1, "sigmoid"))


# Outputs that are not probabilities


@maker()
def small_logits() -> Model:
    return ending_in(dense(gain=0.3))


@maker()
def logits_that_are_pooled() -> Model:
    return keras.Sequential(
        [image(), layers.Rescaling(1 / 255), layers.Conv2D(3, 1, kernel_initializer=keras.initializers.Constant(0.2)),
         layers.GlobalAveragePooling2D()]
    )  # fmt: skip


@maker()
def logits_of_a_model_within() -> Model:
    return keras.Sequential([image(), ending_in(dense(gain=0.2))])


@maker()
def mean_of_logits() -> Model:
    pixels = image()
    return keras.Model(pixels, layers.Average()([dense(gain=0.2)(features(pixels)) for _ in range(2)]))


@maker()
def logits_that_are_normalized() -> Model:
    return ending_in(dense(gain=0.2), layers.BatchNormalization())


@maker()
def relu_at_the_end() -> Model:
    return ending_in(dense(activation="relu", gain=0.2))


@maker()
def tanh_at_the_end() -> Model:
    return ending_in(dense(activation="tanh", gain=0.2))


@maker()
def log_softmax_at_the_end() -> Model:
    return ending_in(dense(activation="log_softmax"))


@maker()
def per_cent() -> Model:
    return ending_in(dense(activation="softmax"), layers.Rescaling(100.0))


@maker(["cat", "dog"])
def one_logit_for_two_labels() -> Model:
    return ending_in(dense(1, gain=0.2))


@maker(["cat", "dog"])
def number_of_the_class() -> Model:
    pixels = image()
    return keras.Model(pixels, ops.argmax(dense()(features(pixels)), axis=-1, keepdims=True))


@maker(["cat", "dog"])
def softmax_of_one_value() -> Model:
    return ending_in(dense(1, "softmax"))


# Inputs other than one image, outputs other than one row of values, and custom code


@maker()
def two_outputs() -> Model:
    pixels = image()
    kind = layers.Dense(3, activation="softmax", name="kind")(features(pixels))
    return keras.Model(pixels, [kind, layers.Dense(2, activation="softmax", name="sex")(features(pixels))])


@maker()
def two_outputs_in_a_dict() -> Model:
    model = two_outputs()
    return keras.Model(model.inputs, dict(zip(("kind", "sex"), model.outputs, strict=True)))


@maker()
def two_inputs() -> Model:
    pixels, more = image(), keras.Input((5,), name="weather")
    return keras.Model([pixels, more], dense(activation="softmax")(layers.Concatenate()([features(pixels), more])))


@maker()
def segmentation() -> Model:
    return keras.Sequential([image(), layers.Conv2D(3, 1, activation="softmax")])


@maker()
def boxes() -> Model:
    return ending_in(dense(12, "sigmoid"), layers.Reshape((3, 4)))


@maker()
def a_number_for_each_image() -> Model:
    pixels = image()
    return keras.Model(pixels, ops.mean(features(pixels), axis=1))


@maker()
def never_built() -> Model:
    return keras.Sequential([layers.Flatten(), dense(activation="softmax")])


@maker()
def too_deep_for_its_images() -> Model:
    convolutions = [layers.Conv2D(2, 3, strides=4) for _ in range(6)]
    return keras.Sequential([keras.Input((None, None, 3)), *convolutions, layers.GlobalAveragePooling2D(), dense()])


@maker()
def custom_layer() -> Model:
    return ending_in(Scale(name="twice"), dense(activation="softmax"))


@maker()
def custom_layer_within() -> Model:
    inner = keras.Sequential([image(), Scale(name="twice")])
    return keras.Sequential([image(), inner, layers.GlobalAveragePooling2D(), dense(activation="softmax")])


@maker()
def custom_layer_wrapped() -> Model:
    wrapped = layers.TimeDistributed(Scale(name="twice"))
    return keras.Sequential([image(), wrapped, layers.GlobalAveragePooling2D(), dense(activation="softmax")])


@maker()
def custom_activation() -> Model:
    return ending_in(layers.Dense(3, activation=soft, name="head"))


@maker()
def custom_model() -> Model:
    model = Own()
    model(np.zeros((1, *SHAPE), np.float32))
    return model


@maker()
def lambda_layer() -> Model:
    return ending_in(layers.Lambda(lambda values: values * 2, name="twice"), dense(activation="softmax"))


class Scale(keras.layers.Layer):  # type: ignore[misc]
    def call(self, values: Any) -> Any:
        return values * 2


class Own(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.head = dense(activation="softmax")

    def call(self, pixels: Any) -> Any:
        return self.head(ops.mean(pixels, axis=(1, 2)))


def soft(values: Any) -> Any:
    return ops.softmax(values)


# Files in the format of Keras 2


def of_keras2(folder: Path, suffix: str) -> tuple[Path, Model]:
    """Save a model in `folder` in the format of Keras 2; return its path and the model.

    The differences from Keras 3 are those in files that TensorFlow 2.15 wrote.
    """
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Rescaling(1 / 255), layers.Conv2D(4, 3, activation="relu"),
         layers.DepthwiseConv2D(3), layers.SeparableConv2D(4, 3), layers.BatchNormalization(),
         layers.RandomFlip("horizontal"), inner_model(), layers.GlobalAveragePooling2D(),
         dense(activation="softmax")]
    )  # fmt: skip
    path = folder / f"old{suffix}"
    if suffix == ".keras":
        model.save(path)
        rewrite_zip(path)
    else:
        model.save(folder / "old.h5")
        os.replace(folder / "old.h5", path)
        with h5py.File(path, "r+") as file:
            file.attrs["keras_version"] = "2.15.0"
            file.attrs["model_config"] = json.dumps(as_keras2(json.loads(file.attrs["model_config"])))
    path.with_suffix(".labels.txt").write_text("\n".join(LABELS) + "\n")
    return path, model


def inner_model() -> Model:
    values = keras.Input((10, 14, 4))
    return keras.Model(values, layers.Add()([values, layers.ReLU()(values)]))


def rewrite_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["metadata.json"] = b'{"keras_version": "2.15.0", "date_saved": "2024-01-01@00:00:00"}'
    members["config.json"] = json.dumps(as_keras2(json.loads(members["config.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def as_keras2(config: Any) -> Any:
    """Convert a `config` of Keras 3 to what Keras 2 would have written."""
    if isinstance(config, list):
        return [as_keras2(each) for each in config]
    if not isinstance(config, dict):
        return config
    config = {key: as_keras2(value) for key, value in config.items()}
    kind, inner = config.get("class_name"), config.get("config")
    if kind == "DTypePolicy":
        return {"module": "keras.mixed_precision", "class_name": "Policy", "config": {"name": inner["name"]}}
    if kind == "Functional":
        config["module"] = "keras.src.engine.functional"
        for ports in ("input_layers", "output_layers"):
            inner[ports] = [inner[ports]]
    if kind == "InputLayer":
        inner["batch_input_shape"] = inner.pop("batch_shape")
    if kind == "Rescaling":
        inner["batch_input_shape"] = [None, *SHAPE]
    if kind in ("DepthwiseConv2D", "SeparableConv2D"):
        inner["groups"] = 1
    if kind == "SeparableConv2D":
        inner |= {"kernel_regularizer": None, "kernel_initializer": {"class_name": "Zeros", "config": {}}}
    if kind == "BatchNormalization":
        inner["axis"] = [3]
    if kind == "RandomFlip":
        inner["rng_type"] = "stateful"
    return config
