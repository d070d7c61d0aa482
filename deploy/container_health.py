"""The health checks of the containers. The exit code is 0 if the program in this container is healthy.

container_health.py web|model
"""

import json
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# While every web thread waits for an answer, /livez waits too, for as long as the longest request. Restarting that web
# would lose its requests.
GRACE = 10  # seconds beyond REQUEST_TIMEOUT


def web_lives() -> bool:
    """Whether Apache answers, within REQUEST_TIMEOUT + GRACE. Redis does not count: a restart would not repair it.

    Apache's own errors for a web that is busy or starting count as an answer.
    """
    limit = float(os.environ.get("REQUEST_TIMEOUT") or 60) + GRACE
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{os.environ['APP_PORT']}/livez", timeout=limit).close()
    except urllib.error.HTTPError as error:
        return error.code in (503, 504) and json.load(error)["success"] is False
    return True


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
    sys.exit(0 if healthy else {"web": "an error instead of /livez", "model": "no heartbeat"}[sys.argv[1]])
