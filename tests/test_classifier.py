"""The classifier: which models it refuses, how it computes batches, and that a bad image does not affect the others."""

import functools
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from harness import AS_INSTALLED, ROOT

import settings
from helpers import StartupError
from model_server import applications, batching, check, classifier
from model_server.classifier import Classifier, Prediction
from model_server.model_file import Facts

LABELS = ["zero", "one", "two"]
FACTS = Facts((4, 6, 3), LABELS, "LABELS")
POISON = 13


class Network:
    """A network whose first probability is the mean pixel. It records batch sizes and calls `fault` with each batch."""

    def __init__(self, fault: Callable[[Any], None] = lambda images: None) -> None:
        self.fault = fault
        self.sizes: list[int] = []

    def predict_on_batch(self, images: Any) -> Any:
        self.sizes.append(len(images))
        self.fault(images)
        first = images.mean(axis=(1, 2, 3)) / 255
        return np.stack([first, (1 - first) * 0.75, (1 - first) * 0.25], axis=1).astype(np.float32)


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "IMAGE_WIDTH", 6)
    monkeypatch.setattr(settings, "IMAGE_HEIGHT", 4)
    monkeypatch.setattr(settings, "IMAGE_CHANS", 3)


class Clock:
    """A clock that only sleep() advances, so that warm-up measures the same on a busy machine."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of warm-up."""
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    return clock


def warmed_up(network: Network) -> Classifier:
    model = Classifier(network, FACTS)
    model.warm_up()
    network.sizes.clear()
    return model


def batch(*levels: int) -> Any:
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def predicted(model: Classifier, images: Any) -> list[list[Prediction] | Exception]:
    """The decoded results of classify(), and its errors."""
    return [each if isinstance(each, Exception) else model.decode(each) for each in model.classify(images)]


def good(result: list[Prediction] | Exception) -> list[Prediction]:
    assert not isinstance(result, Exception)
    return result


def first_probabilities(results: Any) -> list[float | None]:
    """The probability of "zero" for each image, times 255; None where it failed."""
    return [None if isinstance(each, Exception) else round(dict(each)["zero"] * 255) for each in results]


def test_predictions_are_sorted_and_limited_to_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "TOP", 2)

    [prediction] = predicted(warmed_up(Network()), batch(102))

    assert [label for label, _ in good(prediction)] == ["one", "zero"]
    assert [probability for _, probability in good(prediction)] == pytest.approx([0.45, 0.4])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 32])
def test_only_warmed_up_batch_sizes_are_computed(count: int) -> None:
    network = Network()
    model = Classifier(network, FACTS)
    model.warm_up()
    warm = set(network.sizes)
    network.sizes.clear()

    results = predicted(model, batch(*range(count)))

    assert first_probabilities(results) == list(range(count))
    assert set(network.sizes) <= warm


def test_a_batch_is_cut_into_the_fastest_pieces() -> None:
    network = Network()
    model = warmed_up(network)

    model.sizes.seconds = {1: 1.0, 4: 2.0, 8: 7.0}
    predicted(model, batch(*range(9)))
    assert sorted(network.sizes) == [1, 4, 4]

    network.sizes.clear()
    model.sizes.seconds = {1: 3.0, 8: 4.0}
    predicted(model, batch(1, 2, 3))
    assert network.sizes == [8]  # padded, since three single images would take longer


def slow(clock: Clock, *, sweet: int) -> Callable[[Any], None]:
    """A slow `fault`: 5 ms per image in batches of `sweet`, and a fifth more for each halving or doubling."""
    return lambda images: clock.sleep(len(images) * 0.005 * (1 + 0.2 * abs(math.log2(len(images) / sweet))))


@pytest.mark.parametrize("sweet", [4, 32])
def test_the_batch_size_is_the_fastest_per_image(clock: Clock, sweet: int) -> None:
    network = Network(slow(clock, sweet=sweet))
    model = Classifier(network, FACTS)

    model.warm_up()

    assert model.batch_size == sweet
    assert model.slowest == pytest.approx(sweet * 0.005, rel=0.01)


