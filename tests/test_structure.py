"""The rule of who may import whom: the web without Keras, the model side without Flask."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

# What each module may import of ours, and with it what those import. A package's name stands for all its modules.
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


def imported_by(statement: str) -> set[str]:
    """The modules that are there after `statement` in a new interpreter."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=120)
    return set(printed.decode().split())


def test_the_web_never_imports_keras() -> None:
    modules = imported_by("import run_web_server")

    assert "flask" in modules
    assert not modules & (KERAS | {"run_model_server", "model_server"})


def test_the_model_side_never_imports_flask() -> None:
    modules = imported_by("import run_model_server, model_server.applications, model_server.model_loading")

    assert "keras" in modules
    assert not modules & {"flask", "run_web_server"}


def modules_of(room: str) -> list[str]:
    """The modules of a package, or the one of a file."""
    paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py")
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def below(room: str) -> set[str]:
    """What a room may import, and all below that."""
    return LAYERS[room].union(*map(below, LAYERS[room]))


def test_every_python_file_of_the_product_is_in_a_room() -> None:
    files = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}

    assert files == {*LAYERS, "simple_request", "stress_test"}


@pytest.mark.parametrize("module", [module for room in LAYERS for module in modules_of(room)])
def test_each_module_imports_only_those_below_it(module: str) -> None:
    room = module.partition(".")[0]

    rooms = {name.partition(".")[0] for name in imported_by(f"import {module}")}

    assert rooms & LAYERS.keys() <= below(room) | {room}


@pytest.mark.parametrize("client", ["simple_request", "stress_test"])
def test_the_clients_stand_alone(client: str) -> None:
    assert not {name.partition(".")[0] for name in imported_by(f"import {client}")} & LAYERS.keys()


def test_importing_the_web_leaves_environment_and_threads_alone() -> None:
    code = """
import os, sys, threading, types
sys.modules["mod_wsgi"] = types.ModuleType("mod_wsgi")  # as under Apache
before = dict(os.environ), threading.active_count()
import run_web_server
print((dict(os.environ), threading.active_count()) == before)
"""
    environment = os.environ | {"RATE_LIMIT": "5/minute", "API_KEYS": "a-key-for-this-test-only"}

    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, timeout=60)

    assert printed == "True\n"
