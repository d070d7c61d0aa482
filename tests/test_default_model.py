"""Which model is served if MODEL is not set: ResNet50 if its weights are available, otherwise the bundled model."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import keras
import pytest
from harness import ROOT, free_port, running, wait_until

import settings
from helpers import StartupError
from model_server import applications, downloads, model_file
from model_server.downloads import keras_downloads

sys.path.insert(0, str(ROOT / "deploy"))

import default_model

BUNDLED = "models/efficientnet_lite0.keras"
DESCRIPTION = "1,000 ImageNet classes: animals, plants, food, vehicles, things"
WEIGHTS, CLASSES = default_model.RESNET50_FILES
NO_RESOLVER = "import socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(20)"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where nothing is set and Keras' cache is empty."""
    monkeypatch.setattr(settings, "MODEL", "ResNet50")
    monkeypatch.setattr(settings, "MODEL_WEIGHTS", "imagenet")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def answering(said: bytes, then: Callable[[], object] = bool) -> Iterator[str]:
    """The URL of a server that sends `said` in reply to any request, and then calls `then`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(said)
                        then()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/weights"


def fill_cache(monkeypatch: pytest.MonkeyPatch, **wrong: bytes) -> None:
    """Put small files into Keras' cache instead of 100 MB, with matching MD5 sums except for those in `wrong`."""
    folder = keras_downloads()
    folder.mkdir(parents=True)
    for name in default_model.RESNET50_FILES:
        (folder / name).write_bytes(name.encode())
    sums = {name: hashlib.md5(name.encode()).hexdigest() for name in default_model.RESNET50_FILES}
    monkeypatch.setattr(default_model, "RESNET50_FILES", sums)
    for name, content in wrong.items():
        (folder / {"weights": WEIGHTS, "classes": CLASSES}[name]).write_bytes(content)


