"""bin/install in a bare Debian: the service answers, a second run changes nothing, --purge leaves nothing."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chroot import Chroot, copy_of, copy_project, need_root
from conftest import images_are_wanted
from console_blocks import commands
from harness import PATH, ROOT, make_certificates, need

sys.path.insert(0, str(ROOT / "deploy"))

import copy_code

OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
TARGET = "/opt/keras-rest-api"
INSTALL = "/srv/app/bin/install"
APACHE_STATE = "/var/lib/apache2"  # which sites and modules are enabled, and who enabled them
NO_INDEX = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_RETRIES": "0"}
START = """
service redis-server start >/dev/null
apache2ctl start 2>/dev/null
cd /opt/keras-rest-api
KERAS_HOME=/var/cache/keras-rest-api setpriv --reuid=keras-rest-api --regid=keras-rest-api --init-groups \
    .venv/bin/python run_model_server.py >/tmp/log 2>&1 &
for _ in $(seq 600); do
    curl -sf localhost/readyz >/dev/null && break
    sleep 0.2
done
curl -s -F image=@images/cat.jpg localhost/predict
for _ in $(seq 10); do curl -s localhost/metrics | grep 'endpoint="/predict"'; done | sort | uniq -c >/tmp/counted
cat /proc/[0-9]*/status | awk -F '\t' '/^Name:/ {name = $2} /^Uid:/ {print name "\t" $3}' | sort -u
"""


@pytest.fixture(scope="module")
def system(debian: Path, request: pytest.FixtureRequest) -> Iterator[Chroot]:
    """A Debian with the project in /srv/app. Container images that other tests need are built at the same time."""
    if images_are_wanted(request.session):
        request.getfixturevalue("images_to_come")
    with copy_of(debian) as chroot:
        copy_project(chroot.root / "srv/app")
        yield chroot


def output_of(system: Chroot, command: str) -> list[str]:
    """Run a command that must succeed; return the lines it printed."""
    done = system.run(command, seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def mentions(system: Chroot) -> set[str]:
    """The files and folders whose name or text mentions the service."""
    listed = "grep -rIls -e keras-rest-api -e model-server /etc /var /opt /usr/local /lib/systemd || true"
    named = {path for path in system.files("/srv/app") if re.search("keras|model-server", path)}
    logs = r"/var/(log|cache/apt)/|/etc/\w+-$"
    return {path for path in {*output_of(system, listed), *named} if not re.match(logs, path)}


@pytest.mark.timeout(1200)
def test_install_upgrade_and_remove_in_a_bare_debian(system: Chroot, tmp_path: Path) -> None:
    # Given a system where an install that could not download Python packages failed, and was purged
    failed = system.run(INSTALL, seconds=600, variables=NO_INDEX)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("is there a network?")
    output_of(system, f"{INSTALL} --purge")
    bare = system.files("/srv/app", "/var/log", "/root", "/run", APACHE_STATE)
    assert mentions(system) == set()

    # When the service is installed
    first = output_of(system, INSTALL)

    # Then it says what it did and what it did not do
    assert all(line.startswith("* ") for line in first), first
    assert any("Serving the bundled model EfficientNet-Lite0, which recognizes 1,000" in line for line in first)
    assert "No systemd runs here, so nothing was started" in first[-1]

    # And it answers on port 80, and neither the model server nor the web runs as root
    answer = system.run(START, network=False, seconds=200)
    assert '"label":"Egyptian_cat"' in answer.stdout.split("}")[0], answer.stdout + answer.stderr
    users = {tuple(line.split("\t")) for line in answer.stdout.splitlines()[1:]}
    account = output_of(system, "id -u keras-rest-api")[0]
    assert ("python", account) in users
    assert not {user for user in users if user[0] in ("python", "redis-server") and user[1] == "0"}

    # And the metrics of all web processes are added up
    [counted] = (system.root / "tmp/counted").read_text().splitlines()
    assert counted.split() == [
        "10",
        'keras_rest_api_requests_total{endpoint="/predict",model="efficientnet_lite0",status="200"}',
        "1.0",
    ]

    # And .env sets MODEL once, on the line where .env.example has it
    lines = (system.root / TARGET[1:] / ".env").read_text().splitlines()
    assert [line for line in lines if re.match("(# )?MODEL=", line)] == ["MODEL=models/efficientnet_lite0.keras"]

    # And only those who need the settings can read them, and the services can't write to the folder
    assert output_of(system, f"stat -c %U:%G:%a {TARGET}/.env") == ["root:keras-rest-api:640"]
    as_user = "setpriv --reuid={0} --regid={0} --init-groups"
    for user, allowed in {"www-data": "yes", "keras-rest-api": "yes", "nobody": "no"}.items():
        groups = as_user.format(user) if user != "nobody" else "setpriv --reuid=nobody --regid=nogroup --clear-groups"
        assert output_of(system, f"{groups} test -r {TARGET}/.env && echo yes || echo no") == [allowed]
        assert output_of(system, f"{groups} find {TARGET} -writable ! -type l | head -n 3") == []

    # When it is run again, nothing changes
    before = system.files("/srv/app", "/var/log")
    assert output_of(system, INSTALL) == ["* Nothing to do: everything is up to date"]
    assert before.items() ^ system.files("/srv/app", "/var/log").items() == set()

    # When TLS is set up as docs/operations.md says, it answers over TLS, with Debian's certificate and with another
    check_tls(system, tmp_path)

    # When the project has changed, and somebody has added files
    app, target = system.root / "srv/app", system.root / TARGET[1:]
    (app / "CHANGELOG.md").unlink()
    (app / "helpers.py").write_text((app / "helpers.py").read_text() + "# newer\n")
    (target / "models/own.keras").write_text("own")
    with (target / ".env").open("a") as settings:
        settings.write("TOP=1\n")
    touched = (target / "keras_rest_api_app.wsgi").stat().st_mtime_ns
    assert "* Copied the code to /opt/keras-rest-api (2 files)" in output_of(system, INSTALL)

    # Then the code is new, the web loads it, and files that are not ours stay
    assert (target / "helpers.py").read_text().endswith("# newer\n")
    assert not (target / "CHANGELOG.md").exists()
    assert (target / "keras_rest_api_app.wsgi").stat().st_mtime_ns > touched
    assert (target / "models/own.keras").exists()
    assert (target / ".env").read_text().endswith("TOP=1\n")

    # When it is removed, nothing is left
    check_removal(system)
    assert mentions(system) == set()
    after = system.files("/srv/app", "/var/log", "/root", "/run", APACHE_STATE)
    assert after.keys() ^ bare.keys() == set()


def check_removal(system: Chroot) -> None:
    """Remove the service while a program runs as its user. The first run fails halfway, the second finishes."""
    other = system.root / "etc/apache2/sites-available/other.conf"
    other.write_text("<IfModule mod_headers.c>\n</IfModule>\n")
    output_of(system, "a2ensite -q other; mkdir /tmp/broken; ln -s /bin/false /tmp/broken/userdel")
    runs = "setpriv --reuid=keras-rest-api --regid=keras-rest-api --init-groups sleep 600 & "
    broken = system.run(f"{runs} PATH=/tmp/broken:$PATH {INSTALL} --remove", seconds=100)
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert "'userdel keras-rest-api' failed" in broken.stderr
    assert "* Waiting for the programs of keras-rest-api to end" in broken.stdout

    # Then the next run finishes, although Apache's configuration is invalid by now. It keeps the settings, readable
    # by root only; files that are not ours; and the modules that the other site needs
    other.write_text("Nonsense\n")
    kept = output_of(system, f"{runs} {INSTALL} --remove")
    assert any("because other programs may use them: the packages" in line for line in kept)
    assert output_of(system, "a2query -m headers")[0].startswith("headers (enabled")
    assert any("which bin/install --purge removes" in line for line in kept)
    left = output_of(system, f"find {TARGET} -mindepth 1 ! -type d | sort; stat -c %U:%a {TARGET}/.env")
    assert left == [f"{TARGET}/.env", f"{TARGET}/.installed", f"{TARGET}/models/own.keras", "root:600"]

    # And --purge leaves only packages, modules and files that are not ours
    assert f"{TARGET}/models/own.keras" in output_of(system, f"{INSTALL} --purge")[-1]
    output_of(system, f"rm -r {TARGET} /tmp/broken; a2dissite -q other; rm /etc/apache2/sites-available/other.conf")
    output_of(system, "a2dismod -q -f ssl socache_shmcb headers unique_id; apt-get purge -y ssl-cert")
    output_of(system, "rm -f /etc/ssl/*/ssl-cert* /var/cache/apt/archives/ssl-cert* /etc/ssl/example.*")
    output_of(system, "rm -f /var/lib/dpkg/statoverride-old")  # dpkg's backup of its list


def check_tls(system: Chroot, folder: Path) -> None:
    certificates = make_certificates(folder)
    for name, place in (("certificate", "example.pem"), ("key", "example.key"), ("ca", "example.ca")):
        shutil.copy(certificates[name], system.root / "etc/ssl" / place)
    [section] = re.findall(r"^### TLS\n.*?(?=^### )", OPERATIONS, re.MULTILINE | re.DOTALL)
    # The chroot has no systemd.
    steps = [line.replace("systemctl restart apache2", "true") for line in commands(section)]
    assert [line.split()[0] for line in steps] == ["apt-get", "cp", "a2enmod", "a2ensite", "apache2ctl",
                                                   "sed", "sed", "apache2ctl"]  # fmt: skip
    for part, trust in ((steps[:5], "--insecure"), (steps[5:], "--cacert /etc/ssl/example.ca")):
        output_of(system, " && ".join(part))
        ask = f"apache2ctl start 2>/dev/null; curl -s {trust} --retry 20 --retry-all-errors https://localhost/livez"
        assert '"live":true' in system.run(ask, network=False, seconds=60).stdout


def run(script: str, app: Path = ROOT, *before: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with the functions of bin/install. It runs on this machine, so it must not change anything."""
    command = [*before, "bash", "-euc", f". {app}/bin/install; {script}"]
    environment = {**os.environ, "PATH": PATH}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def release(folder: Path, name: str, version: str) -> str:
    (folder / "os-release").write_text(f'ID={name}\nVERSION_ID="{version}"\n')
    return f"check_root() {{ :; }}; OS_RELEASE={folder}/os-release; TARGET={folder}/target; apache_runs() {{ :; }}"


