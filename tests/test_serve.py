"""bin/serve: starts everything with one command, says in one line what is in its way, and leaves nothing behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from conftest import PATH, ROOT, free_port, model_servers, need, processes_with, running, variables, wait_until

SERVE = str(ROOT / "bin/serve")
NO_INTERNET = {"https_proxy": "http://127.0.0.1:1"}  # a proxy that nobody runs


@pytest.fixture
def nothing_cached(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that never had internet, with free ports."""
    need("apache2")
    ports = {"PORT": str(free_port()), "REDIS_PORT": str(free_port()), "REDIS_HOST": "localhost"}
    return {**ports, **NO_INTERNET, "KERAS_HOME": str(tmp_path / "keras")}


def files_of_ours() -> set[Path]:
    """What lies in the project's folder, but for .venv and caches, and what bin/serve could leave in /tmp."""
    temporary = Path(tempfile.gettempdir())
    ours = {path for path in ROOT.rglob("*") if not re.search(r"\.venv|cache", str(path.relative_to(ROOT)))}
    return {*ours, *temporary.glob("keras-rest-api-*"), *temporary.glob("*supervisor*")}


def test_it_serves_the_bundled_model_says_so_and_ctrl_c_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, nothing_cached: dict[str, str], tmp_path: Path
) -> None:
    monkeypatch.delenv("MODEL")
    files = files_of_ours()
    mark = nothing_cached["REDIS_PORT"]
    with running([SERVE], tmp_path / "log", **nothing_cached) as process:
        process.wait_for_log("* Ready on port")

        assert "* Serving the bundled model of handwritten digits" in process.log
        [pasted] = re.findall(r"^ +(curl .*)$", process.log, re.MULTILINE)
        answer = subprocess.check_output(pasted, shell=True, cwd=ROOT, text=True, timeout=60)
        assert '"label":"3"' in answer.split("}")[0]

        [run_directory] = {variables(pid)["RUN_DIR"] for pid in processes_with(mark) if "RUN_DIR" in variables(pid)}
        assert Path(run_directory).is_dir()

        [killed] = model_servers(mark)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: model_servers(mark) - {killed}, "supervision starts another model server")
        process.wait_for_log("* Joined the queue", times=2)
        assert requests.get(f"http://localhost:{nothing_cached['PORT']}/readyz", timeout=10).ok

        assert process.stop(signal.SIGINT) == 0

    assert processes_with(mark) == set()
    assert not Path(run_directory).exists()
    assert files_of_ours() == files


def descendants(pid: int) -> dict[int, dict[str, str]]:
    """The process, its children and theirs, each with what the kernel says of it."""
    family, found = {pid}, {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name)):
        with suppress(OSError):  # it ended while we looked
            status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", (folder / "status").read_text(), re.MULTILINE))
            if int(folder.name) == pid or int(status["PPid"]) in family:
                family.add(int(folder.name))
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = {**status, "command": command}
    return found


