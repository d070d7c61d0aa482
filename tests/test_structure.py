"""The rule of who may import whom: the web without Keras, the model side without Flask."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

OURS = {
    "access",
    "health",
    "pages",
    "settings",
    "helpers",
    "heif_checks",
    "image_checks",
    "image_formats",
    "image_preparation",
    "model_file",
    "image_queue",
    "turns",
    "classifier",
    "run_web_server",
    "run_model_server",
    "server_metrics",
    "web_metrics",
}
KERAS = {"keras", "tensorflow", "torch", "jax", "classifier"}


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


@pytest.mark.parametrize(
    ("module", "may_import"),
    [("settings", set()), ("helpers", set()), ("image_checks", set()),
     ("heif_checks", {"image_checks"}), ("image_formats", {"heif_checks", "image_checks"}),
     ("image_preparation", {"settings", "helpers", "heif_checks", "image_checks", "image_formats"}),
     ("turns", {"settings", "helpers"}), ("model_file", {"helpers"}), ("pages", set()),
     ("health", {"settings", "helpers", "image_queue"}),
     ("access", {"settings", "helpers", "image_queue"}), ("image_queue", {"settings", "helpers"}),
     ("web_metrics", {"settings", "helpers", "image_queue"}), ("server_metrics", {"settings", "helpers"}),
     ("run_model_server", {"settings", "helpers", "image_queue", "server_metrics"})],
)  # fmt: skip
def test_each_module_imports_only_those_below_it(module: str, may_import: set[str]) -> None:
    assert imported_by(f"import {module}") & OURS == may_import | {module}


@pytest.mark.parametrize("client", ["simple_request", "stress_test"])
def test_the_clients_stand_alone(client: str) -> None:
    assert not imported_by(f"import {client}") & OURS
