"""bin/audit, which reports known vulnerabilities of the packages."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from harness import ROOT

AUDITS = {
    "none": ("echo No known vulnerabilities found >&2", 0, "No known vulnerability in "),
    "some": (
        "echo Name Version; echo Found 2 known vulnerabilities in 1 package >&2; exit 1",
        1,
        "in 1 package: raise the versions",
    ),
    "offline": (
        "echo Traceback >&2; echo Failed to resolve it >&2; exit 1",
        1,
        "(Failed to resolve it): is there a network?",
    ),
    "skipped": ("echo ERROR: flask could not be audited >&2; exit 1", 1, "flask could not be audited"),
}


@pytest.mark.parametrize(("script", "code", "message"), AUDITS.values(), ids=AUDITS.keys())
def test_audit_reports_its_result_in_one_line(tmp_path: Path, script: str, code: int, message: str) -> None:
    """A stub replaces pip-audit, since real results need a network and change daily."""
    [version] = re.findall(r"pip-audit==(\S+)", (ROOT / "bin/audit").read_text())
    stub = tmp_path / "bin/pip-audit"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo pip-audit {version} && exit\n{script}\n')
    stub.chmod(0o755)

    ended = subprocess.run(
        [str(ROOT / "bin/audit")],
        env={**os.environ, "AUDIT_VENV": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == code
    line = (ended.stderr if code else ended.stdout).splitlines()
    assert len(line) == 1
    assert message in line[0]
