"""Which models are served, and the one line that says why another is refused."""

import errno
import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import sample_models as models
from harness import ROOT, wait_until
from PIL import Image
from redis import Redis
from samples import colors, saved

import run_model_server
import settings
from image_queue import ServerQueue, WebQueue
from model_server import check, classifier, model_loading, pipeline
from model_server.loop import ModelServer
from model_server.model_version import version_of
from run_web_server import create_app

PICTURE = Image.fromarray(colors(1, (40, 30)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each model is built once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "BATCH_SIZE", 1)


def loaded(monkeypatch: pytest.MonkeyPatch, path: Path) -> classifier.Classifier:
    monkeypatch.setattr(settings, "MODEL", str(path))
    model = classifier.load()
    model.warm_up()
    return model


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Callable[[Path | str], str]:
    """A function that runs --check on a model, expects exit code 2, and returns the one line that it logs."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep the test run's own handlers
    monkeypatch.setattr(check, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(settings, "MODEL", settings.MODEL)  # restored afterwards: --model sets it
    PICTURE.save(tmp_path / "picture.png")

    def check_model(model: Path | str) -> str:
        command = ["run_model_server.py", "--model", str(model), "--check", str(tmp_path / "picture.png")]
        monkeypatch.setattr(sys, "argv", command)
        assert run_model_server.main() == 2
        [record] = [each for each in caplog.records if each.levelno >= logging.WARNING and each.name != "absl"]
        assert record.exc_info is None
        line = record.getMessage()
        assert line.isprintable()
        assert f"MODEL={model} " in line
        assert line.endswith(".")
        return line

    return check_model


# Inputs and outputs


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "two_outputs",
            "gives 2 outputs (kind, sex), but one with a probability per class is needed: save one of them",
        ),
        ("two_outputs_in_a_dict", "gives 2 outputs (kind, sex), but one"),
        ("two_inputs", "takes 2 inputs (image, weather), but one image is needed"),
        ("segmentation", "gives (16, 20, 3) values per image, but one per class is needed: let it end in Global"),
        ("boxes", "gives (3, 4) values per image, but one per class is needed"),
        ("a_number_for_each_image", "gives () values per image, but one per class is needed"),
        (
            "never_built",
            "has no defined input and output: begin it with keras.Input((height, width, channels))",
        ),
        ("too_deep_for_its_images", "can't take images of 224x224 ("),
    ],
)
def test_a_model_that_is_no_image_classifier_ends_with_code_2(
    folder: Path, refused: Callable[[Path], str], name: str, line: str
) -> None:
    assert line in refused(models.build(name, folder))


@pytest.mark.parametrize(
    "name",
    ["plain", "output_in_a_list", "output_in_a_dict", "input_in_a_dict", "built_by_its_first_image",
     "softmax_as_a_layer", "softmax_as_an_activation_layer", "softmax_as_an_operation",
     "softmax_after_a_model_of_logits", "mean_of_two_softmaxes", "softmax_summed_up_by_groups", "several_may_be_true",
     "normalization_by_a_dataset", "random_changes_in_training", "float16", "bfloat16", "nan_for_a_flat_image",
     "one_sigmoid_for_one_label"],
)  # fmt: skip
def test_probabilities_are_served_however_a_model_makes_them(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str
) -> None:
    path = models.build(name, folder)
    images = np.random.default_rng(0).integers(0, 256, (3, *models.SHAPE), dtype=np.uint8)

    model = loaded(monkeypatch, path)
    found = [dict(model.decode(each)) for each in model.classify(images) if not isinstance(each, Exception)]

    [plain] = keras.tree.flatten(keras.saving.load_model(path)(images.astype(np.float32)))
    labels = path.with_suffix(".labels.txt").read_text().split()
    assert len(found) == 3
    for each, expected in zip(found, np.asarray(plain).astype(np.float32), strict=True):
        assert each == pytest.approx(
            dict(zip(labels, map(float, expected), strict=True)), abs=1e-2 if "16" in name else 1e-5
        )


# Probabilities


@pytest.mark.parametrize(
    ("name", "because"),
    [("small_logits", "linear"), ("logits_that_are_pooled", "linear"), ("logits_of_a_model_within", "linear"),
     ("mean_of_logits", "linear"), ("logits_that_are_normalized", "linear"), ("relu_at_the_end", "relu"),
     ("tanh_at_the_end", "tanh"), ("log_softmax_at_the_end", "log_softmax"), ("per_cent", "linear"),
     ("one_logit_for_two_labels", "linear"), ("number_of_the_class", "")],
)  # fmt: skip
def test_values_that_only_look_like_probabilities_are_refused(
    folder: Path, refused: Callable[[Path], str], name: str, because: str
) -> None:
    line = refused(models.build(name, folder))

    assert "does not give probabilities: end it with a softmax, or a sigmoid where several classes may be true" in line
    assert line.endswith(f", because its last activation is {because}." if because else "true.")


def test_a_softmax_of_one_value_is_refused(folder: Path, refused: Callable[[Path], str]) -> None:
    line = refused(models.build("softmax_of_one_value", folder))

    assert "ends in a softmax of one value, which is always 1: use a sigmoid." in line


def test_one_sigmoid_is_the_probability_of_the_second_label(
    monkeypatch: pytest.MonkeyPatch, folder: Path, redis: Redis
) -> None:
    path = models.build("one_sigmoid_for_two_labels", folder)
    model = loaded(monkeypatch, path)
    server = ModelServer(model, ServerQueue(model.about, 30))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    monkeypatch.setattr(WebQueue, "shape", lambda _: models.SHAPE)  # not the shape of another test's server
    web = create_app().test_client()
    data = saved(PICTURE.resize(models.SHAPE[1::-1]), "PNG")
    try:
        wait_until(lambda: redis.exists(server.queue.heartbeat), "the model server is alive")
        both, first = (
            web.post(address, data=data, content_type="image/png").get_json()["predictions"]
            for address in ("/predict", "/predict?top=1")
        )
        [output] = web.get(f"/v2/models/{path.stem}").get_json()["outputs"]
    finally:
        server.stop(signal.SIGTERM, None)
        thread.join(20)

    pixels = np.asarray(PICTURE.resize(models.SHAPE[1::-1]), np.float32)[np.newaxis]
    [[dog]] = keras.saving.load_model(path).predict(pixels, verbose=0)
    assert 0.01 < dog < 0.99
    assert {each["label"]: each["probability"] for each in both} == pytest.approx(
        {"cat": 1 - dog, "dog": dog}, abs=1e-5
    )
    assert first == both[:1]
    assert both[0]["probability"] > both[1]["probability"]
    assert output["shape"] == [-1, 2]
    assert check.summary(model) == (
        "input 20x16 RGB, preprocessing none, 2 labels, its one output taken as the probability of dog"
    )


# Contents of the file


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("custom_layer", ["the layer `twice` of the class Scale", "use Keras' own layers"]),
        ("custom_layer_within", ["the layer `twice` of the class Scale", "keras.ops"]),
        ("custom_layer_wrapped", ["the layer `twice` of the class Scale", "model.save('name.keras')"]),
        ("custom_activation", ["the function soft in the layer `head`", "use Keras' own layers"]),
        ("custom_model", ["the class Own", "use Keras' own layers"]),
        (
            "lambda_layer",
            ["a Lambda layer `twice`", "use Keras' own layers", "`preprocessing` in", "lambda_layer.json"],
        ),
    ],
)
def test_code_in_a_keras_file_is_named_and_not_run(
    folder: Path, refused: Callable[[Path], str], name: str, lines: list[str]
) -> None:
    line = refused(models.build(name, folder))

    assert [each for each in lines if each not in line] == []


@pytest.mark.parametrize("name", ["custom_layer", "lambda_layer"])
def test_code_in_an_hdf5_file_is_named_and_not_run(
    folder: Path, tmp_path: Path, refused: Callable[[Path], str], name: str
) -> None:
    path = tmp_path / "own.h5"
    models.MAKERS[name][0]().save(path)
    path.with_suffix(".labels.txt").write_text("a\nb\nc\n")

    assert ("of the class Scale" if "custom" in name else "a Lambda layer `twice`") in refused(path)


@pytest.mark.parametrize("suffix", [".h5", ".keras", ".hdf5.keras"])
def test_a_file_of_keras_2_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    """So is an HDF5 file with the suffix of the other format."""
    path, plain = models.of_keras2(tmp_path, suffix)
    images = np.random.default_rng(0).integers(0, 256, (2, *models.SHAPE), dtype=np.uint8)

    found = loaded(monkeypatch, path).classify(images)

    assert np.stack(found) == pytest.approx(plain.predict(images.astype(np.float32), verbose=0), abs=1e-5)  # type: ignore


def test_a_file_of_keras_3_is_served_whatever_its_suffix(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.h5"
    path.write_bytes(models.build("plain", folder).read_bytes())
    path.with_suffix(".json").write_text(json.dumps({"labels": models.LABELS}))

    model = loaded(monkeypatch, path)

    assert (model.about["model"], model.about["weights"]) == ("own", "own.h5")


@pytest.mark.parametrize(
    ("version", "line"),
    [("3.99.0", f"was saved by Keras 3.99.0, newer than {keras.__version__} here (Unrecognized keyword arguments"),
     ("2.15.0", "was saved by Keras 2.15.0 in a way that Keras 3 can't read (Unrecognized keyword arguments"),
     (keras.__version__, "can't be loaded as a Keras model (Unrecognized keyword arguments")],
)  # fmt: skip
def test_the_error_names_the_keras_version_of_the_file(
    folder: Path, tmp_path: Path, refused: Callable[[Path], str], version: str, line: str
) -> None:
    path = tmp_path / "own.h5"
    keras.saving.load_model(models.build("plain", folder)).save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"] = version
        file.attrs["model_config"] = str(file.attrs["model_config"]).replace('"keepdims"', '"new": 1, "keepdims"')
    path.with_suffix(".labels.txt").write_text("a\nb\nc\n")

    assert line in refused(path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: OOM"), OSError(errno.ENOSPC, "No space left on device"),
              RuntimeError("CUDA error: device busy")], ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("where", ["load", "compute"])
def test_transient_errors_are_not_blamed_on_the_model(
    monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception, where: str
) -> None:
    """They end the process with an exit code other than 2, so that its supervisor tries again."""

    def fail(*_: object, **__: object) -> None:
        raise error

    path = models.build("plain", folder)
    if where == "load":
        monkeypatch.setattr(keras.saving, "load_model", fail)
    else:
        monkeypatch.setattr(pipeline, "compiled", lambda *_: type("Network", (), {"predict_on_batch": fail})())

    with pytest.raises(type(error)) as raised:
        loaded(monkeypatch, path)

    assert raised.value is error


def test_a_model_that_fails_for_every_image_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, refused: Callable[[Path], str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("\x1b[1mNegative dimension size\x1b[0m\n\nArguments received by Conv2D.call():")

    monkeypatch.setattr(pipeline, "compiled", lambda *_: type("Network", (), {"predict_on_batch": fail})())

    line = refused(models.build("plain", folder))

    assert line.endswith("can't be computed with images of 20x16 (Negative dimension size).")


def test_a_file_that_changes_while_it_is_loaded_is_loaded_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise its answers would name the version that was there before."""
    path = tmp_path / "digits.keras"
    for file in ROOT.glob("models/digits.*"):
        shutil.copy(file, tmp_path)
    labels, load_file = tmp_path / "digits.labels.txt", model_loading.load_file
    loaded: list[object] = []

    def change_and_load(*arguments: Any) -> Any:
        if not loaded:
            labels.write_text("\n".join("abcdefghij"))
        loaded.append(arguments)
        return load_file(*arguments)

    monkeypatch.setattr(settings, "MODEL", str(path))
    monkeypatch.setattr(model_loading, "load_file", change_and_load)

    _, _, facts = model_loading.load()

    assert len(loaded) == 2
    assert facts.labels == list("abcdefghij")
    assert facts.version == version_of([path, path.with_suffix(".json"), labels])
