"""Settings: where they are read from, the error for an invalid one, and the documents generated from them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PATH, ROOT

import settings

sys.path.insert(0, str(ROOT / "docs"))

from generate_settings import FILES

PROGRAMS = ["run_web_server.py", "run_model_server.py", "deploy/serve.py"]
INVALID = [
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
    ("IMAGE_CHANS", "2", "3 (RGB) or 1 (gray)"),
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
    ("CORS_ORIGINS", "app.example", "such as https://app.example"),
    ("CORS_ORIGINS", "https://app.example/", "such as https://app.example"),
    ("CORS_ORIGINS", "https://app.example/app", "without a path"),
    ("CORS_ORIGINS", "https://App.example", "lower case"),
    ("CORS_ORIGINS", "https://*.app.example", "such as https://app.example"),
    ("CORS_ORIGINS", "https://app.example:443", ":443"),
    ("CORS_ORIGINS", "http://app.example:80,https://app.example", ":80"),
    ("CORS_ORIGINS", "https://app.example, https://other.example", "separated by commas"),
    ("CORS_ORIGINS", "https://app.example,", "separated by commas"),
    ("CORS_ORIGINS", "*,https://app.example", "* or origins"),
    ("CORS_ORIGINS", "null", "* or origins"),
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


@pytest.mark.parametrize(("name", "value", "allowed"), INVALID)
def test_invalid_value_is_reported_with_what_is_allowed(name: str, value: str, allowed: str) -> None:
    ended = run("-c", "import settings", env={name: value})

    assert ended.returncode == 2
    shown = "***" if name == "API_KEYS" else value
    assert ended.stderr.startswith(f"{name}={shown} is invalid: it must be ")
    assert allowed in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_stops_with_a_line_about_an_invalid_value(program: str) -> None:
    ended = run(program, env={"BATCH_SIZE": "0"})

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "BATCH_SIZE=0 is invalid: it must be a whole number from 1 to 1024.\n"


def test_password_in_an_invalid_url_is_not_shown() -> None:
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
def test_unreadable_redis_url_is_refused_in_one_line(program: str, url: str) -> None:
    ended = run(program, env={"REDIS_URL": url})

    assert ended.returncode == 2
    assert ended.stderr.startswith("REDIS_URL=redis://")
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_key_in_invalid_api_keys_is_not_shown() -> None:
    assert "the-key" not in run("-c", "import settings", env={"API_KEYS": "the-key-of-2026-is,short"}).stderr


def test_shorter_request_timeout_shortens_the_defaults_that_depend_on_it() -> None:
    assert run("-c", "import settings; print(settings.REDIS_TIMEOUT)", env={"REQUEST_TIMEOUT": "4"}).stdout == "2.0\n"


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("TOP=3\nBATCH_SIZE=8\n")

    printed = run(
        "-c", "import settings; print(settings.TOP, settings.BATCH_SIZE)", cwd=tmp_path, env={"BATCH_SIZE": "16"}
    ).stdout

    assert printed == "3 16\n"


def test_model_of_the_file_is_the_default_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL")
    for name in ("settings.py", "helpers.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".env").write_text("MODEL=models/cats.keras\n")

    assert run("-c", "import helpers; print(helpers.default_model())", cwd=tmp_path, env={}).stdout == "cats\n"


def test_file_chooses_the_backend_of_keras_unless_the_environment_does(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("KERAS_BACKEND=jax\nKERAS_HOME=/srv/keras\n")
    show = "import os, settings; print(os.environ['KERAS_BACKEND'], os.environ['KERAS_HOME'])"

    assert run("-c", show, cwd=tmp_path, env={}).stdout == "jax /srv/keras\n"
    assert run("-c", show, cwd=tmp_path, env={"KERAS_BACKEND": "torch"}).stdout == "torch /srv/keras\n"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"TOP=3\nBATCH_SIZE 8 secret\n", ".env, line 2 is invalid: it must be NAME=value, or begin with #."),
        (b"\xff\xfe\x00", ".env can't be read"),
        (None, ".env can't be read"),
    ],
    ids=["no equals sign", "not text", "a folder"],
)
def test_invalid_env_file_is_refused_in_one_line(
    tmp_path: Path, program: str, content: bytes | None, line: str
) -> None:
    for name in (str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "deploy") for path in folder.glob("*.py")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    file = tmp_path / ".env"
    file.mkdir() if content is None else file.write_bytes(content)

    ended = run(program, cwd=tmp_path, env={})

    assert ended.returncode == 2
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_comments_and_empty_lines_in_the_file_are_ignored(tmp_path: Path) -> None:
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("# ours\n\n  export TOP = 3  # few\n")

    assert run("-c", "import settings; print(settings.TOP)", cwd=tmp_path, env={}).stdout == "3\n"


def test_control_characters_in_a_value_are_shown_as_question_marks() -> None:
    ended = run("-c", "import settings", env={"BATCH_SIZE": "8\n\x1b[31mERROR" + "x" * 10_000})

    assert ended.stderr.startswith("BATCH_SIZE=8??[31mERRORxxx")
    assert ended.stderr.count("\n") == 1
    assert len(ended.stderr) < 500


def warnings(folder: Path, content: str, **environment: str) -> list[str]:
    shutil.copy(ROOT / "settings.py", folder)
    (folder / ".env").write_text(content)
    command = [sys.executable, "-c", "import settings; print(*settings.warnings(), sep=chr(10))"]
    bare = {"PATH": PATH, **environment}
    return subprocess.check_output(command, cwd=folder, env=bare, text=True, timeout=60).strip().splitlines()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("API_KEY", "API_KEYS"), ("api_keys", "API_KEYS"), ("APIKEYS", "API_KEYS"), ("API_TOKEN", "API_KEYS"),
        ("RATELIMIT", "RATE_LIMIT"), ("RATE_LIMITS", "RATE_LIMIT"), ("REDIS_PASSWORD", "REDIS_URL"),
        ("REDIS_HOSTNAME", "REDIS_HOST"), ("MAX_UPLOAD_SIZE", "MAX_UPLOAD_BYTES"), ("MAXQUEUE", "MAX_QUEUE"),
        ("BATCHSIZE", "BATCH_SIZE"), ("REQUEST_TIMOUT", "REQUEST_TIMEOUT"), ("MODELL", "MODEL"), ("LABEL", "LABELS"),
    ],
)  # fmt: skip
def test_misspelled_name_in_the_file_is_reported_without_its_value(tmp_path: Path, name: str, meant: str) -> None:
    [line] = warnings(tmp_path, f"TOP=3\n{name}=a-secret-value\n")

    assert line == f"{tmp_path}/.env has {name}, which is not a setting and has no effect: did you mean {meant}?"


def test_names_of_other_programs_are_not_reported(tmp_path: Path) -> None:
    others = [
        "KERAS_BACKEND", "KERAS_HOME", "TF_CPP_MIN_LOG_LEVEL", "TF_XLA_FLAGS", "XLA_FLAGS", "JAX_PLATFORMS",
        "XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED", "OMP_NUM_THREADS", "OWN_MODELS",
        "COMPOSE_PROJECT_NAME", "WEB_PROCESSES", "WEB_THREADS", "HOME", "PATH", "LANG", "TZ", "DEBUG", "HOST", "MODE",
        "http_proxy", "SECRET_KEY", "AWS_ACCESS_KEY_ID", "DATABASE_URL", "FLASK_APP", "LOG_LEVEL", "IMAGE_TAG",
        "REGISTRY", "SERVER_NAME", "HOSTNAME", "OPENAI_API_KEY",
    ]  # fmt: skip

    assert warnings(tmp_path, (ROOT / ".env.example").read_text().replace("# ", "#")) == []
    assert warnings(tmp_path, "".join(f"export {name}=\n" for name in others)) == []


def test_only_clear_misspellings_in_the_environment_are_reported(tmp_path: Path) -> None:
    found = warnings(tmp_path, "", RATELIMIT="1/minute", api_keys="a", API_KEY="b", port="80", MODELS="c")

    assert sorted(line.removeprefix("the environment has ") for line in found) == [
        "RATELIMIT, which is not a setting and has no effect: did you mean RATE_LIMIT?",
        "api_keys, which is not a setting and has no effect: did you mean API_KEYS?",
    ]


def test_similar_name_beside_the_real_one_is_not_reported(tmp_path: Path) -> None:
    """The file may also hold a client's API_KEY."""
    assert warnings(tmp_path, "API_KEY=the-key-of-the-client\nAPI_KEYS=the-key-of-the-client\n") == []
    assert len(warnings(tmp_path, "API_KEY=the-key-of-the-client\nAPI_KEYS=\n")) == 1


