"""Who may post to /predict, and how often: API_KEYS and RATE_LIMIT. Both are off unless set."""

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flask
from redis.exceptions import RedisError

import settings
from helpers import ServiceError
from image_queue import WebQueue

if TYPE_CHECKING:
    from flask_limiter import RequestLimit


class Unauthorized(ServiceError):
    """None of API_KEYS was sent."""

    status, code = 401, "unauthorized"


class RateLimited(ServiceError):
    """The client has made as many requests as RATE_LIMIT allows; `wait` is the seconds until the next may come."""

    status, code = 429, "rate_limited"

    def __init__(self, wait: int) -> None:
        super().__init__(f"You have sent more than {settings.RATE_LIMIT}, so try again in {wait} seconds.")
        self.wait = wait


def check_key() -> None:
    """Raise Unauthorized unless the request brings one of API_KEYS, or none is set."""
    if not key_hashes:
        return
    # Every key is compared, and in constant time, so that how long it takes tells nothing about any of them.
    matches = [hmac.compare_digest(given_key_hash(), known) for known in key_hashes]
    if not any(matches):
        raise Unauthorized("Send a key that the operator gave you, in the header Authorization: Bearer KEY.")


def given_key_hash() -> str:
    """Return the hash of what the request has after `Bearer`; whatever bytes it sent, that is not an error."""
    scheme, _, token = flask.request.headers.get("Authorization", "").partition(" ")
    return key_hash(token.strip(" ") if scheme.lower() == "bearer" else "")


def key_hash(key: str) -> str:
    """Return what stands for a key where the key itself need not be known, such as in Redis."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


key_hashes = [key_hash(key) for key in settings.API_KEYS.split(",") if key]


def rate_check(app: flask.Flask, queue: WebQueue) -> Callable[[], None]:
    """Return the function that counts the request, for all web processes in one place, and raises RateLimited."""
    if not settings.RATE_LIMIT:
        return lambda: None
    from flask_limiter import Limiter  # noqa: PLC0415 - 2 MB a process, which most do not need

    logging.getLogger("flask-limiter").setLevel(logging.WARNING)  # else a line for every request that it refuses
    # The queue's own connections: the same password, TLS and time limits.
    place: Any = {"connection_pool": queue.redis.connection_pool, "key_prefix": f"{queue.key}:limit"}
    limiter = Limiter(client, app=app, storage_uri="redis://", storage_options=place, on_breach=refuse_for_now)

    @limiter.limit(settings.RATE_LIMIT)
    def count() -> None:
        """Do what the decorator does, at a place of our choice: after the key, and before the body."""

    def check() -> None:
        try:
            count()
        except RedisError as error:
            # To lose the count is better than to lose the request: the queue waits for its Redis to come back.
            queue.log_redis_error(error, 1, "until it does, RATE_LIMIT lets everybody pass")

    return check


def client() -> str:
    """Return who is counted: the key, or without keys the address."""
    return given_key_hash() if key_hashes else flask.request.remote_addr or "unknown"


def refuse_for_now(limit: "RequestLimit") -> None:
    """Raise RateLimited for a limit that is used up."""
    raise RateLimited(max(1, math.ceil(limit.reset_at - time.time())))
