"""What is wrong with a Redis, in plain words: why it is unusable, what may cost requests, what an error means.

Each text completes a sentence that begins with the name of the Redis, such as "rejects the password, so ...".
"""

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    InvalidResponse,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

import settings
from image_queue.connection import MAX_CONNECTIONS, Info, NotPrimary
from image_queue.errors import UnusableRedis
from image_queue.sentinel import PrimaryNotFound, UnknownPrimary

OLDEST_REDIS = 7  # the first with script flags, which allow taking and answering jobs when Redis is out of memory
# One process may use a tenth of maxclients, which leaves connections for the other web processes, the model servers and
# the operator.
PROCESS_SHARE = 10
LOW_LIMIT = 64  # with fewer connections, a web process has only a batch or two in flight, so log a warning


def why_unusable(info: Info) -> str:
    """Return why the service can't work with a Redis whose INFO is `info`; "" if it can."""
    version = str(info.get("redis_version", "unknown"))
    number = re.match(r"\d+", version)
    mode = info.get("redis_mode") or info.get("server_mode")  # Valkey has the second
    if "dragonfly_version" in info:
        return "is Dragonfly, which can't run the service's scripts, so use Redis or Valkey"
    if mode == "cluster" or info.get("cluster_enabled") == 1:
        return "is a Redis Cluster, which spreads a queue over servers, so use a Redis with cluster mode off"
    if mode == "sentinel":
        return "is a Sentinel, which holds no data, so begin REDIS_URL with sentinel:// and add the primary's name"
    if not number or int(number[0]) < OLDEST_REDIS:
        return f"is version {version}, but {OLDEST_REDIS} or newer is needed"
    return ""


