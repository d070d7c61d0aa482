"""bin/test and hooks.py: which tests they leave out, and that they say so."""

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import hooks
import pytest
from harness import ROOT

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_quick(number, worker_id, record_property):
    record_property("figures", f"by {worker_id}")

@pytest.mark.slow("counts to a million")
def test_slow():
    pass

@pytest.mark.parametrize("kind", ["one", "two"])
@pytest.mark.fault
def test_faults(kind):
    pass
"""


def test_quick_leaves_out_exactly_the_registered_markers() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    registered = [line.split(":")[0].split("(")[0] for line in options["markers"]]

    assert sorted(registered) == sorted(hooks.SLOW)


def test_contributing_has_a_row_for_every_marker() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    assert [name for name in hooks.SLOW if f"| `{name}` |" not in text] == []


def test_help_names_bin_test_with_and_without_all() -> None:
    printed = subprocess.check_output([ROOT / "bin/test", "--help"], text=True, timeout=60)

    assert "\n  bin/test  " in printed
    assert "\n  bin/test --all " in printed


def test_the_closing_line_counts_each_kind() -> None:
    line = hooks.closing_line(Counter(slow=2, fault=28))

    assert line == "* Left out 30 tests (28 fault, 2 slow); bin/test --all runs them"
    assert hooks.closing_line(Counter()) == "* Left out no test"


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one", "two"])
def test_a_quick_run_ends_with_what_it_left_out(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-p", "hooks", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--quick", *workers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}

    printed = subprocess.check_output(
        [sys.executable, "-m", "pytest", *options, tmp_path], cwd=tmp_path, env=environment, text=True, timeout=240
    )

    assert "4 passed" in printed
    by = re.findall(r"^test_quick\[\d\]: by (\w+)$", printed, re.MULTILINE)
    assert len(by) == 4
    assert len(set(by)) == 1  # the tests of a file run on one worker
    assert printed.splitlines()[-1] == "* Left out 3 tests (2 fault, 1 slow); bin/test --all runs them"
