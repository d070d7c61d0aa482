"""Build the Dockerfile's images with buildah in a temporary folder."""

import os
import subprocess
from pathlib import Path

from chroot import copy_of, named_paths, need_root
from harness import ROOT, need

ALL = os.environ.get("BUILD_ALL_IMAGES") == "1"


class Storage:
    """A folder where buildah keeps images; `options` are the buildah options that select it."""

    def __init__(self, folder: Path) -> None:
        self.options = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]
        self.buildah = ["buildah", *self.options]

    def fill(self, debian: Path) -> list[str]:
        """Build the images on the bare Debian in the folder `debian`; return `options`."""
        need_root()
        need("buildah")
        with copy_of(debian) as system:
            keep_certificates(system.root)
            container = subprocess.check_output([*self.buildah, "from", "scratch"], text=True).strip()
            subprocess.run([*self.buildah, "add", "--quiet", container, str(system.root), "/"], check=True)
            subprocess.run([*self.buildah, "commit", "--quiet", "--rm", container, "base"], check=True)
        for target in ("web", "model") if ALL else ("web",):
            self.build(target)
        return self.options

    def build(self, target: str) -> None:
        mounts = [f"--volume={path}:{path}:ro" for path in named_paths() if path.is_dir()]
        options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", "--pull-never"]
        options += ["--build-arg", "BASE=localhost/base", "--target", target, "-t", target]
        command = [*self.buildah, "bud", *options, *mounts, "."]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
        assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]

    def empty(self) -> None:
        for command in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run([*self.buildah, *command], check=False, capture_output=True)


def keep_certificates(root: Path) -> None:
    """Let the image trust this machine's certificates even after the package ca-certificates is installed in it."""
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    if bundle.exists():
        kept = root / "usr/local/share/ca-certificates/this-machine.crt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(bundle.read_bytes())
