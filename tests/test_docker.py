"""Dockerfile and compose.yaml, without Docker: buildah builds the images, and the tests run them as compose.yaml says.

They use the image's command, user and variables, compose's variables and tmpfs, a read-only file system and no
capabilities. The model server's image is built only with BUILD_ALL_IMAGES=1, since that installs 2 GB. Without it, the
tests run the model server of this machine instead.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from chroot import need_root
from container_images import ALL
from harness import ROOT, Process, Service, free_port, need, run_redis, running, wait_until
from redis import Redis

from helpers import model_name

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OF_CONTAINERS = {"REDIS_HOST", "METRICS_PORT", "METRICS_HOST"}  # their defaults are different there
OF_BIN_SERVE = {"PORT", "MODEL_SERVERS"}
OF_APACHE = {"APACHE_DEFINES", "TRUSTED_PROXIES"}  # no settings: deploy/apache/run-private reads them
CAT = (ROOT / "images/cat.jpg").read_bytes()

# Do what Docker does: separate mounts and host name, then run the command as the image's user, without capabilities.
ENTER = """
set -eu
root=$1; shift
hostname "$NAME"
mount --bind "$root" "$root"
mount -o bind,remount,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for place in $TMPFS; do
    options=${place#*:}
    [ "$options" != "$place" ] || options=mode=1777
    mount -t tmpfs -o "$options" tmpfs "$root${place%%:*}"
done
user=$USER_INSIDE
cd "$root"
exec chroot "$root" setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs --bounding-set=-all \\
    env -i -C "$FOLDER" "$@"
"""


class Image:
    """An image in `storage`, mounted in the folder `root`."""

    def __init__(self, storage: list[str], name: str) -> None:
        self.buildah = ["buildah", *storage]
        self.name = name
        about = json.loads(self.run("inspect", "--type", "image", name))
        self.config: dict[str, Any] = about["Docker"]["config"]
        self.root = self.run("mount", self.run("from", "--pull-never", name))

    def run(self, *arguments: str) -> str:
        return subprocess.check_output([*self.buildah, *arguments], text=True, timeout=120).strip()

    def enter(self, service: dict[str, Any], command: list[str], **more: str) -> tuple[list[str], dict[str, str]]:
        """Return the command and the environment that run `command` in the image as compose.yaml says."""
        inside = dict(each.split("=", 1) for each in self.config["Env"]) | defaults(service) | more
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        variables = [f"{name}={text}" for name, text in inside.items()]
        about = {
            "NAME": self.name, "TMPFS": " ".join(service["tmpfs"]), "USER_INSIDE": self.config["User"],
            "FOLDER": self.config["WorkingDir"],
        }  # fmt: skip
        return [*unshare, "bash", "-c", ENTER, "enter", self.root, *variables, *command], about

    @contextmanager
    def running(self, service: dict[str, Any], log: Path, **more: str) -> Iterator[Process]:
        log.touch()
        log.chmod(0o666)  # the container's user writes to it
        command, about = self.enter(service, self.config["Cmd"], **more)
        with running(command, log, **about) as process:
            try:
                yield process
            finally:
                if process.alive:  # unshare does not pass signals on to its child
                    os.kill(inner(process), signal.SIGKILL)

    def health_error(self, service: dict[str, Any], **more: str) -> str:
        """Return the error of the image's health check; empty if it passes."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        command, about = self.enter(service, command, **more)
        done = subprocess.run(command, env=os.environ | about, capture_output=True, text=True, timeout=60, check=False)
        return done.stderr.strip() or "unhealthy" if done.returncode else ""


def interpolated(text: str, **given: str) -> str:
    """Return a value of compose.yaml with the variables in `given`, or their defaults."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda each: given.get(each[1]) or each[2], text)


def defaults(service: dict[str, Any], **given: str) -> dict[str, str]:
    """Return the environment of a service in compose.yaml if only the variables in `given` are set."""
    found = {name: given.get(name) if text is None else interpolated(str(text), **given)
             for name, text in service["environment"].items()}  # fmt: skip
    return {name: text for name, text in found.items() if text is not None}


def inner(process: Process) -> int:
    """Return the pid of the first process in the container, to which Docker sends signals."""
    children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
    return int(wait_until(lambda: children.read_text().split(), "the container has started")[0])


@pytest.fixture(scope="module")
def storage(images_to_come: Future[list[str]]) -> list[str]:
    """buildah's options for the storage that has the images."""
    return images_to_come.result()


@contextmanager
def model_server(storage: list[str], log: Path, **settings: str) -> Iterator[None]:
    """Run the model server's image and check its health. Without ALL, run its command on this machine instead."""
    if not ALL:
        [command] = re.findall(r"^CMD (.*)$", (ROOT / "Dockerfile").read_text().split(" AS model\n")[1], re.MULTILINE)
        no_weights = {"MODEL": "", "KERAS_HOME": str(log.parent), "https_proxy": "http://127.0.0.1:1"}
        with running([sys.executable, *json.loads(command)[1:]], log, **settings, **no_weights) as process:
            process.wait_for_log("* Joined the queue")
            yield
        return
    image, service = Image(storage, "model"), SERVICES["model"]
    settings |= {"METRICS_PORT": str(free_port()), "https_proxy": "http://127.0.0.1:1"}
    assert image.health_error(service, **settings) == "no heartbeat"
    tmpfs = [*service["tmpfs"], "/var/cache/keras-rest-api:mode=0755"]  # instead of the volume
    with image.running(service | {"tmpfs": tmpfs}, log, **settings) as process:
        process.wait_for_log("* Joined the queue")
        assert image.health_error(service, **settings) == ""
        yield
        os.kill(inner(process), signal.SIGTERM)
        assert process.popen.wait(60) == 0


@pytest.mark.timeout(1200)
def test_hardened_images_answer_and_stop_when_all_is_answered(
    storage: list[str], redis_port: int, redis: Redis, tmp_path: Path
) -> None:
    port, name = free_port(), f"queue-{free_port()}"
    settings = {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis_port), "IMAGE_QUEUE": name}
    more = settings | {"APP_PORT": str(port)}
    image, service = Image(storage, "web"), SERVICES["web"]
    assert "Connection refused" in image.health_error(service, **more)
    with image.running(service, tmp_path / "web", **more) as process:
        wait_until(lambda: not image.health_error(service, **more) or not process.alive, "the web is healthy")
        assert process.alive, process.log
        web = Service(f"http://127.0.0.1:{port}", name)
        with model_server(storage, tmp_path / "first", **settings):
            assert web.label(CAT) == "Egyptian_cat"

        # Requests that are waiting when the web gets its stop signal are answered by a model server that starts later.
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(web.label, CAT) for _ in range(8)]
            wait_until(lambda: redis.llen(name) == 8, "all are in the queue")
            os.kill(inner(process), getattr(signal, image.config["StopSignal"]))
            wait_until(lambda: refused(web.url), "the web accepts no more requests")
            assert process.alive
            with model_server(storage, tmp_path / "model", **settings):
                assert [each.result(60) for each in asked] == 8 * ["Egyptian_cat"]
        assert process.popen.wait(30) == 0


