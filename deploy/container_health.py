"""The health checks of the Dockerfile. The exit code is 0 if the program in this container is healthy.

container_health.py web|model
"""

import os
import re
import socket
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def web_lives() -> bool:
    """Whether Apache and a web process answer. Redis does not count: restarting the web would not repair it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['APP_PORT']}/livez", timeout=4) as answer:
        return bool(answer.status == 200)


def model_serves() -> bool:
    """Whether a model server of this host has a heartbeat, for any model. Its name begins with the host name."""
    import settings  # noqa: PLC0415 - slow to import, and the web's check must be quick
    from image_queue import ImageQueue  # noqa: PLC0415

    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    queue = ImageQueue()
    heartbeat = re.compile(rf"{re.escape(settings.IMAGE_QUEUE)}(:[\w.-]+)?:server:{re.escape(host)}-\w+-\d+\.\w+")
    keys = queue.redis.scan_iter(f"{settings.IMAGE_QUEUE}:*server:{host}-*", count=1000)
    return any(heartbeat.fullmatch(key.decode()) for key in keys)


CHECKS = {"web": web_lives, "model": model_serves}

if __name__ == "__main__":
    try:
        healthy = CHECKS[sys.argv[1]]()
    except Exception as error:  # `docker inspect` shows this line
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(0 if healthy else "no heartbeat")
