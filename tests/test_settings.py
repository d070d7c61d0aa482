"""A setting that makes no sense stops each program with one line; one that does is taken from where it should be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATH, ROOT

PROGRAMS = ["run_web_server.py", "run_model_server.py", "deploy/serve.py"]
SENSELESS = [
    ("BATCH_SIZE", "0", "from 1 to 1024"),
    ("BATCH_SIZE", "many", "from 1 to 1024"),
    ("BATCH_SIZE", "", "from 1 to 1024"),
    ("REDIS_PORT", "70000", "from 1 to 65535"),
    ("REDIS_URL", "http://host", "redis://"),
    ("REQUEST_TIMEOUT", "-1", "from 0.5 to 240"),
    ("REQUEST_TIMEOUT", "nan", "from 0.5 to 240"),
    ("REQUEST_TIMEOUT", "inf", "from 0.5 to 240"),
    ("CLIENT_SLEEP", "0", "from 0.01 to 5"),
    ("REDIS_TIMEOUT", "60", "less than REQUEST_TIMEOUT, which is 60"),
    ("IMAGE_CHANS", "2", "3 (RGB) or 1 (grey)"),
    ("IMAGE_DTYPE", "int64", "uint8, float32"),
    ("IMAGE_RESAMPLE", "best", "bicubic"),
    ("IMAGE_QUEUE", "a*b", "letters, digits"),
    ("MODEL", "no such model", "a name in keras.applications"),
    ("MODEL_WEIGHTS", "weights.bin", "imagenet, random"),
]


def run(*command: str, cwd: Path = ROOT, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("name", "value", "allowed"), SENSELESS)
def test_a_senseless_value_is_named_with_what_is_allowed(name: str, value: str, allowed: str) -> None:
    ended = run("-c", "import settings", env={name: value})

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{name}={value} makes no sense: it must be ")
    assert allowed in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_stops_with_that_one_line(program: str) -> None:
    ended = run(program, env={"BATCH_SIZE": "0"})

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "BATCH_SIZE=0 makes no sense: it must be a whole number from 1 to 1024.\n"


def test_a_password_in_a_senseless_url_is_not_shown() -> None:
    assert "secret" not in run("-c", "import settings", env={"REDIS_URL": "http://user:secret@host"}).stderr


def test_a_shorter_request_timeout_needs_no_other_setting() -> None:
    assert run("-c", "import settings; print(settings.REDIS_TIMEOUT)", env={"REQUEST_TIMEOUT": "4"}).stdout == "2.0\n"


def test_the_file_counts_where_the_environment_is_silent(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("TOP=3\nBATCH_SIZE=8\n")

    printed = run(
        "-c", "import settings; print(settings.TOP, settings.BATCH_SIZE)", cwd=tmp_path, env={"BATCH_SIZE": "16"}
    ).stdout

    assert printed == "3 16\n"
