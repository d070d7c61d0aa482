"""bin/serve starts everything with one command, reports problems in one line, and leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from chroot import copy_project
from harness import (
    AS_INSTALLED,
    PATH,
    ROOT,
    Service,
    apache_of,
    free_port,
    make_certificates,
    model_servers,
    need,
    processes_with,
    responds,
    run_redis,
    running,
    variables,
    wait_until,
    web_processes,
)
from redis import Redis

import settings

sys.path.insert(0, str(ROOT / "deploy"))

import serve
import serve_redis

from helpers import StartupError

SERVE = str(ROOT / "bin/serve")
# Like bin/serve, but requests in flight get 2 seconds to finish, instead of 30.
SERVE_IMPATIENTLY = [sys.executable, "-c", "import serve; serve.DRAIN_LIMIT = 2; serve.main()"]
DIGITS = {"MODEL": str(ROOT / "models/digits.keras")}
THREE, CAT = ((ROOT / name).read_bytes() for name in ("models/digits/three.png", "images/cat.jpg"))
NO_INTERNET = {"https_proxy": "http://127.0.0.1:1"}  # nothing listens there


@pytest.fixture
def nothing_cached(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without internet and with nothing cached, and free ports."""
    need("apache2")
    ports = {"PORT": str(free_port()), "REDIS_PORT": str(free_port()), "REDIS_HOST": "localhost"}
    return {**ports, **NO_INTERNET, "KERAS_HOME": str(tmp_path / "keras")}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder to use as TMPDIR, which any user may write to. Other tests use /tmp meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="keras-rest-api-test-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def files_of_ours(temporary: Path) -> set[Path]:
    """The files that bin/serve could leave: in the project's folder, except .venv and caches, and in `temporary`."""
    ours = {
        path for path in ROOT.rglob("*") if not re.search(r"\.venv|cache|\.hypothesis", str(path.relative_to(ROOT)))
    }
    return {*ours, *temporary.iterdir()}


@pytest.mark.slow("warms up the bundled model")
def test_it_serves_the_bundled_model_and_ctrl_c_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, nothing_cached: dict[str, str], temporary: Path, tmp_path: Path
) -> None:
    monkeypatch.delenv("MODEL")
    files = files_of_ours(temporary)
    mark = nothing_cached["REDIS_PORT"]
    with running([SERVE], tmp_path / "log", **nothing_cached, TMPDIR=str(temporary)) as process:
        process.wait_for_log("* Ready on port")

        assert "* Serving the bundled model EfficientNet-Lite0, which recognizes 1,000 ImageNet classes" in process.log
        [pasted] = re.findall(r"^ +(curl .*)$", process.log, re.MULTILINE)
        answer = subprocess.check_output(pasted, shell=True, cwd=ROOT, text=True, timeout=60)
        assert_answered_as_the_readme_shows(pasted, nothing_cached["PORT"], answer)

        [run_directory] = {variables(pid)["RUN_DIR"] for pid in processes_with(mark) if "RUN_DIR" in variables(pid)}
        assert Path(run_directory).is_relative_to(temporary)

        [killed] = model_servers(mark)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: model_servers(mark) - {killed}, "supervision starts another model server")
        process.wait_for_log("* Joined the queue", times=2)
        assert requests.get(f"http://localhost:{nothing_cached['PORT']}/readyz", timeout=10).ok

        everything = descendants(process.popen.pid)
        with ThreadPoolExecutor(4) as pool:
            asked = in_flight(nothing_cached, pool)
            process.send(signal.SIGINT)
            wait_until(lambda: not connects(nothing_cached["PORT"]), "it accepts no more requests")
            thaw(*model_servers(mark))
            assert [each() for each in asked] == 4 * ["Egyptian_cat"]
        assert process.popen.wait(60) == 0

    assert processes_with(mark) == set()
    assert not still_there(everything)
    assert not files_of_ours(temporary) - files


def assert_answered_as_the_readme_shows(pasted: str, port: str, answer: str) -> None:
    """The command on README's first screen is the one that bin/serve prints, and the answer is the same."""
    [(command, shown)] = re.findall(r"^\$ (curl -F .*predict)\n(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command.replace("8080", port) == pasted
    got, expected = (json.loads(text)["predictions"] for text in (answer, shown))
    assert [each["label"] for each in got] == [each["label"] for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-3)


def descendants(pid: int) -> dict[int, dict[str, str]]:
    """A process and its descendants, each with its entry in /proc."""
    family, found = {pid}, {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name)):
        with suppress(OSError):  # it has just ended
            status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", (folder / "status").read_text(), re.MULTILINE))
            if int(folder.name) == pid or int(status["PPid"]) in family:
                family.add(int(folder.name))
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = {**status, "command": command}
    return found