@pytest.mark.parametrize(
    ("name", "version", "supported"),
    [("debian", "12", True), ("debian", "13", True), ("ubuntu", "24.04", True), ("ubuntu", "22.04", False),
     ("debian", "11", False), ("fedora", "44", False)],
)  # fmt: skip
def test_unsupported_system_is_refused_in_one_line(tmp_path: Path, name: str, version: str, supported: bool) -> None:
    done = run(f"{release(tmp_path, name, version)}; check_machine")

    assert (done.returncode == 0) is supported, done.stderr
    if not supported:
        [line] = done.stderr.splitlines()
        assert f"{name} {version} is not supported: use Debian 12, Ubuntu 24.04 or newer" in line


def test_install_without_root_stops_in_one_line() -> None:
    for option in ("", "--remove", "--purge"):
        done = run(f"id() {{ echo 1000; }}; main {option}")

        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert "this needs root: run it with sudo." in line


def test_folder_from_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/precious").touch()

    done = run(f"{release(tmp_path, 'debian', '12')}; NOTES=$TARGET/.installed; check_machine")

    assert done.returncode == 1
    assert "exists, but bin/install did not create it: move it away" in done.stderr
    assert (tmp_path / "target/precious").exists()


def test_another_program_on_port_80_is_refused(tmp_path: Path) -> None:
    need_root()
    listens = "ip link set lo up; python3 -m http.server 80 >/dev/null 2>&1 &"
    listens += " until (: </dev/tcp/127.0.0.1/80) 2>&-; do sleep 0.1; done"

    done = run(
        f"{listens}; {release(tmp_path, 'debian', '12')}; apache_runs() {{ false; }}; check_machine; kill %1",
        ROOT, "unshare", "--net", "--pid", "--fork", "--kill-child",
    )  # fmt: skip

    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "a program other than Apache uses port 80: stop it" in line


