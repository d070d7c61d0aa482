"""Chooses the Redis for bin/serve: one that already runs, otherwise a new one, never that of another bin/serve.

A Redis that bin/serve starts also ends with it, so nothing else may rely on it. INFO reports the name of its
configuration file, which identifies it.
"""

import socket
import time
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError

import settings
from helpers import StartupError
from image_queue import ImageQueue, fault_of

CONFIGURATION = "bin-serve-redis.conf"  # in the run directory; only bin/serve uses this name
ENDING = "ending"  # this file in the run directory says that its bin/serve is ending
ENDING_LIMIT = 10  # seconds to wait for another bin/serve that is not ending yet
STOPPING_LIMIT = 100  # seconds to wait for another that is already ending: a little more than serve.STOP_LIMIT
CLOSING_LIMIT = 1  # seconds for which an ending Redis keeps its port after closing its connections
START_LIMIT = 30  # seconds that our Redis may take to start
PROBE_LIMIT = 2  # seconds to connect to REDIS_PORT


def redis_answers() -> bool:
    """Whether a Redis that we can use already runs. Raises StartupError if we can neither use one nor start our own."""
    queue = ImageQueue()
    try:
        wait_for_another_to_end(queue)
        queue.check()
    except RedisError as error:
        if is_local() and not port_answers():
            return False
        raise StartupError(f"{fault(queue, error)}.") from None
    print(f"* Using the Redis at {queue.address}", flush=True)
    return True


def is_local() -> bool:
    """Whether the settings allow bin/serve to start a Redis."""
    return settings.REDIS_HOST in ("localhost", "127.0.0.1", "::1") and not settings.REDIS_URL


def port_answers() -> bool:
    """Whether any program listens on REDIS_PORT of this machine."""
    with socket.socket() as probe:
        probe.settimeout(PROBE_LIMIT)
        return probe.connect_ex(("127.0.0.1", settings.REDIS_PORT)) == 0


def run_directory_of(queue: ImageQueue) -> Path | None:
    """Return the run directory of the bin/serve that started this Redis; None for other Redis. Raises RedisError."""
    path = Path(str(queue.redis.info("server").get("config_file", "")))
    return path.parent if path.name == CONFIGURATION else None


def wait_for_another_to_end(queue: ImageQueue) -> None:
    """Return once the Redis does not belong to another bin/serve.

    Raises RedisError if no Redis answers, StartupError if the other bin/serve keeps running.
    """
    begun = time.monotonic()
    limit = 0
    while True:
        waited = time.monotonic() - begun
        try:
            directory = run_directory_of(queue)
            if directory is None:
                return
            if not limit:
                print(f"* Another bin/serve has the Redis at {queue.address}: waiting for it to end", flush=True)
            limit = STOPPING_LIMIT if (directory / ENDING).exists() else ENDING_LIMIT
            if waited > limit:
                raise owned_by_another(queue)
        except RedisError:
            # An ending Redis closes its connections a moment before its port.
            if waited > (limit or CLOSING_LIMIT) or not (is_local() and port_answers()):
                raise
        time.sleep(0.1)


def owned_by_another(queue: ImageQueue) -> StartupError:
    """Return the error to raise if the Redis belongs to another bin/serve."""
    if not is_local():
        return StartupError(
            f"the Redis at {queue.address} belongs to another bin/serve and ends with it: use one of your own."
        )
    return StartupError(
        f"port {settings.REDIS_PORT} has another bin/serve's Redis: stop that one, or {another_port()}."
    )


def another_port() -> str:
    """Return the advice to choose another port, for an error message."""
    return f"choose another port, as in REDIS_PORT={settings.REDIS_PORT % 65535 + 1} bin/serve"


def write_configuration(directory: Path) -> None:
    """Write the file whose name identifies our Redis. Its options are in deploy/supervisor/supervisord.conf."""
    (directory / CONFIGURATION).write_text("# The Redis of a bin/serve.\n")


def started(directory: Path) -> bool:
    """Whether our own Redis answers. Raises StartupError if another Redis took the port first."""
    queue = ImageQueue()
    try:
        found = run_directory_of(queue)
    except RedisError:
        return False
    if found is None:
        raise StartupError(f"another Redis has just taken port {settings.REDIS_PORT}: start bin/serve again to use it.")
    if found != directory:
        raise owned_by_another(queue)
    queue.check()
    return True


def why_not_started(directory: Path) -> str:
    """Return the last line that our Redis logged."""
    with suppress(OSError, IndexError):
        return (directory / "redis.log").read_text(errors="replace").splitlines()[-1]
    return "it logged nothing"


def fault(queue: ImageQueue, error: RedisError) -> str:
    """Return what is wrong with the Redis and what to do, as a sentence without a period."""
    reason = (str(error) or type(error).__name__).rstrip(".").splitlines()[0]
    text = f"Redis at {queue.address} {fault_of(error)} ({reason})"
    return f"{text}; or {another_port()}" if is_local() else text
