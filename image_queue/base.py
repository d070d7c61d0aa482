"""Shared by both sides of the queue: connections, key names, checks of Redis, live model servers."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import cache
from threading import Lock
from typing import Any, cast

from redis import Redis

import settings
from image_queue.connection import QueuePool, connect, info_of_primary
from image_queue.diagnosis import connection_limit, fault_of, risks_of, why_unusable
from image_queue.errors import UnusableRedis
from image_queue.parsing import parse_object

log = logging.getLogger(__name__)

CountJobs = Callable[[str, int], None]  # called with an event and the number of jobs
IMAGES_REFUSED = "images are refused"


class Connections:
    """The connections of a process to Redis, and what check() found. The queues of all models share them."""

    def __init__(self) -> None:
        self.redis = connect()  # the first command connects
        self.unusable = False
        self.risks: list[str] = []  # each completes a sentence that begins with the name of the Redis
        self.logged_at: dict[str, float] = {}
        self.log_lock = Lock()


class ImageQueue:
    """What both sides of the queue share. WebQueue and ServerQueue add the handling of jobs."""

    def __init__(self, count: CountJobs = lambda event, times: None, key: str = "") -> None:
        """Use the queue `key` (default: IMAGE_QUEUE).

        `count` is called with each event, for the metrics. The web's events are queued and retried (pushed again). A
        model server's are taken, expired, recovered (from a dead server), given_up (after too many crashes) and dropped
        (malformed).
        """
        self.count = count
        self.key = key or settings.IMAGE_QUEUE
        self.connections = Connections()

    def taken_key(self, server: str) -> str:
        """Return the key of the taken list of `server`."""
        return f"{self.key}:taken:{server}"

    def server_key(self, server: str) -> str:
        """Return the key of the heartbeat of `server`."""
        return f"{self.key}:server:{server}"

    def result_key(self, job_id: str) -> str:
        """Return the key of the answer to a job."""
        return f"{self.key}:result:{job_id}"

    def accepted_key(self, job_id: str) -> str:
        """Return the key of a job's accepted marker."""
        return f"{self.key}:accepted:{job_id}"

    @property
    def redis(self) -> Redis:
        """The client for Redis."""
        return self.connections.redis

    @property
    def risks(self) -> list[str]:
        """What may cost requests although Redis is usable, as the last check() found."""
        return self.connections.risks

    @property
    def shape_key(self) -> str:
        """The key of the image shape that the last heartbeat gave."""
        return f"{self.key}:shape"

    @property
    def address(self) -> str:
        """The address of Redis for messages, or of its Sentinels, without the passwords."""
        at = self.pool.connection_kwargs
        if "sentinels" in at:
            return str(at["sentinels"])
        return cast(str, at.get("path")) or f"{at.get('host')}:{at.get('port')}"

    @property
    def pool(self) -> QueuePool:
        """The connections of this process."""
        return cast(QueuePool, self.redis.connection_pool)

    def live_servers(self) -> dict[str, dict[str, Any]]:
        """Return the content of each live model server's heartbeat, by the server's name. Raises RedisError."""
        keys = sorted(self.redis.scan_iter(self.server_key("*"), count=1000))
        beats = self.redis.mget(keys) if keys else []
        return {server_of(key): parse_object(beat) for key, beat in zip(keys, beats, strict=True) if beat}

    def live_servers_by_queue(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the same for the queues of all models, by the queue's key. Raises RedisError."""
        keys = sorted(self.redis.scan_iter(f"{settings.IMAGE_QUEUE}:*server:*", count=1000))
        beats = self.redis.mget(keys) if keys else []
        queues: dict[str, dict[str, dict[str, Any]]] = {}
        for key, beat in zip(keys, beats, strict=True):
            if beat and b":server:" in key:
                queue = key.decode("utf-8", "replace").rpartition(":server:")[0]
                queues.setdefault(queue, {})[server_of(key)] = parse_object(beat)
        return queues

    def waiting(self) -> int:
        """Return the number of waiting jobs. Raises RedisError."""
        return self.redis.llen(self.key)

    def pending_by_queue(self, queues: Iterable[str]) -> dict[str, int]:
        """Return how many jobs each of these queues has: waiting, or in a taken list. Raises RedisError.

        The taken list of a dead server counts too, since its jobs will be requeued. All lengths are read at once;
        otherwise a job that is taken meanwhile would count twice or never.
        """
        queues, prefix = set(queues), f"{settings.IMAGE_QUEUE}:*taken:*"
        taken = {key: queue_of_taken(key) for key in self.redis.scan_iter(prefix, count=1000, _type="list")}
        lists = [(queue, queue) for queue in queues] + [item for item in taken.items() if item[1] in queues]
        with self.redis.pipeline(transaction=True) as together:
            for key, _ in lists:
                together.llen(key)
            lengths = together.execute()
        pending = dict.fromkeys(queues, 0)
        for (_, queue), length in zip(lists, lengths, strict=True):
            pending[queue] += length
        return pending

    def check(self) -> None:
        """Check whether this Redis is usable, and set `risks` to what may still make requests fail.

        Raises UnusableRedis if the service can never work with it, NotPrimary while it is a replica, and RedisError
        if it does not answer or rejects a write.
        """
        info = info_of_primary(self.redis)
        fault = why_unusable(info)
        self.connections.unusable = bool(fault)
        if fault:
            raise UnusableRedis(self.address, fault)
        self._limit_connections(connection_limit(info))
        self.redis.delete(f"{self.key}:never")  # deletes nothing, but fails if other writes would fail
        self.connections.risks = risks_of(info)

    def warn(self) -> None:
        """Log the risks that check() found, each once per process."""
        for risk in self.risks:
            _warn_once(f"Redis at {self.address} {risk}.")

    def _limit_connections(self, limit: int) -> None:
        """Set how many images of this process may be in flight at once. WebQueue overrides this."""

    def log_redis_error(self, error: Exception, pause: float, consequence: str = "") -> None:
        """Log what is wrong with Redis, once per attempt even if many threads fail at the same time.

        `consequence` says what happens next; by default, another attempt after `pause` seconds.
        """
        logged_at = self.connections.logged_at
        with self.connections.log_lock:
            if time.monotonic() < logged_at.get(consequence, 0.0) + pause / 2:
                return
            logged_at[consequence] = time.monotonic()
        consequence = consequence or "trying again" + (f" in {pause:.1f} s" if pause else "")
        reason = (str(error) or type(error).__name__).rstrip(".").splitlines()[0]
        details = "" if isinstance(error, UnusableRedis) else f" ({reason})"
        log.warning("Redis at %s %s%s; %s", self.address, fault_of(error), details, consequence)


def server_of(key: bytes) -> str:
    """Return the name of the model server from the key of its taken list or heartbeat."""
    return key.decode("utf-8", "replace").rpartition(":")[2]


def queue_of_taken(key: bytes) -> str:
    """Return the queue that the taken list `key` belongs to; another key gives a name that no queue has."""
    return key.decode("utf-8", "replace").rpartition(":taken:")[0]


@cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)
