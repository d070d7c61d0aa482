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
    ("API_KEYS", "too-short", "16 or more letters"),
    ("API_KEYS", "long-enough-but-with-\u00fc", "16 or more letters"),
    ("API_KEYS", "the-key-of-2026-is,", "16 or more letters"),
    ("API_KEYS", "the-key-of-2026-is, the-key-of-2027-is", "16 or more letters"),
    ("RATE_LIMIT", "often", "such as 100/minute"),
    ("RATE_LIMIT", "0/minute", "such as 100/minute"),
    ("RATE_LIMIT", "5/fortnight", "such as 100/minute"),
    ("RATE_LIMIT", "5/minute;", "such as 100/minute"),
    ("RATE_LIMIT", "5/9999999999999 years", "up to a year"),
    ("MAX_DECODE_BYTES", "1000", "from 10000000"),
    ("IMAGE_FORMATS", "JPEG,PDF", "one or more of JPEG,PNG"),
    ("IMAGE_FORMATS", "", "one or more of JPEG,PNG"),
    ("IMAGE_FORMATS", "JPEG PNG", "one or more of JPEG,PNG"),
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
    shown = "***" if name == "API_KEYS" else value
    assert ended.stderr.startswith(f"{name}={shown} makes no sense: it must be ")
    assert allowed in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_stops_with_that_one_line(program: str) -> None:
    ended = run(program, env={"BATCH_SIZE": "0"})

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "BATCH_SIZE=0 makes no sense: it must be a whole number from 1 to 1024.\n"


def test_a_password_in_a_senseless_url_is_not_shown() -> None:
    for url in ("http://user:secret@host", "http://host?password=secret", "http://user:a@secret@host"):
        assert "secret" not in run("-c", "import settings", env={"REDIS_URL": url}).stderr


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:a/secret@host",
        "redis://user:secret@host:port",
        "redis://host?sock=secret",
        "redis://host?socket_timeout=secret",
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_redis_url_that_can_not_be_read_is_refused_in_one_line_too(program: str, url: str) -> None:
    ended = run(program, env={"REDIS_URL": url})

    assert ended.returncode == 2
    assert ended.stderr.startswith("REDIS_URL=redis://")
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_a_key_in_senseless_keys_is_not_shown() -> None:
    assert "the-key" not in run("-c", "import settings", env={"API_KEYS": "the-key-of-2026-is,short"}).stderr


def test_a_shorter_request_timeout_needs_no_other_setting() -> None:
    assert run("-c", "import settings; print(settings.REDIS_TIMEOUT)", env={"REQUEST_TIMEOUT": "4"}).stdout == "2.0\n"


def test_the_file_counts_where_the_environment_is_silent(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("TOP=3\nBATCH_SIZE=8\n")

    printed = run(
        "-c", "import settings; print(settings.TOP, settings.BATCH_SIZE)", cwd=tmp_path, env={"BATCH_SIZE": "16"}
    ).stdout

    assert printed == "3 16\n"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"TOP=3\nBATCH_SIZE 8 secret\n", ".env, line 2, makes no sense: it must be NAME=value, or begin with #."),
        (b"\xff\xfe\x00", ".env can't be read"),
        (None, ".env can't be read"),
    ],
    ids=["no equals sign", "not text", "a folder"],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, program: str, content: bytes | None, line: str
) -> None:
    for name in (*(path.name for path in ROOT.glob("*.py")), *PROGRAMS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    file = tmp_path / ".env"
    file.mkdir() if content is None else file.write_bytes(content)

    ended = run(program, cwd=tmp_path, env={})

    assert ended.returncode == 2
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_comments_and_empty_lines_in_the_file_are_passed_over(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("# ours\n\n  export TOP = 3  # few\n")

    assert run("-c", "import settings; print(settings.TOP)", cwd=tmp_path, env={}).stdout == "3\n"


def test_a_value_of_several_lines_and_signs_for_the_terminal_is_shown_in_one() -> None:
    ended = run("-c", "import settings", env={"BATCH_SIZE": "8\n\x1b[31mERROR" + "x" * 10_000})

    assert ended.stderr.startswith("BATCH_SIZE=8??[31mERRORxxx")
    assert ended.stderr.count("\n") == 1
    assert len(ended.stderr) < 500