def refused(url: str) -> bool:
    try:
        return not requests.get(f"{url}/livez", timeout=5)
    except requests.RequestException:
        return True


def test_web_image_has_no_tensorflow_and_only_the_files_it_needs(storage: list[str]) -> None:
    image = Image(storage, "web")
    packages = {path.name for path in Path(image.root).glob("opt/keras-rest-api/.venv/lib/python3*/site-packages/*")}
    files = {path.name for path in Path(image.root, "opt/keras-rest-api").iterdir()}

    assert "flask" in packages
    assert not {name for name in packages if re.match("tensorflow|keras", name)}
    assert {"settings.py", "run_web_server.py", "keras_rest_api_app.wsgi", "deploy", "models"} <= files
    assert not files & {".git", ".env", "tests", "bin", "README.md", "bench", "benchmarks"}
    models = {path.name for path in Path(image.root, "opt/keras-rest-api/models").iterdir()}
    assert models == {path.name for path in (ROOT / "models").iterdir() if path.suffix in (".keras", ".json", ".txt")}
    assert {"digits.json", "efficientnet_lite0.json", "efficientnet_lite0.LICENSE.txt"} <= models
    assert not list(Path(image.root, "opt/keras-rest-api/deploy").glob("serve*"))


@pytest.mark.images
def test_image_contains_the_code_and_the_models_with_their_files(tmp_path: Path) -> None:
    """Builds an image from a context that has files of each kind and the project's .dockerignore."""
    need_root()
    buildah = [need("buildah"), "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"),
               "--storage-driver", "overlay"]  # fmt: skip
    included = {"settings.py", "requirements/service.txt", "requirements/constraints.txt", "app.wsgi",
                "web/static/page.js", "deploy/apache/a.conf", "images/cat.jpg", "image_queue/take.lua",
                "models/own.keras", "models/own.json", "models/own.labels.txt", "models/own.h5",
                "models/classes.txt", "model_server/a.py",
                "models/nested/own.json"}  # fmt: skip
    excluded = {".env", ".git/config", "README.md", "tests/test_it.py", "bin/serve", "models/digits/three.png",
                "models/train.py", "models/__pycache__/train.pyc", "deploy/serve.py", "deploy/serve_redis.py",
                "deploy/remove.sh", "deploy/copy_code.py",
                "deploy/systemd/a.service", "requirements/bench.txt", "requirements/dev.txt", "compose.yaml",
                "Dockerfile"}  # fmt: skip
    context = tmp_path / "context"
    for name in included | excluded:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("")
    shutil.copy(ROOT / ".dockerignore", context)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    try:
        subprocess.run([*buildah, "bud", "--isolation", "chroot", "-q", "-t", "it", str(context)], check=True,
                       capture_output=True, timeout=60)  # fmt: skip
        root = Path(Image(buildah[1:], "it").root)
        assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == included
    finally:
        subprocess.run([*buildah, "rm", "--all"], check=False, capture_output=True)
        subprocess.run([*buildah, "rmi", "--all", "--force"], check=False, capture_output=True)


