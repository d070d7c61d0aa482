"""The preprocessing that a model's JSON file names, compared with that of Keras."""

import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import requests
from harness import AS_INSTALLED, ROOT, Missing, ready, run_service
from own_model import LABELS, SMALL, photos, pixels_of, save_model
from PIL import Image

PLAIN: dict[str, Callable[[Any], Any]] = {
    "none": lambda pixels: pixels,
    "scale": lambda pixels: pixels / 255,
    **{
        mode: partial(keras.applications.imagenet_utils.preprocess_input, mode=mode)
        for mode in ("tf", "torch", "caffe")
    },
}


def answers_of(paths: list[Path], backend: str, dtype: str, images: Any) -> Any:
    """The probabilities that each model gives for the images, computed twice, in a process with this backend."""
    np.save(paths[0].with_suffix(".npy"), images)
    code = (
        "import sys, json, numpy as np, settings\nfrom model_server import classifier\n"
        "images = np.load(sys.argv[1])\n"
        "for settings.MODEL in sys.argv[2:]:\n"
        "    model = classifier.load(); model.warm_up()\n"
        "    print(json.dumps([[each.tolist() for each in model.classify(images)] for _ in range(2)]))"
    )
    environment = {**os.environ, **AS_INSTALLED, "KERAS_BACKEND": backend, "IMAGE_DTYPE": dtype, "BATCH_SIZE": "4"}
    command = [sys.executable, "-c", code, str(paths[0].with_suffix(".npy")), *map(str, paths)]
    printed = subprocess.check_output(command, cwd=ROOT, env=environment, timeout=250)
    return [np.array(json.loads(line)) for line in printed.splitlines()]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("tensorflow", "uint8"),
        pytest.param("torch", "float32", marks=pytest.mark.backends),
        pytest.param("jax", "uint8", marks=pytest.mark.backends),
    ],
)
def test_every_preprocessing_equals_that_of_keras(tmp_path: Path, backend: str, dtype: str) -> None:
    """The pixels are not modified either: a batch that fails is computed again in halves."""
    if importlib.util.find_spec(backend) is None:
        raise Missing(f"{backend} is not installed")
    paths = [
        save_model(tmp_path / f"{mode}.keras", (20, 30, 3), {"labels": LABELS, "preprocessing": mode}) for mode in PLAIN
    ]
    images = pixels_of((20, 30, 3), 5).astype(dtype)

    answers = answers_of(paths, backend, dtype, images)

    model = keras.saving.load_model(paths[0])
    plain = [model.predict(prepare(images.astype(np.float32)), verbose=0) for prepare in PLAIN.values()]
    for mode, twice, expected in zip(PLAIN, answers, plain, strict=True):
        assert twice[0] == pytest.approx(expected, abs=1e-4), mode
        assert twice[1] == pytest.approx(expected, abs=1e-4), mode
    for one, other in itertools.combinations(plain, 2):
        assert np.abs(one - other).max() > 1e-3  # so that a mix-up would be noticed


def plain_answers(path: Path, images: list[bytes], prepare: Callable[[Any], Any]) -> Any:
    """The probabilities that plain Keras gives for these files."""
    opened = [Image.open(io.BytesIO(data)).convert("L").resize((96, 64), Image.Resampling.BICUBIC) for data in images]
    pixels = np.stack([np.asarray(each, np.float32)[:, :, np.newaxis] for each in opened])
    return keras.saving.load_model(path).predict(prepare(pixels), verbose=0)


@pytest.mark.slow("starts both programs")
def test_a_gray_model_of_another_size_needs_only_its_path(redis_port: int, tmp_path: Path) -> None:
    facts = {"labels": LABELS, "preprocessing": "scale", "top": 3}
    path = save_model(tmp_path / "gray.keras", facts=facts, gain=5)
    images = photos(12)
    with run_service(tmp_path, MODEL=str(path)) as service:
        with ThreadPoolExecutor(12) as pool:
            answered = list(pool.map(service.predictions, images))
        metadata = requests.get(f"{service.url}/v2/models/gray", timeout=10).json()
        [server] = ready(service.url)["model_servers"].values()

    plain = plain_answers(path, images, PLAIN["scale"])
    for got, expected in zip(answered, plain, strict=True):
        assert {each["label"]: each["probability"] for each in got} == pytest.approx(
            dict(zip(LABELS, map(float, expected), strict=True)), abs=1e-4
        )
    assert np.ptp(plain, axis=0).max() > 1e-2  # so that a mix-up would be noticed
    assert [each["shape"] for each in metadata["inputs"] if each["name"] == "pixels"] == [[-1, *SMALL]]
    assert server["shape"] == list(SMALL)
