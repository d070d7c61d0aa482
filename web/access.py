"""Who may post images, and how often: API_KEYS and RATE_LIMIT, which are off by default."""

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flask
from redis.exceptions import RedisError

import settings
from image_queue import WebQueue
from web.errors import WebError

if TYPE_CHECKING:
    from flask_limiter import RequestLimit


class Unauthorized(WebError):
    """The request has none of the keys in API_KEYS."""

    status, code = 401, "unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class RateLimited(WebError):
    """The client has used up its RATE_LIMIT, and may try again in `wait` seconds."""

    status, code = 429, "rate_limited"

    def __init__(self, wait: int) -> None:
        super().__init__(f"You have exceeded the limit of {settings.RATE_LIMIT}, so try again in {wait} seconds.")
        self.headers = {"Retry-After": str(wait)}


def check_key() -> None:
    """Raise Unauthorized unless the request has one of API_KEYS, or none is set."""
    if not key_hashes:
        return
    # Compare with every key, each in constant time, so that the duration reveals nothing about the keys.
    matches = [hmac.compare_digest(sent_key_hash(), known) for known in key_hashes]
    if not any(matches):
        raise Unauthorized("Send a key that the operator gave you, in the header Authorization: Bearer KEY.")


def sent_key_hash() -> str:
    """Return the hash of the key that the request sends after `Bearer`, whatever its bytes."""
    scheme, _, token = flask.request.headers.get("Authorization", "").partition(" ")
    return key_hash(token.strip(" ") if scheme.lower() == "bearer" else "")


def key_hash(key: str) -> str:
    """Return a hash to use wherever the key itself must not appear, such as in Redis."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


key_hashes = [key_hash(key) for key in settings.API_KEYS.split(",") if key]


def add_rate_limit(app: flask.Flask, queue: WebQueue) -> None:
    """Prepare `app` for check_rate(). Redis holds the counters, so the web processes share them."""
    if not settings.RATE_LIMIT:
        return
    from flask_limiter import Limiter  # noqa: PLC0415 - takes 2 MB, which only RATE_LIMIT needs

    logging.getLogger("flask-limiter").setLevel(logging.WARNING)  # at INFO it logs each rejected request
    # Reuse the queue's connections, with their password, TLS and time limits.
    storage: Any = {"connection_pool": queue.redis.connection_pool, "key_prefix": f"{queue.key}:limit"}
    limiter = Limiter(client_id, app=app, storage_uri="redis://", storage_options=storage, on_breach=limit_exceeded)

    @limiter.limit(settings.RATE_LIMIT)
    def count() -> None:
        """Count the request, through the decorator."""

    app.extensions["rate_limit"] = count


def check_rate() -> None:
    """Count the request. Raises RateLimited if RATE_LIMIT is used up."""
    if not settings.RATE_LIMIT:
        return
    extensions = flask.current_app.extensions
    try:
        extensions["rate_limit"]()
    except RedisError as error:
        # Better to lose the count than the request, which can still wait until Redis is back.
        extensions["queue"].log_redis_error(error, 1, "RATE_LIMIT is not enforced until it works again")


def client_id() -> str:
    """Return the identity to count by: the hash of the key, or without keys the IP address."""
    return sent_key_hash() if key_hashes else flask.request.remote_addr or "unknown"


def limit_exceeded(limit: "RequestLimit") -> None:
    """Raise RateLimited for a limit that is used up."""
    raise RateLimited(max(1, math.ceil(limit.reset_at - time.time())))