def test_equally_fast_sizes_give_the_smallest_that_takes_100_ms(clock: Clock) -> None:
    """With larger batches the first image would be answered later and the last one no sooner."""
    model = Classifier(Network(lambda images: clock.sleep(0.015 * len(images))), FACTS)

    model.warm_up()

    assert model.batch_size == 8  # takes 0.12 s


def test_warm_up_stops_where_larger_batches_gain_nothing(clock: Clock) -> None:
    network = Network(slow(clock, sweet=2))

    Classifier(network, FACTS).warm_up()

    assert max(network.sizes) == 8


def test_warm_up_measures_a_long_batch_once(clock: Clock) -> None:
    network = Network(lambda images: clock.sleep(0.015 * len(images)))

    Classifier(network, FACTS).warm_up()

    assert network.sizes.count(8) == 2  # compiled, and measured once


def test_noise_does_not_make_a_fast_model_choose_small_batches() -> None:
    """BATCH_OVERHEAD is added to each batch's time, so larger batches are clearly faster per image."""
    assert warmed_up(Network()).batch_size == 32


def test_an_image_that_breaks_the_model_fails_alone() -> None:
    def fault(images: Any) -> None:
        if (images == POISON).all(axis=(1, 2, 3)).any():
            raise RuntimeError("poison")

    results = predicted(warmed_up(Network(fault)), batch(1, 2, POISON, 4, 5, 6, POISON, 8))

    assert first_probabilities(results) == [1, 2, None, 4, 5, 6, None, 8]


def test_an_output_that_is_not_finite_fails_alone() -> None:
    class NotANumber(Network):
        def predict_on_batch(self, images: Any) -> Any:
            output = super().predict_on_batch(images)
            output[(images == POISON).all(axis=(1, 2, 3))] = np.nan
            return output

    assert first_probabilities(predicted(warmed_up(NotANumber()), batch(1, POISON, 3))) == [1, None, 3]


OUT_OF_MEMORY = [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
                 RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]  # fmt: skip


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_a_batch_too_big_for_memory_is_split_and_remembered(clock: Clock, error: Exception) -> None:
    largest = 32

    def fault(images: Any) -> None:
        if len(images) > largest:
            raise error

    network = Network(fault)
    model = warmed_up(network)
    assert model.batch_size == 32
    model.sizes.seconds = dict.fromkeys(model.sizes.seconds, 0.001)  # so that it prefers the largest
    largest = 7

    assert first_probabilities(predicted(model, batch(*range(32)))) == list(range(32))
    network.sizes.clear()
    assert first_probabilities(predicted(model, batch(*range(32)))) == list(range(32))
    assert max(network.sizes) <= 7
    assert model.batch_size == 4


def test_warm_up_stops_where_a_batch_does_not_fit_in_memory() -> None:
    def fault(images: Any) -> None:
        if len(images) > 8:
            raise MemoryError

    network = Network(fault)
    model = warmed_up(network)

    assert first_probabilities(predicted(model, batch(*range(20)))) == list(range(20))
    assert max(network.sizes) <= 8


def saved_model(path: Path, shape: tuple[int | None, int | None, int] = (4, 6, 3), activation: str = "softmax") -> Path:
    keras.utils.set_random_seed(0)
    layers = [keras.Input(shape), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, activation=activation)]
    keras.Sequential(layers).save(path)
    path.with_suffix(".labels.txt").write_text("zero\none\ntwo\n")
    return path


def load(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Classifier:
    for name, value in values.items():
        monkeypatch.setattr(settings, name, str(value))
    model = classifier.load()
    model.warm_up()
    return model


def test_a_model_file_with_a_labels_file_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "own.keras")
    model = load(monkeypatch, MODEL=path)
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)

    results = predicted(model, images)

    plain = keras.saving.load_model(path).predict(images.astype(np.float32), verbose=0)
    for result, expected in zip(results, plain, strict=True):
        assert dict(good(result)) == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "tolerance"), [("XLA", True, 1e-6), ("DTYPE_POLICY", "mixed_bfloat16", 0.02)]
)
def test_faster_computing_gives_the_same_within_its_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: Any, tolerance: float
) -> None:
    monkeypatch.setattr(settings, "BATCH_SIZE", 2)
    path = tmp_path / "own.keras"
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4, 6, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(8, 3, activation="relu"),
              keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, activation="softmax")]  # fmt: skip
    keras.Sequential(layers).save(path)
    path.with_suffix(".labels.txt").write_text("zero\none\ntwo\n")
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    plain = load(monkeypatch, MODEL=path).classify(images)
    monkeypatch.setattr(settings, name, value)

    faster = load(monkeypatch, MODEL=path).classify(images)

    difference = np.abs(np.array(faster, float) - np.array(plain, float)).max()
    assert difference < tolerance
    assert name == "XLA" or difference > 1e-6  # so it does compute in lower precision


