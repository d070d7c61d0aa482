"""Has the bin/serve that runs in this folder on PORT load its models again, for bin/serve --reload.

Its model servers are replaced one after the other, so that only one of them is in memory twice. The settings stay as
they were when bin/serve was started. Exit code 1: a model server was not replaced; a line says why.
"""

import os
import sys
from pathlib import Path

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))

import settings  # noqa: E402
from model_server.reload import NotReplaced, replace  # noqa: E402


def launchers() -> dict[int, str]:
    """Return the launchers of the running bin/serve: the pid of each, and the name of its program."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            lines = (folder / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        given = dict(line.split("=", 1) for line in lines if "=" in line)
        ours = given.get("APP_ROOT") == str(APP_ROOT) and given.get("APP_PORT") == str(settings.PORT)
        if ours and "model_server.launcher" in words:
            found[int(folder.name)] = given.get("SUPERVISOR_PROCESS_NAME", "model-server")
    return dict(sorted(found.items(), key=lambda each: each[1]))


def main() -> None:
    """Replace every model server, and print how it goes."""
    found = launchers()
    if not found:
        user = "" if os.geteuid() == 0 else " of yours"
        sys.exit(f"bin/serve: no bin/serve{user} runs here on port {settings.PORT}: start it, or set PORT.")
    failed = 0
    for pid, name in found.items():
        try:
            replace(pid, lambda text, name=name: print(f"* {name}: {text}", flush=True))  # type: ignore[misc]
        except NotReplaced as error:
            print(f"bin/serve: {name} was not replaced. {error}", file=sys.stderr)
            failed += 1
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