def still_there(processes: dict[int, dict[str, str]]) -> dict[int, str]:
    """The processes that have not ended."""
    return {pid: each["command"] for pid, each in processes.items() if descendants(pid)}


def in_flight(environment: dict[str, str], pool: ThreadPoolExecutor) -> list[Callable[[], str]]:
    """Freeze the model server and send 4 images. Once all of them wait, return functions that give their labels."""
    for pid in model_servers(environment["REDIS_PORT"]):
        os.kill(pid, signal.SIGSTOP)
    service = Service(f"http://127.0.0.1:{environment['PORT']}")
    redis = Redis(port=int(environment["REDIS_PORT"]), socket_timeout=5)
    asked = [pool.submit(service.label, CAT) for _ in range(4)]
    wait_until(lambda: sum(redis.llen(key) for key in redis.keys("image_queue*") if redis.type(key) == b"list") == 4,
               "all of them wait")  # fmt: skip
    return [each.result for each in asked]


def thaw(*processes: int) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def listeners(pid: int) -> set[str]:
    """The addresses that a process listens on, as the kernel writes them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    return {row[1].split(":")[0] for row in tcp_sockets() if row[3] == "0A" and row[9] in inodes}


def tcp_sockets() -> list[list[str]]:
    """The rows of /proc/net/tcp and tcp6, split into columns."""
    return [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]


@pytest.mark.slow("starts bin/serve")
def test_it_serves_the_model_of_the_settings_file(
    monkeypatch: pytest.MonkeyPatch, nothing_cached: dict[str, str], temporary: Path, tmp_path: Path
) -> None:
    monkeypatch.delenv("MODEL")
    copy_project(temporary)
    (temporary / ".venv").symlink_to(ROOT / ".venv")
    (temporary / ".env").write_text("MODEL=models/digits.keras\n")

    with running([str(temporary / "bin/serve")], tmp_path / "log", **nothing_cached) as process:
        process.wait_for_log("* Ready on port")

        assert "bundled model" not in process.log
        three = (ROOT / "models/digits/three.png").read_bytes()
        url = f"http://localhost:{nothing_cached['PORT']}/predict"
        assert requests.post(url, files={"image": three}, timeout=60).json()["predictions"][0]["label"] == "3"


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
MAY_BE_ROOT = r"deploy/serve\.py|model_server\.launcher|supervisor\.supervisord|^\S*apache2 "


@pytest.mark.slow("starts bin/serve")
def test_redis_listens_on_loopback_only_and_little_runs_as_root(nothing_cached: dict[str, str], tmp_path: Path) -> None:
    """With API_KEYS set, the printed command takes the key from the environment."""
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

    assert '"success":true' in answer
    assert key not in process.log
    assert heard
    assert heard <= LOOPBACK
    assert {"redis-server", "python", "apache2"} <= {each["Name"] for each in family.values()}
    if os.geteuid() == 0:
        roots = [each for each in family.values() if "0" in each["Uid"].split()]
        assert [each["command"] for each in roots if not re.search(MAY_BE_ROOT, each["command"])] == []
        assert sum(each["Name"] == "apache2" for each in roots) == 1


@pytest.fixture
def impatient(nothing_cached: dict[str, str]) -> dict[str, str]:
    return nothing_cached | DIGITS | {"PYTHONPATH": f"{ROOT}/deploy:{AS_INSTALLED['PYTHONPATH']}"}


@pytest.mark.slow("waits for time limits to pass")
def test_processes_that_wait_for_a_frozen_redis_are_not_left_behind(impatient: dict[str, str], tmp_path: Path) -> None:
    mark, port = impatient["REDIS_PORT"], impatient["PORT"]
    with running(SERVE_IMPATIENTLY, tmp_path / "log", **impatient) as process:
        process.wait_for_log("* Ready on port")
        everything = descendants(process.popen.pid)
        [redis] = [pid for pid, each in everything.items() if each["command"].startswith("redis-server")]
        os.kill(redis, signal.SIGSTOP)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(Service(f"http://127.0.0.1:{port}").post, THREE) for _ in range(4)]
            wait_until(lambda: waiting_requests(port) == 4, "all of them wait")

            assert process.stop(signal.SIGTERM) == 0

            assert not still_there(everything)
            assert processes_with(mark) == set()
            assert all(isinstance(each.exception(10), requests.RequestException) for each in asked)


def waiting_requests(port: str) -> int:
    """How many connections to the port are open."""
    return sum(row[1].endswith(f":{int(port):04X}") and row[3] == "01" for row in tcp_sockets())


@pytest.mark.slow("waits for time limits to pass")
def test_bin_serve_killed_with_a_frozen_web_process_leaves_nothing(impatient: dict[str, str], tmp_path: Path) -> None:
    """Its first Apache was killed. The processes that it left must not keep the port from the next one."""
    url = f"http://127.0.0.1:{impatient['PORT']}"
    with running(SERVE_IMPATIENTLY, tmp_path / "log", **impatient) as process:
        process.wait_for_log("* Ready on port")
        old = web_processes(url)
        os.kill(apache_of(url), signal.SIGKILL)
        wait_until(
            lambda: set(web_processes(url)) - set(old) and not set(web_processes(url)) & set(old), "a new Apache"
        )
        wait_until(lambda: responds(url), "it answers")
        everything = descendants(process.popen.pid)
        os.kill(web_processes(url)[0], signal.SIGSTOP)

        process.stop(signal.SIGKILL)

        wait_until(lambda: not still_there(everything), "all processes have ended")


@pytest.mark.slow("starts bin/serve three times")
def test_two_on_one_redis_port_never_share_a_redis(nothing_cached: dict[str, str], tmp_path: Path) -> None:
    """If two start at once, one serves. A third, started while that one stops, gets its own Redis."""
    environment = nothing_cached | DIGITS
    port = environment["REDIS_PORT"]
    with (
        running([SERVE], tmp_path / "first", **environment) as first,
        running([SERVE], tmp_path / "second", **environment | {"PORT": str(free_port())}) as second,
    ):
        wait_until(lambda: not (first.alive and second.alive), "one of them gives up", 60)
        winner, loser = (first, second) if first.alive else (second, first)
        winner.wait_for_log("* Ready on port")
        assert f"port {port} has another bin/serve's Redis: stop that one, or choose another port" in loser.log
        assert f"REDIS_PORT={int(port) + 1} bin/serve" in loser.log
        assert "* Ready" not in loser.log
        assert "Traceback" not in loser.log

        environment["PORT"] = str(free_port())
        with running([SERVE], tmp_path / "third", **environment) as third:
            third.wait_for_log("* Another bin/serve has the Redis")
            assert winner.stop() == 0
            third.wait_for_log("* Ready on port")
            assert Service(f"http://127.0.0.1:{environment['PORT']}").label(THREE) == "3"
            assert_refused(port)


def assert_refused(port: str) -> None:
    """A bin/serve that starts now stops with one line, because the other keeps running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_redis, "ENDING_LIMIT", 0.3)
        patch.setattr(settings, "REDIS_PORT", int(port))
        with pytest.raises(StartupError, match=f"port {port} has another bin/serve's Redis"):
            serve_redis.redis_answers()
        with pytest.raises(StartupError, match=f"port {port} has another bin/serve's Redis"):
            serve_redis.started(Path("/tmp/keras-rest-api-ours"))
        patch.setattr(settings, "REDIS_URL", f"redis://127.0.0.1:{port}/0")
        with pytest.raises(StartupError, match="ends with it: use one of your own"):
            serve_redis.redis_answers()


