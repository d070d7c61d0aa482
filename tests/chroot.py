"""A bare Debian in a folder, made by `debootstrap`, for tests that install into a system.

Each command runs in new namespaces, so its mounts and processes always end with it.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import PATH, ROOT, Missing, need

# Mount what programs expect, then exec the command.
ENTER = """
set -eu
root=$1; shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for folder in $FOLDERS; do
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
done
[ -z "${NO_NETWORK:-}" ] || ip link set lo up
unset FOLDERS NO_NETWORK
exec chroot "$root" "$@"
"""
PASSED_ON = r"(?i)(https?|no)_proxy|SSL_CERT_FILE|LANG"


def need_root() -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--net", "true"], check=False).returncode:
        raise Missing("needs root and the right to create namespaces")


def make_base(folder: Path) -> Path:
    """Make a minimal system of the same release as this machine, with packages from the same mirror."""
    need_root()
    release, mirror = release_and_mirror()
    command = [need("debootstrap"), "--variant=minbase", release, str(folder), *([mirror] if mirror else [])]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stdout[-2000:]
    configure(folder)
    return folder


def release_and_mirror() -> tuple[str, str]:
    """Return the name of this machine's release, and the address of its packages; "" if apt does not know one."""
    release = re.findall(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)[0]
    targets = ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    pairs = [line.split() for line in subprocess.check_output(targets, text=True).splitlines()]
    return release, next((uri for name, uri in pairs if name == release), "")


def configure(root: Path) -> None:
    """Give apt and pip this machine's settings, and block the download of ResNet50's weights."""
    shutil.copytree("/etc/apt", root / "etc/apt", dirs_exist_ok=True, symlinks=True)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    # Otherwise the result would depend on the machine's network.
    (root / "etc/hosts").write_text("127.0.0.1 localhost storage.googleapis.com\n")
    (root / "etc/pip.conf").write_text("[global]\n" + "".join(f"{key} = {text}\n" for key, text in pip_settings()))
    for path in named_paths():
        if path.is_file():
            (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
    # As in container images, packages must not start services.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)


def pip_settings() -> list[tuple[str, str]]:
    """pip's settings on this machine, from its files and the environment."""
    listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    return list(dict(re.findall(r"^(?:global|:env:|install)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)).items())


def named_paths() -> list[Path]:
    """The certificates in SSL_CERT_FILE, and the files and folders that pip's settings name."""
    found = [Path(os.environ["SSL_CERT_FILE"])] if os.environ.get("SSL_CERT_FILE") else []
    for _, text in pip_settings():
        for word in text.split():
            if word.startswith("file://"):
                # A package index, whose files are in the same folder.
                found.append(Path(word.removeprefix("file://")).parent)
            elif word.startswith("/"):
                found.append(Path(word))
    return [path for path in found if path.exists()]


class Chroot:
    """A system in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if re.fullmatch(PASSED_ON, name)}
        return {**kept, "PATH": PATH, "HOME": "/root", "FOLDERS": " ".join(self.folders()), **more}

    def folders(self) -> list[str]:
        cache = Path.home() / ".cache/pip"
        return [str(path) for path in {*named_paths(), cache} if path.is_dir()]

    def run(
        self, script: str, *, network: bool = True, seconds: float = 300, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `script` in it. Without `network` it has only a loopback interface, where every port is free."""
        spaces = ["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        environment = self.environment(**(variables or {}))
        if not network:
            spaces.append("--net")
            environment["NO_NETWORK"] = "1"
        command = ["unshare", *spaces, "bash", "-c", ENTER, "enter", str(self.root), "bash", "-euc", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)

    def files(self, *without: str) -> dict[str, tuple[int, int, int, int]]:
        """Mode, owner, size and modification time of every file and folder, except those below `without`."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            inside = Path("/") / Path(folder).relative_to(self.root)
            folders[:] = [name for name in folders if str(inside / name) not in {"/proc", "/dev", "/tmp", *without}]
            for name in [*folders, *files]:
                about = os.lstat(Path(folder) / name)
                size = 0 if stat.S_ISDIR(about.st_mode) else about.st_size
                found[str(inside / name)] = (about.st_mode, about.st_uid, size, about.st_mtime_ns)
        return found


@contextmanager
def copy_of(base: Path) -> Iterator[Chroot]:
    folder = Path(tempfile.mkdtemp(prefix="keras-rest-api-chroot-"))
    folder.chmod(0o755)
    try:
        subprocess.run(["cp", "-a", "--reflink=auto", f"{base}/.", str(folder)], check=True)
        yield Chroot(folder)
    finally:
        shutil.rmtree(folder)


def copy_project(folder: Path) -> None:
    """Copy the files of a clone, including those that are not committed yet."""
    listed = subprocess.check_output(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