def test_redis_of_compose_starts_and_passes_its_health_check(tmp_path: Path) -> None:
    port = free_port()
    command = [interpolated(word, REDIS_PORT=str(port)) for word in SERVICES["redis"]["command"]]
    kind, *check = [interpolated(word, REDIS_PORT=str(port)) for word in SERVICES["redis"]["healthcheck"]["test"]]
    assert (command[0], kind) == ("redis-server", "CMD")
    with run_redis(tmp_path / "log", port, *command[1:]) as process:
        client = Redis(port=port)
        wait_until(lambda: "Ready to accept" in process.log, "Redis is up")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert subprocess.check_output(check) == b"PONG\n"


def test_compose_names_existing_targets_and_publishes_only_the_web() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {each["build"]["target"] for each in SERVICES.values() if "build" in each} <= targets
    assert [name for name, each in SERVICES.items() if "ports" in each] == ["web"]
    for service in SERVICES.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
    gpu = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]
    assert gpu.keys() <= SERVICES.keys()
    requirements = (ROOT / gpu["model"]["build"]["args"]["REQUIREMENTS"]).read_text()
    assert re.findall(r"^(\w+)\[", requirements, re.MULTILINE) == ["jax", "tensorflow"]
    assert interpolated(gpu["model"]["environment"]["KERAS_BACKEND"], KERAS_BACKEND="jax") == "jax"
    assert interpolated(gpu["model"]["environment"]["KERAS_BACKEND"]) == "tensorflow"
    assert {name for each in SERVICES.values() for name in each.get("volumes", []) if name[0].isalpha()} == {
        f"{name}:/var/cache/keras-rest-api" for name in COMPOSE["volumes"]
    }


@pytest.mark.parametrize("name", ["web", "model"])
def test_every_variable_of_compose_is_a_setting_with_its_default(name: str) -> None:
    code = "import settings, json; print(json.dumps({k: v for k, v in vars(settings).items() if k.isupper()}))"
    bare = [sys.executable, "-c", code]
    ours = {key: text for key, text in defaults(SERVICES[name]).items() if key not in OF_CONTAINERS | OF_APACHE}

    plain = json.loads(subprocess.check_output(bare, cwd=ROOT, env={"PATH": os.environ["PATH"]}))
    composed = json.loads(subprocess.check_output(bare, cwd=ROOT, env={"PATH": os.environ["PATH"], **ours}))

    assert ours.keys() <= plain.keys()
    assert composed == plain


READ_BY = {
    "web": ["run_web_server.py", "web/*.py", "image_queue/*.py"],
    "model": ["run_model_server.py", "model_server/**/*.py", "image_queue/*.py", "web/image_*.py"],
}