def connection_limit(info: Info) -> int:
    """Return how many images of one process may be in flight at once; each holds a connection."""
    maxclients = info.get("maxclients")
    if not isinstance(maxclients, int) or maxclients <= 0:
        return MAX_CONNECTIONS
    return max(1, maxclients // PROCESS_SHARE)


def risks_of(info: Info) -> list[str]:
    """Return what may cost requests although Redis is usable."""
    risks, policy = [], info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", 0) and policy != "noeviction":
        risks.append(
            f"evicts keys when its memory is full (maxmemory-policy {policy}), which loses accepted images, so set "
            "maxmemory-policy noeviction, or give the service its own Redis with REDIS_URL"
        )
    limit = connection_limit(info)
    if limit < LOW_LIMIT:
        risks.append(
            f"allows {info['maxclients']} connections (maxclients), so each web process has at most {limit} images in "
            "flight and the others wait; raise maxclients to 1000 or more"
        )
    return risks


CLUSTER = "is a Redis Cluster, so use a Redis with cluster mode off"
NO_ANSWER = "does not answer, so start it or check REDIS_*"
NO_ANSWER_OVER_TLS = "does not answer over TLS, so start it, or begin REDIS_URL with redis:// if it has no TLS"
CLOSED = "closed the connection, so check its log; if it requires TLS, begin REDIS_URL with rediss://"
CLOSED_OVER_TLS = (
    "closed the connection, so check its log; if it requires a client certificate, set ssl_certfile in REDIS_URL"
)
REPLICA = "is a read-only replica, so wait for the fail-over to end, or point REDIS_* at the primary"
PRIMARY_DOWN = "does not answer, so wait until its Sentinels name another primary, or start it"
FAIL_OVER = "changes its primary, so wait for the fail-over to end"
PRIMARY_DOWN_OVER_TLS = f"{PRIMARY_DOWN}; if it has no TLS, begin REDIS_URL with sentinel://"
# What some texts become, by the scheme of REDIS_URL.
BY_SCHEME = {
    "rediss": {NO_ANSWER: NO_ANSWER_OVER_TLS, CLOSED: CLOSED_OVER_TLS},
    "sentinel": {NO_ANSWER: PRIMARY_DOWN, REPLICA: FAIL_OVER, CLOSED: CLOSED.replace("rediss", "sentinels")},
    "sentinels": {
        NO_ANSWER: PRIMARY_DOWN_OVER_TLS,
        NO_ANSWER_OVER_TLS: PRIMARY_DOWN_OVER_TLS,
        REPLICA: FAIL_OVER,
        CLOSED: CLOSED_OVER_TLS,
    },
}
NO_CONNECTION_LEFT = "has no connection left, so raise its maxclients"

Faults = tuple[tuple[type[Exception], str, str], ...]

# What is wrong, by the type of an error and a part of its text. The first match counts.
FAULTS: Faults = (
    (RedisError, "NOREPLICAS", "rejects writes because it has too few replicas, so check its log"),
    (NotPrimary, "", REPLICA),
    (AuthenticationError, "Authentication required", "requires a password, so set it in REDIS_URL"),
    (AuthenticationError, "without any password", "has no password, so remove the one in REDIS_URL"),
    (AuthenticationError, "", "rejects the password, so check the user and the password in REDIS_URL"),
    (NoPermissionError, "", "does not grant this user the permissions it needs, so set those in docs/operations.md"),
    (RedisError, "CERTIFICATE_VERIFY_FAILED",
     "presents an untrusted certificate, so check ssl_ca_certs and the host name in REDIS_URL"),
    (RedisError, "WRONG_VERSION_NUMBER", NO_ANSWER_OVER_TLS),
    (RedisError, "CERTIFICATE_REQUIRED",
     "requires a client certificate, so set ssl_certfile and ssl_keyfile in REDIS_URL"),
    (RedisError, "No such file", "can't be reached, because REDIS_URL names a file that does not exist"),
    (RedisError, "[SSL", "fails the TLS handshake, so check the ssl_ options in REDIS_URL"),
    (RedisError, "Connection closed by server", CLOSED),
    (RedisError, "Connection reset by peer", CLOSED),
    (RedisError, "while writing to socket", CLOSED),
    (RedisError, "protected mode", "accepts only local connections (protected mode), so set a password on it"),
    (RedisError, "DB index is out of range", "has no database with this number, so check REDIS_DB"),
    (OutOfMemoryError, "", "has no memory left, so raise its maxmemory"),
    (BusyLoadingError, "", "is still loading its data, so wait until it has finished"),
    (RedisError, "MISCONF", "rejects writes because it can't save them to disk, so check its log"),
    (RedisError, "max number of clients", NO_CONNECTION_LEFT),
    (MaxConnectionsError, "", NO_CONNECTION_LEFT),
    (ClusterDownError, "", CLUSTER),
    (ClusterCrossSlotError, "", CLUSTER),
    (AskError, "", CLUSTER),  # includes MOVED
    (InvalidResponse, "", "is not a Redis, so check REDIS_HOST and REDIS_PORT"),
    (ResponseError, "", "rejects a command of the service, so check the log for the reason"),
)  # fmt: skip


# The same for an error of a Sentinel. Other errors are as above.
SENTINEL_FAULTS: Faults = (
    (UnknownPrimary, "", "knows no primary of this name, so check the name in REDIS_URL"),
    (AuthenticationError, "Authentication required", "requires a password, so set sentinel_password in REDIS_URL"),
    (AuthenticationError, "without any password", "has no password, so remove sentinel_password from REDIS_URL"),
    (AuthenticationError, "",
     "rejects the password, so check sentinel_username and sentinel_password in REDIS_URL"),
    (ResponseError, "unknown command", "is a Redis and no Sentinel, so check the port, or use redis:// in REDIS_URL"),
)  # fmt: skip
SENTINEL_DOWN = "does not answer, so start the Sentinels, or check their addresses in REDIS_URL"
SENTINEL_DOWN_OVER_TLS = "does not answer over TLS, so start the Sentinels, or check their addresses and their TLS"


def fault_of(error: Exception) -> str:
    """Return what is wrong with Redis and what to do about it.

    `error` is UnusableRedis or comes from redis-py. The result is safe to send to clients: it does not quote the error.
    """
    if isinstance(error, UnusableRedis):
        return error.fault
    scheme = settings.REDIS_URL.partition(":")[0]
    changes = BY_SCHEME.get(scheme, {})
    if isinstance(error, PrimaryNotFound):
        down = SENTINEL_DOWN_OVER_TLS if scheme == "sentinels" else SENTINEL_DOWN
        changes = changes | dict.fromkeys([NO_ANSWER, NO_ANSWER_OVER_TLS], down)
        fault = _first(SENTINEL_FAULTS + FAULTS, error.cause)
        return f"can't be found, because the Sentinel at {error.sentinel} {changes.get(fault, fault)}"
    fault = _first(FAULTS, error)
    return changes.get(fault, fault)


def _first(faults: Faults, error: Exception) -> str:
    return next((fault for kind, text, fault in faults if isinstance(error, kind) and text in str(error)), NO_ANSWER)
