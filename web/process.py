"""Set up a web process: memory, open files, log, temporary folder, cores, and the thread that watches Redis."""

import logging
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from redis.exceptions import RedisError

import settings
from helpers import M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, log_to_stderr, pauses, set_malloc
from image_queue import CLOSE_SURPLUS_EVERY, IMAGES_REFUSED, UnusableRedis, WebQueue
from web.cores import share_of
from web.storage import choose_temporary_folder
from web.turns import CLAIM_EVERY, Turns

log = logging.getLogger(__name__)

LARGE_BLOCK = 2**21  # bytes
MOST_FREE = 2**22  # bytes
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # environment variable of prometheus_client


def set_up_process() -> None:
    """Set up malloc, the file limit, the log and the temporary folder. Call this before create_app()."""
    limit_malloc()
    allow_many_files()
    log_to_stderr(settings.LOG_FORMAT)
    choose_temporary_folder()
    for line in settings.warnings():
        log.warning(line)


def limit_malloc() -> None:
    """Make malloc use one arena, and keep up to MOST_FREE bytes that are free at its end.

    By default, hundreds of threads fragment eight arenas per core: a process grew from 64 to 200 MB in a thousand
    requests. Giving memory back that the next photo takes again would cost an eighth of the time of a request, for page
    faults. Larger blocks, as of large photos, are given back at once.
    """
    set_malloc(M_ARENA_MAX, 1)
    set_malloc(M_MMAP_THRESHOLD, LARGE_BLOCK)
    set_malloc(M_TRIM_THRESHOLD, MOST_FREE)


def allow_many_files() -> None:
    """Raise the limit on open files: each waiting request has three, and a common limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def web_processes() -> int | None:
    """Return how many web processes Apache runs; None outside of Apache."""
    return getattr(sys.modules.get("mod_wsgi"), "maximum_processes", None)


def keep_to_own_cores(turns: Turns) -> None:
    """Keep this process on its share of the cores. While an older process still has it, a thread waits for it.

    With a quota of CPU time there is no share: other containers may use the same cores, and would choose the same ones.
    Surplus processes, beyond one for each core, use all cores.
    """
    if not turns.processes or turns.count < len(turns.cores.all):
        return
    if not _keep_to_own_cores(turns):
        threading.Thread(target=_wait_for_own_cores, args=[turns], name="own-cores", daemon=True).start()


def _keep_to_own_cores(turns: Turns) -> bool:
    number = turns.number()
    if number is None or not turns.processes:
        return False
    turns.cores.keep_to(share_of(turns.cores.all, number, turns.processes))
    return True


def _wait_for_own_cores(turns: Turns) -> None:
    while not _keep_to_own_cores(turns):
        time.sleep(CLAIM_EVERY)
    _keep_to_own_cores(turns)  # again, for threads that were started meanwhile


def watch_redis(queue: WebQueue) -> None:
    """Start a thread that logs problems of Redis at startup, then closes idle connections every few seconds."""
    threading.Thread(target=_watch_redis, args=[queue], name="watch-redis", daemon=True).start()


def _watch_redis(queue: WebQueue) -> None:
    for pause in pauses():
        try:
            queue.check()
            queue.warn()
            break
        except RedisError as error:
            queue.log_redis_error(error, pause)
            time.sleep(pause)
        except UnusableRedis as error:
            queue.log_redis_error(error, 60, IMAGES_REFUSED)
            break
    while True:
        time.sleep(CLOSE_SURPLUS_EVERY)
        queue.pool.close_surplus()


def shared_folder() -> Path:
    """Return the folder that the web processes of one Apache share, for metrics and locks. Raises OSError.

    It is PROMETHEUS_MULTIPROC_DIR, or by default a temporary folder with the pid of their parent, Apache, in its name.
    Anybody may write to /tmp, so the folder must belong to this user.
    """
    if os.environ.get(METRICS_FOLDER):
        return Path(os.environ[METRICS_FOLDER])
    folder = Path(tempfile.gettempdir(), f"keras-rest-api-metrics-{os.geteuid()}-{os.getppid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