def test_a_model_for_any_size_uses_the_size_in_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load(monkeypatch, MODEL=saved_model(tmp_path / "any.keras", (None, None, 3)))

    assert len(predicted(model, batch(1, 2))) == 2


def test_the_labels_setting_overrides_the_labels_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\nc\n")

    model = load(monkeypatch, MODEL=saved_model(tmp_path / "own.keras"), LABELS=tmp_path / "names")

    assert {label for label, _ in good(predicted(model, batch(1))[0])} == {"a", "b", "c"}


def test_labels_may_be_in_any_language_and_from_any_editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "own.keras")
    path.with_suffix(".labels.txt").write_bytes("\ufeffchien\u00a0loup\r\n\u72ac\u3000\r\n\tn02\tfox\r\n".encode())

    model = load(monkeypatch, MODEL=path)

    assert {label for label, _ in good(predicted(model, batch(1))[0])} == {"chien\u00a0loup", "\u72ac", "n02\tfox"}


def missing_label(path: Path) -> None:
    path.with_suffix(".labels.txt").write_text("zero\none\n")


def empty_line(path: Path) -> None:
    path.with_suffix(".labels.txt").write_text("zero\n\ntwo\n")


def binary(path: Path) -> None:
    path.with_suffix(".labels.txt").write_bytes(b"\xff\xfe\x00")


def endless(path: Path) -> None:
    path.with_suffix(".labels.txt").unlink()
    path.with_suffix(".labels.txt").symlink_to("/dev/zero")


def terminal_codes(path: Path) -> None:
    path.with_suffix(".labels.txt").write_text("zero\none\n\x1b[31mtwo\n")


def folder(path: Path) -> None:
    path.with_suffix(".labels.txt").unlink()
    path.with_suffix(".labels.txt").mkdir()


def no_labels(path: Path) -> None:
    path.with_suffix(".labels.txt").unlink()


def no_model(path: Path) -> None:
    path.unlink()


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (missing_label, "gives (3,) values per image, but there are 2 labels"),
        (empty_line, "has an empty line"),
        (binary, "can't be read"),
        (endless, "it has more than 10 MB"),
        (terminal_codes, "is not plain text"),
        (folder, "can't be read"),
        (no_labels, "can't be read"),
        (no_model, "does not exist"),
        (damaged, "is cut off or damaged: copy the whole file here again."),
    ],
)
def test_invalid_files_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Callable[[Path], None], line: str
) -> None:
    path = saved_model(tmp_path / "own.keras")
    fault(path)

    with pytest.raises(StartupError) as refusal:
        load(monkeypatch, MODEL=path)

    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_of_another_size_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="set IMAGE_WIDTH=32 and IMAGE_HEIGHT=16 and IMAGE_CHANS=1"):
        load(monkeypatch, MODEL=saved_model(tmp_path / "other.keras", (16, 32, 1)))


@pytest.mark.parametrize("activation", ["linear", "softplus"])
def test_a_model_without_softmax_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, activation: str) -> None:
    path = saved_model(tmp_path / "logits.keras", activation=activation)

    with pytest.raises(StartupError, match="does not give probabilities: end it with a softmax"):
        load(monkeypatch, MODEL=path)


def test_every_classifier_of_keras_is_known() -> None:
    builders = {name for name, _ in inspect.getmembers(keras.applications, inspect.isfunction)}

    known = applications.applications()

    assert set(known) == builders
    assert all(hasattr(module, "preprocess_input") for module in known.values())
    assert {"ResNet50", "VGG16", "MobileNetV3Large", "EfficientNetV2B0", "ConvNeXtTiny", "NASNetMobile"} <= builders


