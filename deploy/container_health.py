"""Whether the program of this container is healthy, by the exit code: for Dockerfile's health checks.

python deploy/container_health.py web|model
"""

import os
import re
import socket
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def web_lives() -> bool:
    """Whether Apache and a web process answer; not whether Redis does, which to start the web again would not mend."""
    with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['APP_PORT']}/livez", timeout=4) as answer:
        return bool(answer.status == 200)


def model_serves() -> bool:
    """Whether a model server of this host has a heartbeat, whose name begins with the host's."""
    from image_queue import ImageQueue  # noqa: PLC0415 - the web's check runs every few seconds

    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    return any(re.fullmatch(rf"{re.escape(host)}-\w+-\d+\.\w+", name) for name in ImageQueue().live_servers())


CHECKS = {"web": web_lives, "model": model_serves}

if __name__ == "__main__":
    try:
        healthy = CHECKS[sys.argv[1]]()
    except Exception as error:  # whatever it is, one line of it is what `docker inspect` shows
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(0 if healthy else "no heartbeat")
