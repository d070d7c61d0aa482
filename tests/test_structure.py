"""Which module may import which, and that an import starts nothing."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from harness import AS_INSTALLED, ROOT

# What each module may import of ours directly; it may import what those import, too. A package stands for its modules.
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

# Imports what its argument names; prints what that changed. NumPy comes first because it starts threads for BLAS, and
# mod_wsgi is there because some modules do more below Apache.
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


def rooms(module: str) -> set[str]:
    """Return the top-level names of all that a module imports."""
    return {name.partition(".")[0] for name in imported(module)["modules"]}


def test_the_web_never_imports_keras() -> None:
    assert "flask" in rooms("run_web_server")
    assert not rooms("run_web_server") & (KERAS | {"run_model_server", "model_server"})


@pytest.mark.parametrize("module", ["run_model_server", "model_server.applications", "model_server.model_loading"])
def test_the_model_side_never_imports_flask(module: str) -> None:
    assert not rooms(module) & {"flask", "run_web_server"}


def test_loading_a_model_imports_keras() -> None:
    assert "keras" in rooms("model_server.model_loading")


def modules_of(room: str) -> list[str]:
    """Return the modules of a package, or the one of a file."""
    paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


MODULES = [module for room in LAYERS for module in modules_of(room)]


def below(room: str) -> set[str]:
    """Return what a room may import, directly or not."""
    return LAYERS[room].union(*map(below, LAYERS[room]))


def test_every_python_file_of_the_product_is_in_a_room() -> None:
    files = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}

    assert files == {*LAYERS, "simple_request", "stress_test"}


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_those_below_it(module: str) -> None:
    room = module.partition(".")[0]

    assert rooms(module) & LAYERS.keys() <= below(room) | {room}


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
    assert not rooms(client) & LAYERS.keys()