def test_name_that_the_file_sets_twice_is_reported(tmp_path: Path) -> None:
    [line] = warnings(tmp_path, "TOP=3\n# TOP=4\nMODEL=ResNet50\nexport TOP = 5\n")

    assert line == f"{tmp_path}/.env has TOP in lines 1 and 4: the last one counts."


@pytest.mark.parametrize(
    "start",
    [
        ("-c", "import runpy; runpy.run_path('keras_rest_api_app.wsgi')"),
        ("run_model_server.py", "--model", "no/such.keras"),
    ],
    ids=["web", "model server"],
)
def test_both_programs_log_the_warnings_when_they_start(start: tuple[str, ...]) -> None:
    ended = run(*start, env={"RATELIMIT": "1/minute", "LOG_FORMAT": "json"})

    [line] = [line for line in ended.stderr.splitlines() if "RATELIMIT" in line]
    assert json.loads(line)["level"] == "WARNING"
    assert "did you mean RATE_LIMIT?" in line


@pytest.mark.parametrize("name", FILES)
def test_generated_document_matches_the_settings(name: str) -> None:
    assert (ROOT / name).read_text() == FILES[name](), "run .venv/bin/python docs/generate_settings.py"


def test_every_setting_is_declared_with_its_name_and_default() -> None:
    code = "import settings, json; print(json.dumps({k: v for k, v in vars(settings).items() if k.isupper()}))"
    values = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env={"PATH": PATH}, timeout=60))
    declared = {setting.name: str(setting.default) for section in settings.sections.values() for setting in section}

    assert declared == {
        name: "" if value is None else str(value).removesuffix(".0").replace("False", "false")
        for name, value in values.items()
        if name != "EXIT_BAD_SETTING"
    }


def test_env_example_has_every_setting_of_the_programs_commented_out(tmp_path: Path) -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = {setting.name for section in settings.sections.values() for setting in section}

    assert all(line.startswith("#") or not line for line in lines)
    assert {"# TOP=", "# BATCH_SIZE=32", "# MODEL=ResNet50", "# REDIS_URL=", "# API_KEYS="} <= set(lines)
    settable = {line[2:].split("=")[0] for line in lines if re.match(r"# [A-Z_]+=", line)}
    assert settable == names - {"PORT", "MODEL_SERVERS"}
    # And each line is valid once its # is removed.
    shutil.copy(ROOT / "settings.py", tmp_path)
    (tmp_path / ".env").write_text("\n".join(line[2:] for line in lines if re.match(r"# [A-Z_]+=", line)))
    assert run("-c", "import settings", cwd=tmp_path, env={}).stderr == ""
