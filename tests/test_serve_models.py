"""bin/serve with several models, and bin/serve --reload."""

import os
import re
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import requests
from harness import ROOT, Serve, command_line, model_servers, parent, run_serve, running, wait_until
from load import Load
from own_model import LABELS, photos, save_model

SERVE = str(ROOT / "bin/serve")
THREE = (ROOT / "models/digits/three.png").read_bytes()


def reload(serve: Serve) -> subprocess.CompletedProcess[str]:
    """Run bin/serve --reload for a running bin/serve."""
    port = serve.url.rpartition(":")[2]
    with running([SERVE, "--reload"], serve.process.log_path.with_name("reload"), PORT=port) as process:
        code = process.popen.wait(120)
        lines = process.log.splitlines()
        process.log_path.unlink()
    return subprocess.CompletedProcess([], code, "\n".join(lines), "")


@pytest.mark.slow("starts four model servers")
def test_reload_replaces_each_model_server_or_says_why_not(tmp_path: Path) -> None:
    model = tmp_path / "digits.keras"
    for file in ROOT.glob("models/digits.*"):
        shutil.copy(file, tmp_path)
    with run_serve(tmp_path / "log", MODEL=str(model), MODEL_SERVERS="2") as serve:
        serve.process.wait_for_log("* Ready on port")
        wait_until(lambda: len(serve.redis.keys("image_queue:server:*")) == 2, "both have joined")
        mark = str(serve.redis.connection_pool.connection_kwargs["port"])
        old = model_servers(mark)

        with Load(serve.url, clients=4) as load:
            load.wait_for(20)
            done = reload(serve)
            load.wait_for(20)

        assert done.returncode == 0, done.stdout
        assert load.failures == {}
        for name in ("model-server-0", "model-server-1"):
            assert f"* {name}: Replaced in" in done.stdout
        new = model_servers(mark)
        assert len(old) == len(new) == 2
        assert not old & new
        assert serve.label(THREE) == "3"

        model.write_bytes(b"half a model")
        failed = reload(serve)

        assert failed.returncode == 1
        [first, second] = [line for line in failed.stdout.splitlines() if "not replaced" in line]
        assert "model-server-0 was not replaced. The old model server goes on: the new one says: MODEL=" in first
        assert "model-server-1 was not replaced." in second
        assert model_servers(mark) == new
        assert serve.label(THREE) == "3"
        assert serve.process.stop() == 0


def test_reload_without_a_running_service_says_so_in_one_line(tmp_path: Path) -> None:
    with running([SERVE, "--reload"], tmp_path / "log", PORT="1") as process:
        assert process.popen.wait(60) == 1
        [line] = process.log.splitlines()
        assert "runs here on port 1: start it, or set PORT." in line


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"MODELS": "models/digits.keras,other/digits.keras"}, "MODELS has two models named digits: rename one"),
        ({"MODELS": "models/digits.keras,nowhere.keras"}, "nowhere.keras does not exist"),
        ({"MODELS": "models/digits.keras,ResNet5"}, "did you mean ResNet50?"),
        ({"MODELS": "models/digits.keras", "DEFAULT_MODEL": "digit"},
         "DEFAULT_MODEL=digit is invalid: it must be one of digits."),
    ],
)  # fmt: skip
def test_a_wrong_list_of_models_stops_the_start_in_one_line(
    tmp_path: Path, settings: dict[str, str], reason: str
) -> None:
    with run_serve(tmp_path / "log", **settings) as serve:
        assert serve.process.popen.wait(60) == 1
        [line] = serve.process.log.splitlines()
        assert reason in line


@pytest.mark.slow("starts two model servers")
def test_two_models_are_served_with_a_command_for_each(tmp_path: Path) -> None:
    """The models are given as relative paths, and have inputs of different sizes."""
    gray = save_model(tmp_path / "my gray.keras", facts={"labels": LABELS})
    models = f"models/digits.keras,{os.path.relpath(gray, ROOT)}"
    with run_serve(tmp_path / "log", MODELS=models) as serve:
        serve.process.wait_for_log("* Ready on port")

        ready = requests.get(f"{serve.url}/readyz", timeout=10).json()
        first, second = re.findall(r"^ +(curl .*)$", serve.process.log, re.MULTILINE)
        bright, dark = photos(16)[0], photos(16)[-1]
        answers = [requests.post(f"{serve.url}/predict/my-gray", files={"image": image}, timeout=60).json()
                   for image in (bright, dark)]  # fmt: skip

        assert ready["model"] == "digits"
        assert {name: about["ready"] for name, about in ready["models"].items()} == {"digits": True, "my-gray": True}
        assert first.endswith(f"{serve.url.replace('127.0.0.1', 'localhost')}/predict")
        assert second.endswith("/predict/my-gray")
        for command in (first, second):
            printed = subprocess.check_output(command, shell=True, cwd=ROOT, text=True, timeout=60)
            assert '"success":true' in printed
        assert {each["label"] for answer in answers for each in answer["predictions"]} == set(LABELS)
        assert answers[0]["predictions"] != answers[1]["predictions"]
        assert serve.label(THREE) == "3"

        # A launcher is killed: its server ends with it, and both are started again.
        killed = server_of(serve, "digits")
        os.kill(parent(killed), signal.SIGKILL)
        wait_until(lambda: set(server_pids(serve, "digits")) - {killed}, "another server is started")
        assert serve.label(THREE) == "3"
        assert killed not in server_pids(serve, "digits")

        # One ends for good, since its file is gone; the other goes on.
        gray.rename(tmp_path / "away.keras")
        os.kill(server_of(serve, "my-gray"), signal.SIGKILL)
        serve.process.wait_for_log("my gray.keras does not exist")
        wait_until(lambda: not server_pids(serve, "my-gray"), "it is not started again")
        assert serve.label(THREE) == "3"
        assert serve.process.stop() == 0


@pytest.mark.slow("starts two model servers")
def test_a_model_that_can_not_be_loaded_stops_the_start(tmp_path: Path) -> None:
    """Its file passes the first check, which needs no Keras."""
    broken = tmp_path / "broken.keras"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("config.json", "{}")
    broken.with_suffix(".labels.txt").write_text("yes\nno\n")
    with run_serve(tmp_path / "log", MODELS=f"models/digits.keras,{broken}") as serve:
        assert serve.process.popen.wait(120) == 1
        assert "bin/serve: model-server-broken-1 does not start; the lines above say why." in serve.process.log
        assert "* Ready" not in serve.process.log


def server_pids(serve: Serve, model: str) -> list[int]:
    """The pids of the servers of a model."""
    mark = str(serve.redis.connection_pool.connection_kwargs["port"])
    return [pid for pid in model_servers(mark) if f"--model {model} " in command_line(pid)]


def server_of(serve: Serve, model: str) -> int:
    """The pid of the server of a model; waits for one."""
    return int(wait_until(lambda: server_pids(serve, model), f"a server of {model} runs")[0])
