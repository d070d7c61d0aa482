"""Which module may import which, and that an import starts nothing."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from harness import AS_INSTALLED, ROOT

# What each of our top-level modules and packages may import: those in its set, and what those may import.
LAYERS: dict[str, set[str]] = {
    "settings": set(),
    "helpers": {"settings"},
    "image_queue": {"helpers"},
    "web": {"image_queue"},
    "model_server": {"image_queue"},
    "run_web_server": {"web"},
    "run_model_server": {"model_server", "web"},
}
KERAS = {"keras", "tensorflow", "torch", "jax"}

# Imports the module that its argument names; prints what that changed. NumPy comes first because it starts threads for
# BLAS. mod_wsgi is faked because some modules do more under Apache.
IMPORT = """
import gc, importlib, json, os, sys
from concurrent.futures import Executor
import numpy, redis
sys.modules["mod_wsgi"] = sys
def threads(): return len(os.listdir("/proc/self/task"))
environment, before = dict(os.environ), threads()
importlib.import_module(sys.argv[1])
print(json.dumps({
    "modules": [name for name, module in sys.modules.items() if module],
    "variables": dict(os.environ.items() ^ environment.items()),
    "threads": threads() - before,
    "pools": [str(type(o)) for o in gc.get_objects() if issubclass(type(o), (Executor, redis.ConnectionPool))],
}))
"""


@cache
def imported(module: str) -> dict[str, Any]:
    """Return what the import of a module loads and changes in a new interpreter."""
    environment = {**AS_INSTALLED, "PATH": os.environ["PATH"]}
    environment["PYTHONPATH"] += f":{ROOT}"
    command = [sys.executable, "-c", IMPORT, module]
    printed = subprocess.check_output(command, cwd=ROOT, env=environment, timeout=120)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def packages(module: str) -> set[str]:
    """Return the top-level packages that a module imports, directly or not."""
    return {name.partition(".")[0] for name in imported(module)["modules"]}


def test_the_web_never_imports_keras() -> None:
    assert "flask" in packages("run_web_server")
    assert not packages("run_web_server") & (KERAS | {"run_model_server", "model_server"})


@pytest.mark.parametrize("module", ["run_model_server", "model_server.applications", "model_server.model_loading"])
def test_the_model_side_never_imports_flask(module: str) -> None:
    assert not packages(module) & {"flask", "run_web_server"}


def test_loading_a_model_imports_keras() -> None:
    assert "keras" in packages("model_server.model_loading")


def modules_of(layer: str) -> list[str]:
    """Return the modules of a package, or the name of a single module."""
    paths = [ROOT / f"{layer}.py"] if (ROOT / f"{layer}.py").exists() else sorted((ROOT / layer).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


MODULES = [module for layer in LAYERS for module in modules_of(layer)]


def below(layer: str) -> set[str]:
    """Return the layers that a layer may import, directly or not."""
    return LAYERS[layer].union(*map(below, LAYERS[layer]))


def test_every_python_file_of_the_product_is_in_a_layer() -> None:
    files = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}

    assert files == {*LAYERS, "simple_request", "stress_test"}


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_those_below_it(module: str) -> None:
    layer = module.partition(".")[0]

    assert packages(module) & LAYERS.keys() <= below(layer) | {layer}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "settings"])
def test_importing_a_module_starts_nothing_and_sets_no_variable(module: str) -> None:
    found = imported(module)
    keras: dict[str, Any] = {"variables": {}, "threads": 0, "pools": []}
    if "keras" in found["modules"]:
        keras = imported("keras")

    assert found["variables"].items() <= keras["variables"].items()
    assert found["threads"] <= keras["threads"]
    assert found["pools"] == keras["pools"]


@pytest.mark.parametrize("client", ["simple_request", "stress_test"])
def test_the_clients_stand_alone(client: str) -> None:
    assert not packages(client) & LAYERS.keys()
