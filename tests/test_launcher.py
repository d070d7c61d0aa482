"""The launcher replaces a model server by a new one, and never loses the old one to a new one that fails.

A stand-in program takes the place of run_model_server.py where a fault can't be caused otherwise.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from chroot import need_root
from fake_systemd import Systemd
from harness import ROOT, Process, descendants, free_port, parent, run_service, running, wait_until
from redis import Redis

from model_server.launcher import LEAVE_LIMIT, LOAD_LIMIT, options_of
from model_server.reload import WAIT_LIMIT, NotReplaced, replace

THREE = (ROOT / "models/digits/three.png").read_bytes()
LAUNCH = """
import sys
from model_server import launcher
launcher.PROGRAM = {program!r}
launcher.LOAD_LIMIT, launcher.LEAVE_LIMIT = {load}, {leave}
sys.exit(launcher.main())
"""


class Launched:
    """A launcher whose model servers are stand-ins."""

    def __init__(self, process: Process, folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def events(self) -> list[str]:
        """What the stand-ins did, without their pids."""
        return [re.sub(r"loads \d+", "loads", line) for line in self._lines]

    @property
    def _lines(self) -> list[str]:
        return (self.folder / "events").read_text().splitlines()

    def pid_of(self, name: str) -> int:
        """The pid of a stand-in."""
        return int(re.findall(rf"^{name} loads (\d+)", "\n".join(self._lines), re.MULTILINE)[-1])

    def wait_for(self, event: str, times: int = 1) -> None:
        wait_until(lambda: self.events.count(event) >= times, event)

    def next_behaves(self, **behavior: Any) -> None:
        """How the model servers that start from now on behave."""
        behave(self.folder, **behavior)

    def begin_to_replace(self) -> None:
        """Let a second model server start that never gets ready."""
        self.next_behaves(name="second", hangs=True)
        self.process.send(signal.SIGHUP)
        self.wait_for("second loads")


def behave(folder: Path, **behavior: Any) -> None:
    (folder / "new").write_text(json.dumps(behavior))
    (folder / "new").rename(folder / "behavior")


@contextmanager
def launched(
    folder: Path,
    *options: str,
    load_limit: float = 60,
    leave_limit: float = 60,
    environment: dict[str, str] | None = None,
    **behavior: Any,
) -> Iterator[Launched]:
    behave(folder, **behavior)
    (folder / "events").touch()
    program = LAUNCH.format(program=str(ROOT / "tests/stand_in_server.py"), load=load_limit, leave=leave_limit)
    files = {"BEHAVIOR": str(folder / "behavior"), "EVENTS": str(folder / "events")}
    with running([sys.executable, "-c", program, *options], folder / "log", **files, **(environment or {})) as process:
        yield Launched(process, folder)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def reload(launcher: Launched) -> list[str]:
    """Replace the model server; return the progress that was shown."""
    shown: list[str] = []
    replace(launcher.process.popen.pid, shown.append)
    return shown


def test_a_new_model_server_takes_over_before_the_old_one_leaves(tmp_path: Path) -> None:
    systemd = Systemd()
    given = {"NOTIFY_SOCKET": systemd.address}
    with launched(tmp_path, "--gpu", "1", environment=given, leave=0.3, status="loading") as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second")

        launcher.process.send(signal.SIGHUP)
        launcher.wait_for("first left")

        assert launcher.events == [
            "first loads --gpu 1", "first joins", "second loads --gpu 1", "second joins", "first left",
        ]  # fmt: skip
        launcher.process.wait_for_log("* Replaced the model server in")
        assert launcher.process.stop() == 0
        assert launcher.events[-1] == "second left"
    heard = systemd.hear_all()
    told = [each for each in heard if each != "WATCHDOG=1"]
    assert told == ["STATUS=loading", "READY=1", "STOPPING=1"]
    assert heard.count("WATCHDOG=1") > 1


def test_systemd_hears_the_watchdog_of_the_model_server_that_serves(tmp_path: Path) -> None:
    """A new one that serves must not hide that it hangs behind an old one, nor the other way round."""
    systemd = Systemd()
    with launched(tmp_path, environment={"NOTIFY_SOCKET": systemd.address}) as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second")
        reload(launcher)
        wait_until(lambda: systemd.hear() == "WATCHDOG=1", "the second one reports")

        os.kill(launcher.pid_of("second"), signal.SIGSTOP)
        systemd.hear_all()
        wait_until(lambda: systemd.hear(0.5) == "", "nothing more is reported")
        assert systemd.hear(0.5) == ""
        os.kill(launcher.pid_of("second"), signal.SIGCONT)


@pytest.mark.parametrize(
    ("behavior", "reason"),
    [
        ({"fails": 2, "status": "MODEL=x is empty."}, "the new one says: MODEL=x is empty."),
        ({"fails": 2}, "the new one ended with exit code 2."),
        ({"dies": True}, "the new one was killed by SIGKILL."),
        ({"hangs": True}, "the new one did not take jobs within 0.5 seconds."),
    ],
)
def test_if_the_new_model_server_fails_the_old_one_stays(tmp_path: Path, behavior: dict[str, Any], reason: str) -> None:
    with launched(tmp_path, load_limit=0.5) as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second", **behavior)

        with pytest.raises(NotReplaced, match=re.escape(f"The old model server goes on: {reason}")):
            reload(launcher)

        assert launcher.process.alive
        [line] = [each for each in launcher.process.log.splitlines() if "ERROR" in each]
        assert f"was not replaced, and the old one goes on: {reason.rstrip('.')}" in line
        assert not alive(launcher.pid_of("second"))
        assert launcher.events.count("first left") == 0
        launcher.next_behaves(name="third")
        assert reload(launcher)[-1].startswith("Replaced in")
        assert launcher.events[-2:] == ["third joins", "first left"]


def test_an_old_model_server_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path, leave_limit=0.5, stays=True) as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second")

        assert reload(launcher)[-1].startswith("Replaced in")

        assert not alive(launcher.pid_of("first"))
        assert alive(launcher.pid_of("second"))


def test_hangups_during_a_replacement_lead_to_one_more(tmp_path: Path) -> None:
    """A file that changed after the new model server has read it must not be missed."""
    with launched(tmp_path, leave=0.3) as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second", leave=0.3)
        launcher.process.send(signal.SIGHUP)
        launcher.wait_for("second loads")
        launcher.next_behaves(name="third")
        for _ in range(5):
            launcher.process.send(signal.SIGHUP)
        launcher.wait_for("second left")
        launcher.process.wait_for_log("* Replaced the model server in", times=2)

        assert launcher.process.stop() == 0

        assert [each for each in launcher.events if "joins" in each] == ["first joins", "second joins", "third joins"]


@pytest.mark.parametrize("moment", ["loads", "joins"])
def test_stop_ends_both_model_servers(tmp_path: Path, moment: str) -> None:
    with launched(tmp_path, leave=0.5) as launcher:
        launcher.wait_for("first joins")
        launcher.next_behaves(name="second", hangs=moment == "loads")
        if moment == "joins":
            launcher.next_behaves(name="second")
        launcher.process.send(signal.SIGHUP)
        launcher.wait_for(f"second {moment}")

        assert launcher.process.stop() == 0

        assert "first left" in launcher.events
        assert not alive(launcher.pid_of("second"))


@pytest.mark.parametrize(
    ("behavior", "code"), [({"fails": 2}, 2), ({"fails": 7}, 7), ({"fails": 0}, 0), ({"dies": True}, 137)]
)
def test_the_launcher_ends_as_its_model_server_does(tmp_path: Path, behavior: dict[str, Any], code: int) -> None:
    with launched(tmp_path, **behavior) as launcher:
        assert launcher.process.popen.wait(20) == code


def test_a_model_server_that_crashes_ends_the_launcher_even_during_a_replacement(tmp_path: Path) -> None:
    """Then the supervisor starts both again, and the new model server reads the new file."""
    with launched(tmp_path) as launcher:
        launcher.wait_for("first joins")
        launcher.begin_to_replace()

        os.kill(launcher.pid_of("first"), signal.SIGKILL)

        assert launcher.process.popen.wait(20) == 137
        assert "ERROR The model server was killed by SIGKILL" in launcher.process.log
        wait_until(lambda: not alive(launcher.pid_of("second")), "the new one ends too")


def test_a_killed_launcher_takes_its_model_server_along(tmp_path: Path) -> None:
    with launched(tmp_path) as launcher:
        launcher.wait_for("first joins")

        launcher.process.stop(signal.SIGKILL)

        launcher.wait_for("first left")  # it was told to, and has answered its batches


def test_other_programs_can_not_pretend_to_be_ready(tmp_path: Path) -> None:
    with launched(tmp_path) as launcher:
        launcher.wait_for("first joins")
        launcher.begin_to_replace()
        variables = Path(f"/proc/{launcher.pid_of('second')}/environ").read_bytes().decode().split("\0")
        [address] = [each.partition("=")[2] for each in variables if each.startswith("NOTIFY_SOCKET=")]
        pretend = "from model_server.systemd import notify_systemd; notify_systemd('READY=1')"

        subprocess.run([sys.executable, "-c", pretend], cwd=ROOT, env={**os.environ, "NOTIFY_SOCKET": address},
                       check=True)  # fmt: skip
        launcher.process.send(signal.SIGHUP)  # handled after the message

        time.sleep(0.3)
        assert launcher.events[-1] == "second loads"
        assert "first left" not in launcher.events


@pytest.mark.parametrize(
    ("pid", "reason"), [("1", "not the launcher"), ("0", "not the launcher"), ("x", "not the pid")]
)
def test_reload_of_another_process_says_so_in_one_line(pid: str, reason: str) -> None:
    command = [sys.executable, "-m", "model_server.reload", pid]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert reason in line


@pytest.mark.parametrize(
    ("instance", "options"),
    [
        ("0", "--gpu 0"),
        ("12", "--gpu 12"),
        ("digits", "--model digits --gpu 1"),
        ("digits:3", "--model digits --gpu 3"),
        ("EfficientNetB0", "--model EfficientNetB0 --gpu 0"),
    ],
)
def test_instances_of_the_unit_name_a_gpu_or_a_model(
    monkeypatch: pytest.MonkeyPatch, instance: str, options: str
) -> None:
    monkeypatch.setattr("settings.MODELS", "ResNet50,models/digits.keras")

    assert options_of(instance) == options.split()


def test_a_new_model_server_reads_changed_settings(tmp_path: Path) -> None:
    """They are lines of .env, which the launcher has read itself when it started."""
    app = tmp_path / "app"
    app.mkdir()
    for name in ("settings.py", "helpers.py"):
        shutil.copy(ROOT / name, app)
    shutil.copytree(ROOT / "model_server", app / "model_server")
    (app / "run_model_server.py").write_text(
        "import time, settings\nfrom model_server.systemd import notify_systemd\n"
        "print(f'TOP is {settings.TOP}', flush=True)\nnotify_systemd('READY=1')\ntime.sleep(60)\n"
    )
    (app / ".env").write_text("TOP=1\n")
    with running(["env", "-C", str(app), sys.executable, "-m", "model_server.launcher"], tmp_path / "log") as process:
        process.wait_for_log("TOP is 1")
        (app / ".env").write_text("TOP=2\n")
        process.send(signal.SIGHUP)

        process.wait_for_log("TOP is 2")


def of_the_unit(setting: str, **values: object) -> list[str]:
    """A command of the systemd unit, for this folder and with these values."""
    text = (ROOT / "deploy/systemd/model-server@.service").read_text()
    [command] = re.findall(rf"^{setting}=/opt/keras-rest-api/.venv/bin/python (.*)$", text, re.MULTILINE)
    for name, value in values.items():
        command = command.replace(f"%{name}", str(value)).replace(f"${name}", str(value))
    return [sys.executable, *command.split()]


def test_supervisors_wait_longer_than_the_launcher() -> None:
    unit = (ROOT / "deploy/systemd/model-server@.service").read_text()
    supervisor = (ROOT / "deploy/supervisor/model-server.conf").read_text()
    [start] = re.findall(r"^TimeoutStartSec=(\d+)min$", unit, re.MULTILINE)
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    [wait] = re.findall(r"^stopwaitsecs = (\d+)$", supervisor, re.MULTILINE)

    assert 60 * int(start) > WAIT_LIMIT > LOAD_LIMIT + LEAVE_LIMIT
    assert int(stop) == int(wait) == LEAVE_LIMIT


def run_reload(process: Process) -> subprocess.CompletedProcess[str]:
    command = of_the_unit("ExecReload", MAINPID=process.popen.pid)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow("starts four model servers")
def test_real_model_servers_are_replaced_by_one_command(redis: Redis, tmp_path: Path) -> None:
    """The model's file is replaced by one that can't be loaded, then by a good one. Each server keeps its metrics."""
    model, port = tmp_path / "own.keras", free_port()
    shutil.copy(ROOT / "models/digits.keras", model)
    shutil.copy(ROOT / "models/digits.json", tmp_path / "own.json")
    shutil.copy(ROOT / "models/digits.labels.txt", tmp_path / "digits.labels.txt")
    queue = f"queue-{free_port()}"
    systemd = Systemd()
    given = {"MODELS": str(model), "IMAGE_QUEUE": queue, "METRICS_PORT": str(port), "NOTIFY_SOCKET": systemd.address}
    with (
        running(of_the_unit("ExecStart", i="own"), tmp_path / "log", **given) as process,
        run_service(tmp_path, 0, IMAGE_QUEUE=queue) as service,
    ):
        process.wait_for_log("* Joined the queue")
        [first] = model_servers_of(process)
        assert service.label(THREE) == "3"

        model.write_bytes(b"not a model")
        failed = run_reload(process)
        assert failed.returncode == 1
        [line] = failed.stderr.splitlines()
        assert line.startswith("The old model server goes on: the new one says: MODEL=")
        assert model_servers_of(process) == [first]

        shutil.copy(ROOT / "models/digits.keras", model)
        done = run_reload(process)
        assert done.returncode == 0, done.stderr
        [second] = model_servers_of(process)
        assert second != first
        assert service.label(THREE) == "3"
        wait_until(lambda: metrics_of(port, second), "the new one serves the metrics")
        assert process.stop() == 0
        assert redis.keys(f"{queue}:server:*") == []
        assert [each for each in systemd.hear_all() if each != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]


def model_servers_of(process: Process) -> list[int]:
    return [pid for pid in descendants(process.popen.pid) if alive(pid)]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_in_a_container_the_launcher_has_pid_1(tmp_path: Path) -> None:
    """As `docker compose exec model .venv/bin/python -m model_server.reload` and `docker stop` use it."""
    need_root()
    behave(tmp_path)
    (tmp_path / "events").touch()
    program = LAUNCH.format(program=str(ROOT / "tests/stand_in_server.py"), load=60, leave=60)
    files = {"BEHAVIOR": str(tmp_path / "behavior"), "EVENTS": str(tmp_path / "events")}
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", program]
    with running(container, tmp_path / "log", **files) as process, ExitStack() as stack:
        launcher = Launched(process, tmp_path)
        launcher.wait_for("first joins")
        [inside] = [pid for pid in descendants(process.popen.pid) if parent(pid) == process.popen.pid]
        launcher.next_behaves(name="second")
        stack.callback(kill, inside)  # unshare passes no signal on

        execute = ["nsenter", "--target", str(inside), "--pid", "--mount", "env", "-C", str(ROOT)]
        done = subprocess.run([*execute, sys.executable, "-m", "model_server.reload"], capture_output=True, text=True,
                              timeout=60, check=False)  # fmt: skip

        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("* Replaced in")
        os.kill(inside, signal.SIGTERM)
        assert process.popen.wait(20) == 0
        assert launcher.events[-1] == "second left"


@pytest.mark.slow("starts a model server")
def test_as_root_the_model_server_still_ends_with_a_killed_launcher(redis: Redis, tmp_path: Path) -> None:
    """The kernel forgets the signal for the end of the parent when the model server gives up root."""
    need_root()
    queue = f"queue-{free_port()}"
    command = [sys.executable, "-m", "model_server.launcher"]
    with running(command, tmp_path / "log", IMAGE_QUEUE=queue) as process:
        process.wait_for_log("Root has become")
        process.wait_for_log("* Joined the queue")
        [server] = model_servers_of(process)

        process.stop(signal.SIGKILL)

        wait_until(lambda: not alive(server), "the model server ends")
        assert redis.keys(f"{queue}:server:*") == []


def metrics_of(port: int, pid: int) -> bool:
    """Whether the process `pid` listens on `port`."""
    listening = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in listening if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    links = Path(f"/proc/{pid}/fd").iterdir()
    return any(f"socket:[{inode}]" in {os.readlink(link) for link in links} for inode in inodes)
