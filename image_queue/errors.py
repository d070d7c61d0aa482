"""The errors of the queue. web/errors.py has the HTTP status of each."""

from helpers import ServiceError, StartupError


class QueueFull(ServiceError):
    """There is no room for another image, such as when MAX_QUEUE jobs are waiting."""

    code = "queue_full"


class RedisDown(ServiceError):
    """The job could not be queued: Redis did not answer for REDIS_TIMEOUT, or it is unusable."""

    code = "redis_down"


class NoModelServer(ServiceError):
    """The queue is full and no model server is alive."""

    code = "no_model_server"


class ResultTimeout(ServiceError):
    """The job was queued, but its deadline passed without an answer."""

    code = "timeout"


class HeartbeatExpired(Exception):
    """The heartbeat expired, so other model servers may have reclaimed the jobs. Join again."""


class UnusableRedis(StartupError):
    """The service can never work with this Redis; `fault` says why, in the words of fault_of()."""

    def __init__(self, address: str, fault: str) -> None:
        super().__init__(f"Redis at {address} {fault}.")
        self.fault = fault
