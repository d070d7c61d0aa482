"""What another way to compute (DTYPE_POLICY, XLA) gains in speed and costs in accuracy: printed as a line of JSON.

    precision.py POLICY XLA    as in precision.py mixed_bfloat16 False; MODEL and the like are read from the environment

models/digits.keras is asked for the 450 held-out digits in each of their four presentations. Other models are untrained
here: their probabilities would say nothing, so that only their speed is measured.
"""

import json
import sys
from pathlib import Path

import numpy as np
from alone import rate
from system import ROOT

sys.path.append(str(ROOT))
sys.path.append(str(ROOT / "models"))

import settings
from helpers import Pixels
from model_server import classifier


def load(policy: str, xla: bool) -> classifier.Classifier:
    """Return the classifier of the settings, computing this way, warmed up."""
    settings.DTYPE_POLICY, settings.XLA = policy, xla
    loaded = classifier.load()
    loaded.warm_up()
    return loaded


def probabilities(model: classifier.Classifier, pixels: Pixels) -> classifier.Probabilities:
    """Return what the model makes of `pixels` (n, height, width, channels): (n, classes)."""
    rows = [row for start in range(0, len(pixels), 90) for row in model.classify(pixels[start : start + 90])]
    return np.array(rows, float)


def accuracy(model: classifier.Classifier) -> dict[str, float]:
    """Return the share of digits that `model` reads right, and how far its probabilities are from float32's at most."""
    from train_digits import PRESENTATIONS, SEED, render, served, split  # noqa: PLC0415 - needs scikit-learn

    _, (digits, classes) = split()
    rng = np.random.default_rng(SEED + 1)
    pixels = np.stack([served(render(digit, name, rng)) for name in PRESENTATIONS for digit in digits])
    found, plain = probabilities(model, pixels), probabilities(load("float32", xla=False), pixels)
    right = found.argmax(1) == np.tile(classes, len(PRESENTATIONS))
    return {"right": float(right.mean()), "difference": float(np.abs(found - plain).max())}


def main() -> None:
    """Measure the way that the command line asks for."""
    policy, xla = sys.argv[1:]
    model = load(policy, xla == "True")
    batch = np.random.default_rng(0).integers(0, 256, (model.batch_size, *model.shape)).astype(np.uint8)
    figures = {"per_s": model.batch_size / rate(lambda: model.classify(batch))}
    if Path(settings.MODEL) == ROOT / "models/digits.keras":
        figures |= accuracy(model)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