def serving_line(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the only line that says which model is served and, if it is not ResNet50, why."""
    [line] = [each for each in capfd.readouterr().out.splitlines() if "Serving" in each]
    return line


@pytest.mark.parametrize(
    ("address", "reason"),
    [(f"http://127.0.0.1:{free_port()}/", "Connection refused"),
     ("http://nowhere.invalid/", "[Nn]ame|resolution|no answer within"),
     (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "HTTP Error 403: Forbidden"),
     (b"\0\1 this is no HTTP\r\n\r\n", "this is no HTTP"), (b"", "closed|reset"),
     ("http://127.0.0.1:port/", "nonnumeric port")],
    ids=["refused", "no DNS", "403", "garbage", "hangs up", "no port"],
)  # fmt: skip
def test_bundled_model_is_served_without_internet_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str | bytes, reason: str
) -> None:
    with answering(address if isinstance(address, bytes) else b"") as url:
        monkeypatch.setattr(default_model, "WEIGHTS_URL", url if isinstance(address, bytes) else address)

        assert default_model.choose() == BUNDLED

    line = serving_line(capfd)
    assert re.search(reason, line)
    assert DESCRIPTION in line
    assert f"put {WEIGHTS} and {CLASSES} there" in line
    assert f"complete in {keras_downloads()}" in line
    [section] = re.findall('docs/models.md says under "(.*?)"', line)
    assert f"\n## {section}\n" in (ROOT / "docs/models.md").read_text()


@pytest.mark.parametrize("silent", ["server", "resolver"])
def test_network_that_drops_everything_delays_the_start_only_briefly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, silent: str
) -> None:
    monkeypatch.setattr(default_model, "PROBE_LIMIT", 1)
    release = threading.Event()
    if silent == "resolver":  # its own timeout can be a minute
        (tmp_path / "sitecustomize.py").write_text(NO_RESOLVER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with answering(b"", lambda: release.wait(20)) as url:
        monkeypatch.setattr(default_model, "WEIGHTS_URL", url)
        begun = time.monotonic()

        assert default_model.choose() == BUNDLED

        assert time.monotonic() - begun < 3
        release.set()
    assert "(no answer within 1 seconds)" in serving_line(capfd)


def test_cached_resnet50_is_served_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fill_cache(monkeypatch)
    monkeypatch.setattr(default_model, "WEIGHTS_URL", f"http://127.0.0.1:{free_port()}/")

    assert default_model.choose() == "ResNet50"
    assert serving_line(capfd) == f"* Serving ResNet50, which recognizes {DESCRIPTION}"


@pytest.mark.parametrize("wrong", ["weights", "classes"])
def test_partial_file_in_the_cache_does_not_count(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    fill_cache(monkeypatch, **{wrong: b"half of"})
    monkeypatch.setattr(default_model, "WEIGHTS_URL", f"http://127.0.0.1:{free_port()}/")

    assert default_model.choose() == BUNDLED


def test_md5_sums_are_those_of_keras() -> None:
    sources = "".join(
        (Path(keras.applications.resnet.__file__).parents[2] / "src/applications" / name).read_text()
        for name in ("resnet.py", "imagenet_utils.py")
    )

    assert all(digest in sources for digest in default_model.RESNET50_FILES.values())


@pytest.mark.parametrize(
    ("program", "reason"),
    [("import sys; sys.exit('noise\\nretrieval incomplete: got only 5 out of 9 bytes')",
      "retrieval incomplete: got only 5 out of 9 bytes"),
     ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
     ("import time; time.sleep(60)", "not complete after 1 seconds")],
    ids=["cut off", "killed", "slow"],
)  # fmt: skip
def test_bundled_model_is_served_if_the_download_fails_or_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str, reason: str
) -> None:
    monkeypatch.setattr(default_model, "FETCH", [sys.executable, "-c", program])
    monkeypatch.setattr(default_model, "FETCH_LIMIT", 1 if "sleep" in program else 60)
    with answering(OK) as url:
        monkeypatch.setattr(default_model, "WEIGHTS_URL", url)

        assert default_model.choose() == BUNDLED

    assert f"({reason})" in serving_line(capfd)


def test_resnet50_is_served_after_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "FETCH", [sys.executable, "-c", ""])
    with answering(OK) as url:
        monkeypatch.setattr(default_model, "WEIGHTS_URL", url)

        assert default_model.choose() == "ResNet50"


def test_random_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MODEL_WEIGHTS", "random")
    monkeypatch.setattr(default_model, "WEIGHTS_URL", f"http://127.0.0.1:{free_port()}/")

    assert default_model.choose() == "ResNet50"


@pytest.mark.parametrize(
    ("said", "reason"),
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf", "retrieval incomplete"),
     (b"HTTP/1.1 200 OK\r\n\r\nanother file", "Incomplete or corrupted file"), (b"HTTP/1.1 200 O", "timed out"),
     (b"", "closed|reset")],
    ids=["half", "another file", "stalls", "hangs up"],
)  # fmt: skip
def test_broken_download_by_keras_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: bytes, reason: str
) -> None:
    """Keras raises a different error in each case, and some errors do not name the URL."""
    monkeypatch.setattr(downloads, "DOWNLOAD_TIMEOUT", 0.3)
    release = threading.Event()
    with answering(said, lambda: release.wait(5 if said.endswith(b"200 O") else 0)) as url:
        with pytest.raises(StartupError) as refused:
            downloads.download(
                lambda: keras.utils.get_file("x", url, cache_dir=tmp_path, cache_subdir="", file_hash=32 * "0")
            )
        release.set()

    assert re.search(reason, str(refused.value))
    assert str(refused.value).endswith(f"or set MODEL={BUNDLED}, which needs no download.")


def test_resnet50_has_the_description_of_the_bundled_model() -> None:
    assert model_file.read(ROOT / "models/efficientnet_lite0.json").description == applications.IMAGENET == DESCRIPTION


def test_container_serves_the_chosen_model_and_can_stop_while_choosing(tmp_path: Path) -> None:
    """Runs the Dockerfile's command, which must not look for the weights if MODEL is set."""
    stage = (ROOT / "Dockerfile").read_text().split(" AS model\n")[1]
    [command] = re.findall(r"^CMD \[(.*)\]$", stage, re.MULTILINE)
    program = [sys.executable, *re.findall(r'"(.*?)"', command)[1:]]
    given = {**os.environ, "MODEL": "nowhere.keras", "https_proxy": "http://127.0.0.1:1"}
    refused = subprocess.run(program, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False)
    with answering(b"", lambda: time.sleep(20)) as url:
        proxy = {"MODEL": "", "KERAS_HOME": str(tmp_path), "https_proxy": url}
        with running(program, tmp_path / "log", **proxy) as process:
            wait_until(lambda: handles(process.popen.pid, signal.SIGTERM), "it handles SIGTERM")
            begun = time.monotonic()

            assert process.stop(signal.SIGTERM) == 0

            assert time.monotonic() - begun < 3
            assert process.log == ""  # it had not chosen yet
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("nowhere.keras does not exist: it must be the path of a .keras or .h5 file.")


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    found = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(found[0], 16) >> (number - 1) & 1)
