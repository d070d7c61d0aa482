"""Measure speed and accuracy with a DTYPE_POLICY and XLA; print a line of JSON.

    precision.py POLICY XLA    for example precision.py mixed_bfloat16 False; the model comes from the environment

Accuracy is measured for models/digits.keras only, on 450 held-out digits in four presentations each. Other models are
untrained here, so their probabilities mean nothing.
"""

import json
import sys
from pathlib import Path

import numpy as np
from alone import median_seconds
from system import ROOT

sys.path.append(str(ROOT))
sys.path.append(str(ROOT / "models"))

import settings
from helpers import Pixels
from model_server import classifier


def load(policy: str, xla: bool) -> classifier.Classifier:
    """Return the settings' model with this policy, warmed up."""
    settings.DTYPE_POLICY, settings.XLA = policy, xla
    loaded = classifier.load()
    loaded.warm_up()
    return loaded


def probabilities(model: classifier.Classifier, pixels: Pixels) -> classifier.Probabilities:
    """Return the probabilities (n, classes) for `pixels` (n, height, width, channels)."""
    rows = [row for start in range(0, len(pixels), 90) for row in model.classify(pixels[start : start + 90])]
    return np.array(rows, float)


def accuracy(model: classifier.Classifier) -> dict[str, float]:
    """Return the share of digits recognized, and the largest difference of a probability from float32."""
    from train_digits import PRESENTATIONS, SEED, render, served, split  # noqa: PLC0415 - needs scikit-learn

    _, (digits, classes) = split()
    rng = np.random.default_rng(SEED + 1)
    pixels = np.stack([served(render(digit, name, rng)) for name in PRESENTATIONS for digit in digits])
    found, plain = probabilities(model, pixels), probabilities(load("float32", xla=False), pixels)
    right = found.argmax(1) == np.tile(classes, len(PRESENTATIONS))
    return {"right": float(right.mean()), "difference": float(np.abs(found - plain).max())}


def main() -> None:
    """Measure the speed, and the accuracy of models/digits.keras."""
    policy, xla = sys.argv[1:]
    model = load(policy, xla == "True")
    batch = np.random.default_rng(0).integers(0, 256, (model.batch_size, *model.shape)).astype(np.uint8)
    figures = {"per_s": model.batch_size / median_seconds(lambda: model.classify(batch))}
    if Path(settings.MODEL) == ROOT / "models/digits.keras":
        figures |= accuracy(model)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
