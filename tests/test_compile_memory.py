"""How much memory a model server takes while it compiles its model."""

import os
import subprocess
import sys

import pytest
from harness import ROOT

# Prints the memory that a start takes at most, besides the imports: how many times the size of the model's weights.
CHILD = """
import settings
from model_server import classifier
from model_server.backends import tensorflow
from model_server.keras_import import import_keras

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

import_keras()
before = kilobytes("VmRSS:")
weights, count = [], tensorflow.weights_bytes
tensorflow.weights_bytes = lambda model: weights.append(count(model)) or weights[0]
classifier.load().warm_up()
print((kilobytes("VmHWM:") - before) * 1024 / weights[0])
"""


@pytest.mark.slow("compiles ResNet50")
def test_a_start_takes_at_most_twelve_times_the_memory_of_the_weights() -> None:
    environment = {**os.environ, "MODEL": "ResNet50", "MODEL_WEIGHTS": "random", "BATCH_SIZE": "1"}

    ended = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[-1]) < 12  # TensorFlow itself copies them eight times
