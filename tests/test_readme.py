"""README.md is short, and the tables of the documents match the code."""

import ast
import re
from pathlib import Path

import pytest
from harness import ROOT

import run_web_server  # noqa: F401 - loads every error class
from helpers import ServiceError
from web.errors import status_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("image_queue", "web", "model_server")


def section(document: str, heading: str) -> str:
    """The text below a second-level heading."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_readme_stays_short() -> None:
    assert README.count("\n") <= 142


def subclasses(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in subclasses(child))]


def test_the_errors_table_has_every_error() -> None:
    documented = set(re.findall(r"^\| (\d+) \| `(\w+)` \|", section("api.md", "Errors"), re.MULTILINE))

    kinds = subclasses(ServiceError)
    site = (ROOT / "deploy/apache/service.conf").read_text(encoding="utf-8")
    of_apache = set(re.findall(r'ErrorDocument (\d+) .*?\\"code\\": \\"(\w+)\\"', site))
    assert len(kinds) >= 8
    assert len(of_apache) >= 12
    assert documented == {(str(status_of(kind)), kind.code) for kind in kinds} | of_apache


def test_the_faults_table_has_every_fault_with_its_test() -> None:
    files = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_faults*.py"))
    tests = "\n".join(re.findall(r"^def (test_\w+)", files, re.MULTILINE))
    more = ("balancers", "cells", "hostile_input", "launcher", "serve_models")
    others = "".join((ROOT / f"tests/test_{name}.py").read_text() for name in more)
    tables = section("reliability.md", "Faults and their tests") + section("reliability.md", "Several hosts")
    names = re.findall(r"\| `(\w+)` \|$", tables, re.MULTILINE)

    for name in names:
        assert tests.count(name) == 1 or re.search(rf"def test_\w*{name}", others), name
    assert sum(name in tests for name in set(names)) == tests.count("test_")


def files_of_the_table() -> list[str]:
    rows = re.findall(r"^\| (`[^|]+`) \|", section("architecture.md", "Files"), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_every_file_of_the_table_exists() -> None:
    listed = files_of_the_table()

    assert len(listed) > 20
    assert [name for name in listed if not (ROOT / name).exists()] == []


def test_the_table_has_every_module_of_the_product() -> None:
    files = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    modules = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}

    assert sorted(modules - set(files_of_the_table())) == []


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_every_path_named_in_a_document_exists(document: Path) -> None:
    named = set(re.findall(r"(?<![\w/.-])(?:bin|deploy|benchmarks|tests|models)/[\w./-]*\w", document.read_text()))
    written_by_the_tutorial = {"models/shapes", "models/shapes.keras", "models/shapes.json"}

    assert [name for name in sorted(named - written_by_the_tutorial) if not (ROOT / name).exists()] == []


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
