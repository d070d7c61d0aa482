"""The rule of who may import whom: the web without Keras, the model side without Flask."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

# What each module may import of ours, and with it what those import.
LAYERS: dict[str, set[str]] = {
    "settings": set(),
    "helpers": set(),
    "redis_connection": {"settings", "helpers"},
    "image_queue": {"redis_connection"},
    # the web
    "image_checks": set(),
    "heif_checks": {"image_checks"},
    "image_formats": {"heif_checks"},
    "image_preparation": {"settings", "helpers", "image_formats"},
    "turns": {"settings", "helpers"},
    "pages": set(),
    "cors": {"settings"},
    "access": {"image_queue"},
    "storage": {"settings", "helpers"},
    "uploads": {"image_preparation", "storage"},
    "health": {"image_queue", "storage"},
    "inference_protocol": {"health", "access"},
    "web_metrics": {"image_queue"},
    # the model server
    "model_file": {"helpers"},
    "model_checks": {"settings", "model_file"},
    "keras2_files": set(),
    "import_noise": set(),
    "backends": {"settings", "helpers", "import_noise"},
    "server_metrics": {"settings", "helpers"},
    "run_model_server": {"image_queue", "image_preparation", "server_metrics", "model_checks"},
}
OURS = {*LAYERS, "model_loading", "classifier", "run_web_server"}
KERAS = {"keras", "tensorflow", "torch", "jax", "classifier", "backends"}


def imported_by(statement: str) -> set[str]:
    """The modules that are there after `statement` in a new interpreter."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=120)
    return set(printed.decode().split())


def test_the_web_never_imports_keras() -> None:
    modules = imported_by("import run_web_server")

    assert "flask" in modules
    assert not modules & (KERAS | {"run_model_server"})


def test_the_model_side_never_imports_flask() -> None:
    modules = imported_by("import run_model_server, classifier")

    assert "keras" in modules
    assert not modules & {"flask", "run_web_server"}


def below(module: str) -> set[str]:
    """What a module may import, and all below that."""
    return LAYERS[module].union(*map(below, LAYERS[module]))


@pytest.mark.parametrize("module", LAYERS)
def test_each_module_imports_only_those_below_it(module: str) -> None:
    assert imported_by(f"import {module}") & OURS == below(module) | {module}


@pytest.mark.parametrize("client", ["simple_request", "stress_test"])
def test_the_clients_stand_alone(client: str) -> None:
    assert not imported_by(f"import {client}") & OURS