@pytest.mark.parametrize("name", READ_BY)
def test_every_setting_reaches_the_container_that_reads_it(name: str) -> None:
    sources = [path.read_text() for pattern in READ_BY[name] for path in ROOT.glob(pattern)]
    read = {each for source in sources for each in re.findall(r"\bsettings\.([A-Z_]+)\b", source)}
    read -= {"EXIT_BAD_SETTING", "METRICS_HOST", *OF_BIN_SERVE}  # METRICS_HOST is fixed: all addresses

    composed = defaults(SERVICES[name], **dict.fromkeys(read, "given"))

    assert {each for each in read if composed.get(each) != "given"} == set()


def test_compose_passes_every_setting_except_those_of_bin_serve() -> None:
    passed = {each for name in READ_BY for each in SERVICES[name]["environment"]} - OF_APACHE
    code = "import settings; print(*(name for name in vars(settings) if name.isupper()))"
    ours = set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())

    assert passed == ours - {"EXIT_BAD_SETTING"} - OF_BIN_SERVE


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, "redis:6379"),
        ({"REDIS_HOST": "redis.example"}, "redis.example:6379"),
        ({"REDIS_HOST": "redis.example", "REDIS_PORT": "6380"}, "redis.example:6380"),
        ({"REDIS_PORT": "6380"}, "redis:6380"),
        ({"REDIS_HOST": "redis.example", "REDIS_URL": "redis://other.example:7000/1"}, "other.example:7000"),
    ],
)
def test_both_programs_use_the_redis_that_is_set(given: dict[str, str], address: str) -> None:
    composed, others = (
        {key: text for key, text in defaults(SERVICES[name], **given).items() if key.startswith("REDIS_")}
        for name in ("web", "model")
    )
    assert composed == others
    code = "from image_queue import ImageQueue; print(ImageQueue().address)"

    bare = {"PATH": os.environ["PATH"], **composed}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=bare, text=True).strip() == address


def test_shorter_request_timeout_needs_no_other_setting_in_compose() -> None:
    """The defaults of REDIS_TIMEOUT and CLIENT_SLEEP depend on REQUEST_TIMEOUT, so compose must not set them."""
    code = "import settings; print(settings.REDIS_TIMEOUT, settings.CLIENT_SLEEP)"
    bare = {"PATH": os.environ["PATH"], **defaults(SERVICES["web"], REQUEST_TIMEOUT="2")}

    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=bare, text=True) == "1.0 1.0\n"


def test_compose_models_has_a_model_server_for_each_model() -> None:
    """The first is served by the service `model`, each other one by a service of its name."""
    services = yaml.safe_load((ROOT / "compose.models.yaml").read_text())["services"]
    [listed] = {each["environment"]["MODELS"] for each in services.values()}
    first, *others = [model_name(each) for each in listed.split(",")]

    assert services.keys() == {"web", "model", *others}
    assert [each for each in listed.split(",") if not (ROOT / each).is_file()] == []
    for name in others:
        assert services[name]["extends"] == {"file": "compose.yaml", "service": "model"}
        command = services[name]["command"]
        assert command == [".venv/bin/python", "-m", "model_server.launcher", "--model", name, "--gpu", "0"]
    assert "command" not in services["model"]
    chosen = "from helpers import default_model; print(default_model())"
    given = {"PATH": os.environ["PATH"], **defaults(SERVICES["model"]), **services["model"]["environment"]}
    printed = subprocess.check_output([sys.executable, "-c", chosen], cwd=ROOT, env=given, text=True)
    assert printed.strip() == first


@pytest.mark.parametrize(
    ("prefix", "host", "healthy"),
    [
        ("image_queue", "here", True),
        ("image_queue:digits", "here", True),
        ("image_queue:digits", "elsewhere", False),
        ("another_queue", "here", False),
        ("image_queue:taken", "here-2", False),
    ],
)
def test_container_is_healthy_while_a_server_of_any_model_beats_there(
    redis: Redis, prefix: str, host: str, healthy: bool
) -> None:
    name = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    redis.set(f"{prefix}:server:{host.replace('here', name)}-0a1b2c-0.1234abcd", "{}", ex=60)
    check = [sys.executable, "deploy/container_health.py", "model"]

    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode == 0) is healthy, done.stderr


def test_stop_grace_period_is_longer_than_a_request() -> None:
    seconds = {name: int(SERVICES[name]["stop_grace_period"].rstrip("s")) for name in ("web", "model")}

    assert seconds["web"] > float(defaults(SERVICES["web"])["REQUEST_TIMEOUT"])
    assert seconds["model"] >= 60
    assert shlex.split((ROOT / "Dockerfile").read_text().split("STOPSIGNAL")[1])[0] == "SIGWINCH"
