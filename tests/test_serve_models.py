"""bin/serve with several models, and bin/serve --reload."""

import shutil
import subprocess
from pathlib import Path

import pytest
from harness import ROOT, Serve, model_servers, run_serve, running, wait_until
from load import Load

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
