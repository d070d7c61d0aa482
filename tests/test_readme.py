"""What the README says is so."""

import ast
import re

import pytest
from conftest import ROOT

import helpers
import image_queue  # noqa: F401 - its errors count
import run_web_server  # noqa: F401 - its errors too

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_error_of_the_service_is_in_the_table() -> None:
    section = README.split("\n## API\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| (\d+) \| `(\w+)` \|", section, re.MULTILINE))

    kinds: list[type[helpers.ServiceError]] = [helpers.ServiceError, *helpers.ServiceError.__subclasses__()]
    site = (ROOT / "deploy/apache/service.conf").read_text(encoding="utf-8")
    apaches = set(re.findall(r'ErrorDocument (\d+) .*?\\"code\\": \\"(\w+)\\"', site))
    assert len(kinds) >= 8
    assert len(apaches) >= 12
    assert documented == {(str(kind.status), kind.code) for kind in kinds} | apaches


def test_every_test_of_the_faults_table_is_there_and_every_fault_is_in_it() -> None:
    tests = "\n".join(re.findall(r"^def (test_\w+)", (ROOT / "tests/test_faults.py").read_text(), re.MULTILINE))
    others = (ROOT / "tests/test_hostile_input.py").read_text()
    names = re.findall(r"\| `(\w+)` \|$", README.split("\n## When things die\n")[1].split("\n## ")[0], re.MULTILINE)

    for name in names:
        assert tests.count(name) == 1 or re.search(rf"def test_\w*{name}", others), name
    assert sum(name in tests for name in names) == tests.count("test_")


@pytest.mark.parametrize(
    "script",
    [
        "bin/serve",
        "bin/test",
        "bin/audit",
        "simple_request.py",
        "stress_test.py",
        "models/convert_efficientnet_lite.py",
    ],
)
def test_the_commands_that_it_names_are_there(script: str) -> None:
    assert script in README
    assert (ROOT / script).is_file()


def test_every_file_of_its_table_is_there() -> None:
    for names in re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", README.split("## How it works")[1], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert (ROOT / name).exists(), name


def test_the_names_of_the_tutorial_are_kept() -> None:
    kept = {
        "run_web_server.py": {"homepage", "predict", "prepare_image"},
        "run_model_server.py": {"classify_process"},
        "helpers.py": {"base64_encode_image", "base64_decode_image"},
    }
    for file, names in kept.items():
        nodes = list(ast.walk(ast.parse((ROOT / file).read_text())))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert names <= functions | imported
