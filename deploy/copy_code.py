"""Copy the project's files to the folder that bin/install serves them from, or remove them there.

    copy_code.py TARGET             copy what has changed, remove what the project no longer has, print both
    copy_code.py TARGET --remove    remove every file that was copied

TARGET/.installed-files lists what was copied. Other files in TARGET are left alone.
"""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def project_files(root: Path = ROOT) -> set[str]:
    """Return the project's files: those that git tracks; in an archive, those that .gitignore does not name."""
    if (root / ".git").exists() and shutil.which("git"):
        # git refuses to work in another user's clone unless the clone is declared safe.
        command = ["git", "-c", f"safe.directory={root}", "ls-files"]
        tracked = subprocess.check_output(command, cwd=root, text=True).splitlines()
        return {name for name in tracked if (root / name).is_file()}
    ignored = {".git", *(root / ".gitignore").read_text().split()}
    found: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not {name, f"{name}/"} & ignored]
        found |= {str(Path(folder, name).relative_to(root)) for name in files if name not in ignored}
    return found


def copy(target: Path) -> list[str]:
    """Copy changed files and remove those that the project no longer has. Return the names of all of them."""
    new, old = project_files(), listed(target)
    if "settings.py" not in new:
        sys.exit(f"no project files found in {ROOT}: is it a whole clone or archive?")
    write_list(target, new | old)  # so that --remove finds everything if this fails halfway
    changed = sorted(name for name in new if not same(ROOT / name, target / name))
    for name in changed:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one step, so that a running service never reads half a file.
        temporary = path.with_name(f"{path.name}.new")
        shutil.copyfile(ROOT / name, temporary)
        temporary.chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
        temporary.replace(path)
    remove(target, old - new)
    write_list(target, new)
    return changed + sorted(old - new)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same content."""
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def listed(target: Path) -> set[str]:
    """Return the names of the files that earlier runs copied."""
    path = target / ".installed-files"
    return set(path.read_text().splitlines()) if path.exists() else set()


def write_list(target: Path, names: set[str]) -> None:
    """Write the names of the copied files, unless the list is unchanged."""
    if names != listed(target):
        (target / ".installed-files").write_text("".join(f"{name}\n" for name in sorted(names)))


def remove(target: Path, names: set[str]) -> None:
    """Remove these files and the temporary files that an interrupted copy left."""
    for name in names:
        (target / name).unlink(missing_ok=True)
        (target / f"{name}.new").unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        if sys.argv[2:] == ["--remove"]:
            remove(Path(sys.argv[1]), listed(Path(sys.argv[1])))
        else:
            print("\n".join(copy(Path(sys.argv[1]))))
    except OSError as error:
        sys.exit(f"the code can't be copied: {error}")