def test_an_unknown_model_is_refused_with_the_known_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"MODEL=ResNet51 is invalid: did you mean ResNet50\?.* VGG16,"):
        load(monkeypatch, MODEL="ResNet51")


@pytest.mark.slow("builds and warms up large networks")
@pytest.mark.parametrize("name", ["ResNet50V2", "DenseNet121"])
def test_a_keras_classifier_gets_its_preprocessing_and_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for side in ("IMAGE_WIDTH", "IMAGE_HEIGHT"):
        monkeypatch.setattr(settings, side, 224)
    monkeypatch.setattr(settings, "BATCH_SIZE", 2)
    keras.utils.set_random_seed(7)
    network = getattr(keras.applications, name)(weights=None)
    network.save_weights(tmp_path / "own.weights.h5")
    (tmp_path / "labels").write_text("\n".join(f"label {i}" for i in range(1000)))
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)

    model = load(monkeypatch, MODEL=name, MODEL_WEIGHTS=tmp_path / "own.weights.h5", LABELS=tmp_path / "labels")
    results = predicted(model, images)

    module = applications.applications()[name]
    plain = network.predict(module.preprocess_input(images.astype(np.float32)), verbose=0)
    for result, probabilities in zip(results, plain, strict=True):
        best = probabilities.argsort()[::-1][:5]
        assert [label for label, _ in good(result)] == [f"label {i}" for i in best]
        assert [probability for _, probability in good(result)] == pytest.approx(probabilities[best], abs=1e-5)


@pytest.mark.slow("builds a large network twice")
@pytest.mark.parametrize(("weights", "said"), [("imagenet", applications.IMAGENET), ("random", None)])
def test_only_a_trained_classifier_says_that_it_recognizes_imagenet(
    monkeypatch: pytest.MonkeyPatch, weights: str, said: str | None
) -> None:
    """Untrained weights stand in for those that Keras would download."""
    for side in ("IMAGE_WIDTH", "IMAGE_HEIGHT"):
        monkeypatch.setattr(settings, side, 224)
    builder = keras.applications.MobileNet
    monkeypatch.setattr(
        keras.applications, "MobileNet", functools.wraps(builder)(lambda weights: builder(weights=None))
    )
    monkeypatch.setattr(applications, "_imagenet_labels", lambda module: [f"class {i}" for i in range(1000)])
    monkeypatch.setattr(settings, "BATCH_SIZE", 1)
    model = load(monkeypatch, MODEL="MobileNet", MODEL_WEIGHTS=weights)

    assert model.about.get("description") == said  # what /readyz says
    assert check.summary(model).endswith(f", {said}" if said else "1000 labels")  # what --check says


def test_weights_of_another_model_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for side in ("IMAGE_WIDTH", "IMAGE_HEIGHT"):
        monkeypatch.setattr(settings, side, 224)
    other = saved_model(tmp_path / "other.keras")
    keras.saving.load_model(other).save_weights(tmp_path / "other.weights.h5")

    with pytest.raises(StartupError, match="does not fit MODEL=MobileNetV2"):
        load(monkeypatch, MODEL="MobileNetV2", MODEL_WEIGHTS=tmp_path / "other.weights.h5")


WITHOUT_A_HOME = (
    "import pwd, sys; pwd.getpwuid = lambda _: {}[0]; import run_model_server; sys.exit(run_model_server.main())"
)


@pytest.mark.slow("imports Keras in new processes")
def test_without_internet_the_error_says_which_file_to_put_where(tmp_path: Path) -> None:
    """A proxy that does not exist simulates missing internet. The user has no home, as in a container."""
    environment = {**os.environ, **AS_INSTALLED, "KERAS_HOME": str(tmp_path), "MODEL": "ResNet50",
                   "https_proxy": "http://127.0.0.1:1"}  # fmt: skip
    environment.pop("HOME", None)

    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_HOME],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert ended.returncode == 2
    line = ended.stderr.strip().splitlines()[-1]
    assert "resnet50_weights_tf_dim_ordering_tf_kernels.h5 can't be downloaded" in line
    assert f"put it in {tmp_path}/models/" in line
    assert "Traceback" not in ended.stderr