def listeners(pid: int) -> set[str]:
    """The addresses that a process listens on, as the kernel writes them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
MAY_BE_ROOT = r"deploy/serve\.py|supervisor\.supervisord|^\S*apache2 "


def test_redis_listens_on_loopback_only_and_hardly_anything_runs_as_root(
    nothing_cached: dict[str, str], tmp_path: Path
) -> None:
    """And with keys, what can be pasted takes one from the environment."""
    key = "the-key-of-this-test"
    more = {"MODEL": str(ROOT / "models/digits.keras"), "API_KEYS": key}
    with running([SERVE], tmp_path / "log", **nothing_cached, **more) as process:
        process.wait_for_log("* Ready on port")
        [pasted] = re.findall(r"^ +(curl .*)$", process.log, re.MULTILINE)
        with_key = os.environ | {"API_KEY": key}
        answer = subprocess.check_output(pasted, shell=True, cwd=ROOT, text=True, timeout=60, env=with_key)
        family = descendants(process.popen.pid)
        [redis] = [pid for pid, each in family.items() if "redis-server" in each["command"]]
        heard = listeners(redis)

    assert '"label":"3"' in answer.split("}")[0]
    assert key not in process.log
    assert heard
    assert heard <= LOOPBACK
    assert {"redis-server", "python", "apache2"} <= {each["Name"] for each in family.values()}
    if os.geteuid() == 0:
        roots = [each for each in family.values() if "0" in each["Uid"].split()]
        assert [each["command"] for each in roots if not re.search(MAY_BE_ROOT, each["command"])] == []
        assert sum(each["Name"] == "apache2" for each in roots) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_no_process_is_left(nothing_cached: dict[str, str], tmp_path: Path, number: int) -> None:
    """Started in another folder, with a model that lies there."""
    mark = nothing_cached["REDIS_PORT"]
    shutil.copy(ROOT / "models/digits.keras", tmp_path / "own.keras")
    shutil.copy(ROOT / "models/digits.labels.txt", tmp_path / "own.labels.txt")
    nothing_cached["MODEL"] = "own.keras"
    with running(["env", "-C", str(tmp_path), SERVE], tmp_path / "log", **nothing_cached) as process:
        process.wait_for_log("* Ready on port")
        assert model_servers(mark)

        process.stop(number)

        wait_until(lambda: not processes_with(mark), "all processes have ended")


def one_line(environment: dict[str, str]) -> str:
    """Run bin/serve, which must fail; return the one line that it says of it."""
    ended = subprocess.run(
        [SERVE],
        env={**os.environ, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_a_port_that_is_taken_is_named_in_one_line(nothing_cached: dict[str, str]) -> None:
    port = nothing_cached["PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        assert f"port {port} is taken: choose another" in one_line(nothing_cached | {"MODEL": "ResNet50"})


def test_a_redis_port_that_something_else_has_is_named(nothing_cached: dict[str, str], tmp_path: Path) -> None:
    port = nothing_cached["REDIS_PORT"]
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port]
    with running(command, tmp_path / "log"):
        wait_until(lambda: connects(port), "something listens")

        assert f"what listens on port {port} is not a Redis" in one_line(nothing_cached | {"MODEL": "ResNet50"})


def connects(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


def test_a_remote_redis_that_does_not_answer_is_named_in_one_line(nothing_cached: dict[str, str]) -> None:
    line = one_line(nothing_cached | {"MODEL": "ResNet50", "REDIS_URL": f"redis://:secret@127.0.0.1:{free_port()}"})

    assert "does not answer" in line
    assert "secret" not in line


def test_resnet50_without_internet_stops_and_says_which_file_goes_where(
    nothing_cached: dict[str, str], tmp_path: Path
) -> None:
    environment = nothing_cached | {"MODEL": "ResNet50"}
    with running([SERVE], tmp_path / "log", **environment) as process:
        wait_until(lambda: not process.alive, "bin/serve gives up", 120)

        assert process.popen.returncode == 1
        [line] = [each for each in process.log.splitlines() if "ERROR" in each]
        assert "resnet50_weights_tf_dim_ordering_tf_kernels.h5" in line
        assert f"put it in {environment['KERAS_HOME']}/models/" in line
        assert "Traceback" not in process.log


def setup(commands: str, app: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `commands` with the functions of bin/setup."""
    return subprocess.run(
        ["bash", "-euc", f". {app}/bin/setup; {commands}"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_missing_packages_without_root_and_sudo_are_named_in_one_line() -> None:
    """The shell's own functions stand for a machine that lacks them, which this one does not."""
    lacking = "missing_packages() { echo redis-server; }; id() { echo 1000; }; command() { [ $2 != sudo ]; }"

    ended = setup(f"{lacking}; setup_packages")

    assert ended.returncode == 1
    assert "redis-server must be installed, which takes root" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_packages_without_a_network_fail_in_one_line(tmp_path: Path) -> None:
    app = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(ROOT / "bin", app / "bin")
    for name in ("requirements.txt", "requirements-web.txt", "constraints.txt"):
        shutil.copy(ROOT / name, app)
    offline = {
        "PIP_INDEX_URL": "http://127.0.0.1:1/",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": "",
    }

    ended = setup("setup_venv requirements.txt", app, **offline)

    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("is there a network?\n")
