"""The model on each backend of Keras, each in its own process: correct, thread-safe, compiled once."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from harness import ROOT, Missing

from model_server.batching import BATCHES_AT_ONCE

# Serves a small model with all kinds of weights to two threads with 100 batches each, and prints what it observed.
CHILD = """
import importlib.util, json, logging, os, pathlib, sys, tempfile, threading
from concurrent.futures import ThreadPoolExecutor
import settings
from model_server import classifier, keras_import, model_errors
import numpy as np

keras = keras_import.import_keras()

keras.utils.set_random_seed(0)
layers = keras.layers
model = keras.Sequential([
    keras.Input((12, 16, 3)), layers.Rescaling(1 / 255), layers.RandomFlip(), layers.Conv2D(4, 3),
    layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5), layers.Flatten(),
    layers.Dense(5, activation="softmax")])
random = np.random.default_rng(1)
for variable in model.variables:
    if variable.dtype == "float32" and len(variable.shape) == 1:
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    elif variable.dtype == "float32":
        variable.assign(random.normal(0, 2 / np.sqrt(np.prod(variable.shape[:-1])), variable.shape))
path = pathlib.Path(tempfile.mkdtemp()) / "own.keras"
model.save(path)
path.with_suffix(".labels.txt").write_text("a\\nb\\nc\\nd\\ne\\n")
levels = np.random.default_rng(2).integers(0, 256, (64, 1, 1, 3), dtype=np.uint8)
images = np.tile(levels, (1, 12, 16, 1))
plain = keras.saving.load_model(path).predict(images.astype(np.float32), verbose=0)

settings.MODEL = str(path)
served = classifier.load()
served.warm_up()
fuser, threads = False, set()
if keras.backend.backend() == "torch":
    import torch
    fuser = torch._C._jit_texpr_fuser_enabled()
    network = served._network
    predict = network._predict
    network._predict = lambda *given: threads.add(threading.get_ident()) or predict(*given)
    network.predict_on_batch(images[:3])  # a new size
    network._predict = predict
served.sizes.seconds = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}  # so that all sizes are used, however busy this machine is
keras_calls, logged = [], []
compute = layers.Dense.call
layers.Dense.call = lambda *args, **named: keras_calls.append(1) or compute(*args, **named)
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger().addHandler(handler)

def difference(thread):
    random, worst = np.random.default_rng(thread), 0.0
    for _ in range(100):
        chosen = random.integers(0, 64, random.integers(1, 9))
        worst = max(worst, np.abs(np.array(served.classify(images[chosen]), float) - plain[chosen]).max())
    return float(worst)

unused = [name for name in ("matplotlib", "sklearn") if name in sys.modules]
hidden = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
with ThreadPoolExecutor(2) as pool:
    differences = list(pool.map(difference, range(2)))
try:
    np.asarray(keras.ops.zeros((1 << 46,)))
except Exception as error:
    out_of_memory = model_errors.out_of_memory(error)
print(json.dumps({"differences": differences, "logged": logged, "keras_calls": len(keras_calls),
                  "spread": float(np.ptp(plain, axis=0).max()), "out_of_memory": out_of_memory,
                  "unused": unused, "hidden": hidden, "fuser": fuser, "threads": len(threads),
                  "preallocate": os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]}))
"""


@cache
def seen_with(backend: str) -> dict[str, Any]:
    """Return what CHILD prints with this backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "BATCH_SIZE": "8"}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return seen


TORCH, JAX = (pytest.param(name, marks=pytest.mark.backends) for name in ("torch", "jax"))


@pytest.fixture(params=["tensorflow", TORCH, JAX])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    if importlib.util.find_spec(request.param) is None:
        raise Missing(f"{request.param} is not installed")
    return seen_with(request.param)


def test_two_threads_get_the_answers_of_plain_keras(seen: dict[str, Any]) -> None:
    assert seen["logged"] == []  # a failed batch would be logged and computed again in halves
    assert max(seen["differences"]) < 1e-4
    assert seen["spread"] > 0.1  # so that mixed-up images would be noticed


def test_after_warm_up_nothing_is_traced_or_compiled(seen: dict[str, Any]) -> None:
    assert seen["keras_calls"] == 0


@pytest.mark.parametrize("seen", [TORCH], indirect=True)
def test_torchscripts_fuser_is_off_on_a_cpu(seen: dict[str, Any]) -> None:
    assert seen["fuser"] is False  # its effect can't be measured here: it slows down only models with dozens of layers


@pytest.mark.parametrize("seen", [TORCH], indirect=True)
def test_each_torch_thread_is_warmed_up_for_a_new_size(seen: dict[str, Any]) -> None:
    assert seen["threads"] == BATCHES_AT_ONCE


def test_the_backends_out_of_memory_error_is_recognized(seen: dict[str, Any]) -> None:
    assert seen["out_of_memory"] is True


def test_jax_does_not_preallocate_a_gpu(seen: dict[str, Any]) -> None:
    assert seen["preallocate"] == "false"


def test_keras_imports_no_packages_for_training_and_plots(seen: dict[str, Any]) -> None:
    assert seen["unused"] == []
    assert seen["hidden"] == []  # they can still be imported later


@pytest.mark.parametrize("backend", ["openvino", "nonsense"])
def test_the_model_server_exits_with_2_if_its_backend_is_unavailable(backend: str) -> None:
    ended = subprocess.run(
        [sys.executable, "run_model_server.py", "--check"],
        cwd=ROOT, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 2, ended.stderr
    assert f"KERAS_BACKEND={backend}" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


NOISY = """
import os, sys
from model_server.keras_import import without_noise
with without_noise():
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
    os.write(2, b"I0000 00:00:1.2 3 cudart_stub.cc:31] Could not find cuda drivers on your machine\\n")
    os.write(2, b"E0000 00:00:1.2 3 real.cc:1] something is broken\\n")
    print("ImportError: libfoo", file=sys.stderr)
    {end}
os.write(2, b"I0000 after the import\\n")
"""


@pytest.mark.parametrize(("end", "code", "after"), [("pass", 0, ["I0000 after the import"]),
                                                    ("os.abort()", -signal.SIGABRT, [])])  # fmt: skip
def test_only_noise_is_filtered_even_if_the_import_aborts(end: str, code: int, after: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NOISY.format(end=end)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == code
    assert ended.stderr.splitlines() == [
        "E0000 00:00:1.2 3 real.cc:1] something is broken",
        "ImportError: libfoo",
        *after,
    ]
