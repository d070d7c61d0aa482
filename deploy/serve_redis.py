"""Which Redis bin/serve uses: somebody's own where one answers, else one that it starts; never another bin/serve's.

The Redis of a bin/serve ends with it, so a second one that relied on it would be left without. It is recognised by the
name of its configuration file, which INFO tells every client.
"""

import socket
import time
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError

import settings
from helpers import StartupError
from image_queue import ImageQueue, fault_of

CONFIGURATION = "bin-serve-redis.conf"  # in the run directory; not a name that others give theirs
ENDING = "ending"  # the file in a run directory that says so
ENDING_LIMIT = 10  # seconds that another bin/serve gets to end
TOLD_LIMIT = 100  # seconds that one gets which says that it is ending: a little more than serve.STOP_LIMIT
CLOSING_LIMIT = 1  # seconds that one may take from its last connection to its end
START_LIMIT = 30  # seconds that a Redis may take to start
PROBE_LIMIT = 2  # seconds


def redis_answers() -> bool:
    """Whether there is a Redis to use; where not, one may be started. Raises StartupError where neither is so."""
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
    """Whether the settings leave it to bin/serve to start a Redis."""
    return settings.REDIS_HOST in ("localhost", "127.0.0.1", "::1") and not settings.REDIS_URL


def port_answers() -> bool:
    """Whether something listens on REDIS_PORT of this machine, whatever it is."""
    with socket.socket() as probe:
        probe.settimeout(PROBE_LIMIT)
        return probe.connect_ex(("127.0.0.1", settings.REDIS_PORT)) == 0


def run_directory_of(queue: ImageQueue) -> Path | None:
    """Return the run directory of the bin/serve that started this Redis; None for any other. Raises RedisError."""
    path = Path(str(queue.redis.info("server").get("config_file", "")))
    return path.parent if path.name == CONFIGURATION else None


def wait_for_another_to_end(queue: ImageQueue) -> None:
    """Return when the Redis at hand is not another bin/serve's. Raises RedisError where none answers, or StartupError."""
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
            limit = TOLD_LIMIT if (directory / ENDING).exists() else ENDING_LIMIT
            if waited > limit:
                raise another_has_it(queue)
        except RedisError:
            # One that ends closes its connections a moment before its port.
            if waited > (limit or CLOSING_LIMIT) or not (is_local() and port_answers()):
                raise
        time.sleep(0.1)


def another_has_it(queue: ImageQueue) -> StartupError:
    """Return what to say of the Redis of another bin/serve."""
    if not is_local():
        return StartupError(
            f"the Redis at {queue.address} is another bin/serve's and ends with it: name one of your own."
        )
    return StartupError(
        f"port {settings.REDIS_PORT} has another bin/serve's Redis: stop that one, or {another_port()}."
    )


def another_port() -> str:
    """Return how to choose another port, for people."""
    return f"choose another port, as in REDIS_PORT={settings.REDIS_PORT % 65535 + 1} bin/serve"


def write_configuration(directory: Path) -> None:
    """Leave the file that our Redis is recognised by. Its options are in deploy/supervisor/supervisord.conf."""
    (directory / CONFIGURATION).write_text("# The Redis of a bin/serve.\n")


def started(directory: Path) -> bool:
    """Whether our own Redis answers. Raises StartupError when another bin/serve was faster."""
    queue = ImageQueue()
    try:
        found = run_directory_of(queue)
    except RedisError:
        return False
    if found != directory:
        raise (
            another_has_it(queue)
            if found
            else StartupError(
                f"another Redis has taken port {settings.REDIS_PORT} meanwhile: start bin/serve again to use it."
            )
        )
    queue.check()
    return True


def why_not_started(directory: Path) -> str:
    """Return the last line that our Redis wrote."""
    with suppress(OSError, IndexError):
        return (directory / "redis.log").read_text(errors="replace").splitlines()[-1]
    return "it wrote nothing"


def fault(queue: ImageQueue, error: RedisError) -> str:
    """Return what is wrong with the Redis of the settings, and what to do, in one sentence without the full stop."""
    reason = (str(error) or type(error).__name__).rstrip(".").splitlines()[0]
    said = f"Redis at {queue.address} {fault_of(error)} ({reason})"
    return f"{said}; or {another_port()}" if is_local() else said