@pytest.mark.slow("starts bin/serve")
def test_running_redis_is_used_but_never_replaced_or_stopped(nothing_cached: dict[str, str], tmp_path: Path) -> None:
    """bin/serve is started in another folder and serves a model from there."""
    port = nothing_cached["REDIS_PORT"]
    url = f"http://127.0.0.1:{nothing_cached['PORT']}"
    shutil.copy(ROOT / "models/digits.keras", tmp_path / "own.keras")
    shutil.copy(ROOT / "models/digits.labels.txt", tmp_path / "own.labels.txt")
    nothing_cached["MODEL"] = "own.keras"
    with run_redis(tmp_path / "redis", int(port)) as own:
        wait_until(lambda: connects(port), "Redis is up")
        with running(["env", "-C", str(tmp_path), SERVE], tmp_path / "log", **nothing_cached) as process:
            process.wait_for_log("* Ready on port")
            assert f"* Using the Redis at localhost:{port}" in process.log
            own.stop(signal.SIGKILL)
            wait_until(lambda: requests.get(f"{url}/readyz", timeout=20).status_code == 503, "it is reported missing")
            assert not [each for each in descendants(process.popen.pid).values() if "redis-server" in each["command"]]
            with run_redis(tmp_path / "redis", int(port)) as again:
                wait_until(lambda: requests.get(f"{url}/readyz", timeout=20).ok, "it is used again")
                assert process.stop() == 0
                assert again.alive


def one_line(environment: dict[str, str]) -> str:
    """Run bin/serve, which must fail; return its one line of errors."""
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


def test_taken_port_is_reported_in_one_line(nothing_cached: dict[str, str]) -> None:
    port = nothing_cached["PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        assert f"port {port} is taken: choose another" in one_line(nothing_cached | {"MODEL": "ResNet50"})


def test_port_that_is_released_in_a_moment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(settings, "PORT", listener.getsockname()[1])
        threading.Timer(0.3, listener.close).start()

        assert serve.free_port() == settings.PORT


def test_redis_port_of_another_program_is_reported(nothing_cached: dict[str, str], tmp_path: Path) -> None:
    port = nothing_cached["REDIS_PORT"]
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port]
    with running(command, tmp_path / "log"):
        wait_until(lambda: connects(port), "something listens")

        assert f":{port} is not a Redis, so check" in one_line(nothing_cached | {"MODEL": "ResNet50"})