def test_archive_and_clone_have_the_same_project_files(tmp_path: Path) -> None:
    need("git")
    clone, archive = tmp_path / "clone", tmp_path / "archive"
    for folder in (clone, archive):
        copy_project(folder)
    git = ["git", "-C", str(clone), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    for folder in (clone, archive):
        (folder / ".env").write_text("API_KEYS=secret-secret-secret\n")
        (folder / "bench").mkdir()
        (folder / "bench/bench.md").touch()
        (folder / "tests/__pycache__").mkdir()
        (folder / "tests/__pycache__/x.pyc").touch()

    listed = [copy_code.project_files(folder) for folder in (clone, archive)]

    assert listed[0] == listed[1]
    assert {"settings.py", "bin/bench", "benchmarks/bench.py", "deploy/apache/000-default.conf"} <= listed[0]
    assert not {".env", "bench/bench.md", "tests/__pycache__/x.pyc"} & listed[0]


def test_copy_replaces_changed_files_removes_dropped_and_keeps_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, target = tmp_path / "app", tmp_path / "target"
    monkeypatch.setattr(copy_code, "ROOT", app)
    monkeypatch.setattr(copy_code, "project_files", lambda: {path.name for path in app.iterdir()})
    for folder in (app, target):
        folder.mkdir()
    for name in ("settings.py", "same.py", "dropped.py"):
        (app / name).write_text("old")
    (target / "own.keras").write_text("own")
    first = copy_code.copy(target)
    (app / "settings.py").write_text("new")
    (app / "dropped.py").unlink()
    untouched = (target / "same.py").stat().st_mtime_ns

    second = copy_code.copy(target)
    before = (target / ".installed-files").stat().st_mtime_ns

    assert (first, second) == (["dropped.py", "same.py", "settings.py"], ["settings.py", "dropped.py"])
    assert copy_code.copy(target) == []
    assert (target / ".installed-files").stat().st_mtime_ns == before
    assert (target / "same.py").stat().st_mtime_ns == untouched
    assert (target / "settings.py").read_text() == "new"
    assert {path.name for path in target.iterdir()} == {"settings.py", "same.py", "own.keras", ".installed-files"}


FAKES = """
TARGET={0}; NOTES=$TARGET/.installed; WANTS=$TARGET/wants
as_account() {{ "$@"; }}
with_systemd() {{ true; }}
nvidia-smi() {{ printf '{1}'; }}
systemctl() {{ # keeps the units as files, and lists in the file `asked` what is done to those that run
    case "$1" in
        enable) touch "$WANTS/$3.service" ;;
        disable) rm "$WANTS/$3.service" ;;
        *) echo "$*" >>$TARGET/asked ;;
    esac
}}
enable_model_servers
disable_model_servers
"""
TWO_GPUS = "GPU 0: x\\nGPU 1: x\\n"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what bin/install needs to decide which model servers run."""
    for folder in ("wants", ".venv/bin", "deploy"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("settings.py", "helpers.py", "deploy/serve_models.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "image_queue", tmp_path / "image_queue")
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


def units(installed: Path, models: str, gpus: str = "") -> set[str]:
    """Which model servers are enabled after bin/install with these MODELS on a machine with these GPUs."""
    (installed / ".env").write_text(f"MODELS={models}\n")
    done = run(FAKES.format(installed, gpus))
    assert done.returncode == 0, done.stderr
    return {re.sub(r"model-server@(.*)\.service", r"\1", path.name) for path in (installed / "wants").iterdir()}


def test_install_enables_a_model_server_for_each_gpu_or_each_model(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL")
    assert units(installed, "") == {"0"}
    assert units(installed, "", TWO_GPUS) == {"0", "1"}
    (installed / "wants/model-server@mine.service").touch()  # enabled by hand

    assert units(installed, "ResNet50,models/dig.its.keras", TWO_GPUS) == {"ResNet50", "dig.its", "mine"}
    assert (installed / "asked").read_text().splitlines() == ["stop model-server@0", "stop model-server@1"]
    assert units(installed, "ResNet50,VGG16", TWO_GPUS) == {"ResNet50", "VGG16", "mine"}
    assert units(installed, "ResNet50", TWO_GPUS) == {"0", "1", "mine"}


@pytest.mark.parametrize(
    ("models", "reason"), [("a/x.h5,b/x.h5", "two models named x"), ("0.keras", "named 0: rename")]
)
def test_install_refuses_models_that_make_no_unit(installed: Path, models: str, reason: str) -> None:
    (installed / ".env").write_text(f"MODELS={models}\n")

    done = run(FAKES.format(installed, ""))

    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert reason in line
    assert list((installed / "wants").iterdir()) == []
