"""The model server gives up root, and its systemd unit is hardened."""

import base64
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from chroot import need_root
from harness import ROOT, answers, free_port, make_certificates, need, run_redis, running, wait_until
from redis import Redis

from helpers import StartupError
from model_server.privileges import give_up_root


def save_model(path: Path) -> None:
    """Save a model whose output is NaN if its input is NaN."""
    pixels = keras.Input((224, 224, 3))
    layers = keras.layers.Dense(5, activation="softmax")(keras.layers.GlobalAveragePooling2D()(pixels))
    keras.Model(pixels, layers).save(path)
    path.with_suffix(".labels.txt").write_text("a\nb\nc\nd\ne\n")


def job(name: str, image: object) -> str:
    return json.dumps({"id": name, "image": image, "deadline": time.time() + 60})


@pytest.mark.slow("copies Python and all its packages")
def test_model_server_started_by_root_drops_its_privileges(tmp_path: Path) -> None:
    """Code and Python are in a folder that only root may enter, so any later import or read of a file fails."""
    need_root()
    port, queue = free_port(), f"queue-{free_port()}"
    python, app, authority = tmp_path / "hidden/python", tmp_path / "hidden/app", make_certificates(tmp_path)
    for folder in (python / "bin", python / "lib", app):
        folder.mkdir(parents=True)
    (tmp_path / "hidden").chmod(0o700)
    # Python looks for its library next to its executable, which is inside the hidden folder.
    shutil.copy(Path(sys.executable).resolve(), python / "bin/python")
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    (python / "lib" / library.name).symlink_to(library)
    (python / "packages").symlink_to(packages)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, app)
    for package in ("image_queue", "model_server", "web"):
        shutil.copytree(ROOT / package, app / package)
    save_model(app / "own.keras")
    shutil.copy(authority["ca"], app / "ca.pem")
    command = ["env", "-C", str(app), str(python / "bin/python"), "run_model_server.py"]
    tls, key = free_port(), authority["key"]
    secured = ("--tls-port", str(tls), "--tls-cert-file", authority["certificate"], "--tls-key-file", key,
               "--tls-ca-cert-file", authority["ca"], "--tls-auth-clients", "no")  # fmt: skip
    settings = {
        "REDIS_URL": f"rediss://localhost:{tls}/0?ssl_ca_certs=ca.pem",
        "IMAGE_QUEUE": queue,
        "IMAGE_DTYPE": "float32",
        "MODEL": "own.keras",
        "LOG_FORMAT": "json",
        "PYTHONPATH": str(python / "packages"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    client = Redis(port=port, socket_timeout=60)

    def answer(name: str, pixels: bytes) -> dict[str, Any]:
        client.rpush(queue, job(name, base64.b64encode(pixels).decode()))
        _, text = client.blpop([f"{queue}:result:{name}"], 30) or pytest.fail(server.log)
        return dict(json.loads(text))

    gray, broken = (np.full((224, 224, 3), level, np.float32).tobytes() for level in (99, np.nan))
    with running(command, tmp_path / "log", **settings) as server:
        with run_redis(tmp_path / "redis", port, *secured):
            server.wait_for_log("* Model loaded")
            threads = [(each / "status").read_text() for each in Path(f"/proc/{server.popen.pid}/task").iterdir()]
            assert len(answer("good", gray)["predictions"]) == 5
            assert answer("broken", broken)["error"]["code"] == "model_failed"
            assert answer("short", b"short")["error"]["code"] == "model_failed"
        server.wait_for_log("does not answer")
        with run_redis(tmp_path / "redis", port, *secured):
            wait_until(lambda: answers(client), "Redis answers again")
            assert len(answer("later", gray)["predictions"]) == 5
            assert server.stop() == 0

    user = pwd.getpwnam("www-data")
    for status in threads:
        fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status, re.MULTILINE))
        assert fields["Uid"].split() == [str(user.pw_uid)] * 4
        assert fields["Gid"].split() == [str(user.pw_gid)] * 4
        assert fields["Groups"].strip() == ""
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    # The main thread sets it for itself, and for the threads and programs that it starts later.
    assert any("NoNewPrivs:\t1" in status for status in threads)
    assert "Root has become www-data" in server.log
    assert "ArithmeticError" in server.log  # the traceback of the broken image
    assert not re.search(r"ImportError|ModuleNotFound|LookupError|PermissionError|Permission denied", server.log)


def test_root_that_cannot_drop_privileges_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "setgroups", not_permitted)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(StartupError, match="start the model server as another user"):
        give_up_root()

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    give_up_root()


@pytest.mark.tools
def test_systemd_unit_is_hardened_and_valid() -> None:
    """Needs no running systemd. The exposure level ranges from 0 (safest) to 10; the threshold 15 means 1.5."""
    analyse, unit = need("systemd-analyze"), str(ROOT / "deploy/systemd/model-server@.service")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([analyse, *arguments, unit], capture_output=True, text=True, timeout=60, check=False)

    security = run("security", "--offline=true", "--threshold=15", "--no-pager")
    verified = run("verify")

    assert security.returncode == 0, security.stdout
    assert "exposure level" in security.stdout
    # The only warning may be that the service is not installed here.
    assert [line for line in verified.stderr.splitlines() if "is not executable: No such file" not in line] == []