def connects(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a Redis with TLS, without it, and with a user that has few rights."""
    folder = tmp_path_factory.mktemp("guarded")
    files = make_certificates(folder)
    port, tls_port = free_port(), free_port()
    tls = {"tls-port": str(tls_port), "tls-cert-file": files["certificate"], "tls-key-file": files["key"],
           "tls-ca-cert-file": files["ca"], "tls-auth-clients": "no"}  # fmt: skip
    options = [word for name, text in tls.items() for word in (f"--{name}", text)]
    with run_redis(folder / "log", port, *options) as process:
        wait_until(lambda: "Ready to accept" in process.log or not process.alive, "Redis is up")
        assert process.alive, process.log
        client = Redis(port=port)
        client.acl_setuser("weak", enabled=True, passwords=["+secret"], commands=["+ping"])
        client.config_set("requirepass", "secret")
        yield {"plain": f"127.0.0.1:{port}", "tls": f"127.0.0.1:{tls_port}", "ca": files["ca"],
               "other": make_certificates(folder, "other")["ca"]}  # fmt: skip


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://:secret-wrong@{plain}", "rejects the password"),
        ("redis://nobody:secret@{plain}", "rejects the password"),
        ("redis://{plain}", "requires a password, so set it in REDIS_URL"),
        ("redis://weak:secret@{plain}", "does not grant this user the permissions"),
        ("redis://:secret@{plain}/99", "has no database with this number"),
        ("rediss://:secret@{plain}", "does not answer over TLS"),
        ("redis://:secret@{tls}", "if it requires TLS, begin REDIS_URL with rediss://"),
        ("rediss://:secret@{tls}?ssl_ca_certs={other}", "presents an untrusted certificate"),
        ("rediss://:secret@{tls}?ssl_ca_certs={ca}.away", "REDIS_URL names a file that does not exist"),
        ("unix:///no/such.sock", "REDIS_URL names a file that does not exist"),
        ("redis://127.0.0.1:1", "does not answer, so start it"),
    ],
)
def test_redis_that_refuses_us_is_reported_with_the_reason(
    guarded: dict[str, str], monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setattr(settings, "REDIS_URL", url.format(**guarded))
    monkeypatch.setattr("image_queue.connection.SOCKET_GRACE", 0.5)

    with pytest.raises(StartupError) as refused:
        serve_redis.redis_answers()

    assert reason in str(refused.value)
    assert ("does not answer" in str(refused.value)) is ("answer" in reason)
    assert "secret" not in str(refused.value)


def test_redis_in_protected_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake server sends the reply that other machines get: this machine may have no address but loopback."""
    reply = b"-DENIED Redis is running in protected mode because protected mode is enabled.\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=deny, args=(server, reply), daemon=True).start()
        monkeypatch.setattr(settings, "REDIS_URL", f"redis://127.0.0.1:{server.getsockname()[1]}")

        with pytest.raises(StartupError, match=r"accepts only local connections \(protected mode\), so set a password"):
            serve_redis.redis_answers()


def deny(server: socket.socket, reply: bytes) -> None:
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(reply)


def test_remote_redis_that_does_not_answer_is_reported_in_one_line(nothing_cached: dict[str, str]) -> None:
    line = one_line(nothing_cached | {"MODEL": "ResNet50", "REDIS_URL": f"redis://:secret@127.0.0.1:{free_port()}"})

    assert "does not answer" in line
    assert "secret" not in line


@pytest.mark.slow("starts bin/serve, which imports Keras twice")
def test_resnet50_without_internet_says_which_file_goes_where(nothing_cached: dict[str, str], tmp_path: Path) -> None:
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


def test_missing_packages_without_root_and_sudo_are_reported_in_one_line() -> None:
    """Shell functions simulate a machine without the packages."""
    lacking = "missing_packages() { echo redis-server; }; id() { echo 1000; }; command() { [ $2 != sudo ]; }"

    ended = setup(f"{lacking}; setup_packages")

    assert ended.returncode == 1
    assert "run 'apt-get install redis-server' as root" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow("makes a virtual environment")
def test_python_packages_without_a_network_fail_in_one_line(tmp_path: Path) -> None:
    app = Path(tempfile.mkdtemp(dir=tmp_path))
    for folder in ("bin", "requirements"):
        shutil.copytree(ROOT / folder, app / folder)
    offline = {
        "PIP_INDEX_URL": "http://127.0.0.1:1/",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": "",
    }

    ended = setup("setup_venv requirements/service.txt", app, **offline)

    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("is there a network?\n")
