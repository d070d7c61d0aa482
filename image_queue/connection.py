"""How both programs reach Redis: connections that follow a fail-over, and what is wrong with a Redis, in plain words.

A fail-over behind one name (a virtual IP, a balancer, a Kubernetes Service) makes the old primary a replica and often
leaves connections to it open. A connection to a replica therefore counts as broken: the next one is made by name.
"""

import re
from typing import Any, cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    ConnectionError,
    InvalidResponse,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

import settings
from helpers import StartupError

# Seconds beyond a blocking poll after which a connection counts as dead. Without it a cut cable is never noticed;
# below a second a busy Redis would be taken for a dead one.
SOCKET_GRACE = 5
OLDEST_REDIS = 7  # scripts with flags: taking and answering must work when Redis is out of memory
MOST_CONNECTIONS = 10_000  # of one process, where Redis does not say how many it allows in all
# One process may use this part of the connections that Redis allows (maxclients), so that the other web processes, the
# model servers and the operator find some too.
SHARE = 10
# Seconds between looks at which idle connections a process no longer needs.
CLOSE_SURPLUS_EVERY = 5.0
# Connections beyond those of waiting images, for what takes a millisecond: health, metrics, rate limits.
SPARE_CONNECTIONS = 4
# A share below this is worth a warning: a web process then has fewer images in flight than a batch or two.
SMALL_SHARE = 64

Info = dict[str, Any]


class NotPrimary(ConnectionError):
    """Redis is a replica and takes no writes: as after a fail-over, on a connection to the old primary."""


class UnusableRedis(StartupError):
    """The service can't work with this Redis, however long it waits; `fault` says why, as fault_of() does."""

    def __init__(self, address: str, fault: str) -> None:
        super().__init__(f"Redis at {address} {fault}.")
        self.fault = fault


class PrimaryConnectionBase(AbstractConnection):
    """A connection that breaks with NotPrimary when its Redis is, or becomes, a replica."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next reply. Raises NotPrimary, and what redis-py raises."""
        try:
            return super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not _is_of_a_replica(error):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise NotPrimary(str(error)) from error

    def can_read(self, timeout: float = 0) -> bool:
        """Whether a reply is there that nobody asked for. Raises the error that it is.

        A Redis without a free connection says so right after the connect; redis-py alone would only call the connection
        not ready.
        """
        if not super().can_read(timeout):
            return False
        try:
            self.read_response(timeout=0, disconnect_on_error=False)
        except RedisTimeout:
            return False  # what is there is no reply: by TLS, a ticket for the next session
        return True


def _is_of_a_replica(error: ResponseError) -> bool:
    # EXEC names the reason in its text; a blocked command is ended when the primary becomes a replica.
    return isinstance(error, ReadOnlyError | MasterDownError) or bool(
        re.search(r"because of: READONLY|^UNBLOCKED .*instance state changed", str(error))
    )


class PrimaryConnection(PrimaryConnectionBase, Connection):
    """The same by TCP."""


class PrimarySSLConnection(PrimaryConnectionBase, SSLConnection):
    """The same by TLS."""


class PrimaryUnixConnection(PrimaryConnectionBase, UnixDomainSocketConnection):
    """The same by a Unix socket."""


CONNECTIONS = {"redis": PrimaryConnection, "rediss": PrimarySSLConnection, "unix": PrimaryUnixConnection}


class QueuePool(ConnectionPool):
    """A process's connections: only those that work, and no more idle ones than close_surplus() found of use."""

    _peak = 0  # connections in use at once since the last close_surplus()

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:
        """Return a connection that is ready. Raises RedisError."""
        connection = super().get_connection(*args, **kwargs)
        with self._lock:
            self._peak = max(self._peak, len(self._in_use_connections))
        return connection

    def release(self, connection: Any) -> None:
        """Take `connection` back; if it broke, close the idle ones too, which lead to the same lost or old Redis."""
        super().release(connection)
        if not connection.is_connected:
            self.close_idle()

    def close_surplus(self) -> None:
        """Close the idle connections that were not needed since the last call, such as after a burst."""
        with self._lock:
            in_use = len(self._in_use_connections)
            needed, self._peak = self._peak - in_use, in_use
        self.close_idle(needed)

    def close_idle(self, keep: int = 0) -> None:
        """Close the idle connections but the `keep` that were used last."""
        with self._lock:
            surplus = max(0, len(self._available_connections) - keep)
            closing = self._available_connections[:surplus]
            del self._available_connections[:surplus]
            self._created_connections -= surplus
        for connection in closing:
            connection.disconnect()


def connect() -> Redis:
    """Return a client whose every wait has a limit, and which never repeats a command by itself.

    redis-py 8 by default repeats a command whose reply was lost, which loses or doubles what it moved, and allows 100
    connections, where each waiting request holds one.
    """
    options: dict[str, Any] = {
        "protocol": 2,  # RESP3's HELLO is refused by older proxies, and nothing here needs it
        "socket_timeout": max(settings.CLIENT_SLEEP, settings.SERVER_SLEEP) + SOCKET_GRACE,
        "socket_connect_timeout": SOCKET_GRACE,
        "socket_keepalive": True,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": MOST_CONNECTIONS,
        "driver_info": None,  # to tell the library's name takes a right that nothing else here needs
    }
    return Redis(connection_pool=_pool_by_url(options) if settings.REDIS_URL else _pool(options))


def _pool(options: dict[str, Any]) -> QueuePool:
    where: dict[str, Any] = {"host": settings.REDIS_HOST, "port": settings.REDIS_PORT, "db": settings.REDIS_DB}
    return QueuePool(connection_class=PrimaryConnection, **where, **options)


def _pool_by_url(options: dict[str, Any]) -> QueuePool:
    if settings.REDIS_URL.startswith("unix:"):
        del options["socket_keepalive"]
    options["connection_class"] = CONNECTIONS[settings.REDIS_URL.partition(":")[0]]
    try:
        pool: QueuePool = QueuePool.from_url(settings.REDIS_URL, **options)
        pool.connection_class(**pool.connection_kwargs)  # connects nothing, but finds options that there are not
    except (ValueError, TypeError):
        # Not what the error says: where a password has a / in it, that is a piece of the password.
        settings.refuse("REDIS_URL", settings.REDIS_URL, "a URL as docs/operations.md shows, other signs in it as %2F")
    return pool


def address_of(redis: Redis) -> str:
    """Where Redis is, for people: never with the password."""
    at = redis.connection_pool.connection_kwargs
    return cast(str, at.get("path")) or f"{at.get('host')}:{at.get('port')}"


def info_of_primary(redis: Redis) -> Info:
    """Return what INFO says. Raises NotPrimary when the Redis behind the name is a replica, RedisError."""
    for _ in range(2):
        info: Info = redis.info()
        if info.get("role") not in ("slave", "replica"):
            return info
        # The connection may be an old one, to what was the primary: ask once more on a new one.
        cast(QueuePool, redis.connection_pool).close_idle()
    raise NotPrimary(f"its INFO says role:{info['role']}")


def unfitness(info: Info) -> str:
    """Return why the service can't work with a Redis whose INFO is `info`, as fault_of() would say it; "" if it can."""
    version = str(info.get("redis_version", "unknown"))
    number = re.match(r"\d+", version)
    mode = info.get("redis_mode") or info.get("server_mode")  # the second is Valkey's
    if "dragonfly_version" in info:
        return "is Dragonfly, which can't run the scripts of the service, so use Redis or Valkey"
    if mode == "cluster" or info.get("cluster_enabled") == 1:
        return "is a Redis Cluster, which keeps the keys of a queue apart, so use a Redis with cluster mode off"
    if mode == "sentinel":
        return "is a Sentinel, which holds no data, so point REDIS_* at the primary that it watches"
    if not number or int(number[0]) < OLDEST_REDIS:
        return f"is version {version}, but {OLDEST_REDIS} or newer is needed"
    return ""


def share_of_connections(info: Info) -> int:
    """Return how many images of one process may wait for answers at once, each on a connection of its own."""
    allowed = info.get("maxclients")
    return max(1, allowed // SHARE) if isinstance(allowed, int) and allowed > 0 else MOST_CONNECTIONS


def risks_of(info: Info) -> list[str]:
    """Return what of a Redis that works may cost requests, each in words that follow its address."""
    found, policy = [], info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", 0) and policy != "noeviction":
        found.append(
            f"throws keys away when its memory is full (maxmemory-policy {policy}), which loses images that were "
            "accepted, so set maxmemory-policy noeviction, or give the service a Redis of its own by REDIS_URL"
        )
    share = share_of_connections(info)
    if share < SMALL_SHARE:
        found.append(
            f"allows {info['maxclients']} connections (maxclients), so each web process has at most {share} images in "
            "flight and the others wait; raise maxclients to 1000 or more"
        )
    return found


REPLICA = "is a read-only replica, so wait for the fail-over to end, or point REDIS_* at the primary"
CLUSTER = "is a Redis Cluster, so use a Redis with cluster mode off"
NO_ANSWER = "does not answer, so start it or check REDIS_*"
NO_ANSWER_BY_TLS = "does not answer by TLS, so start it or check REDIS_URL, which begins with redis:// without TLS"
CLOSED = "closed the connection, so see its log; if it wants TLS, begin REDIS_URL with rediss://"
CLOSED_BY_TLS = "closed the connection, so see its log; a client certificate is named by ssl_certfile in REDIS_URL"
BY_TLS = {NO_ANSWER: NO_ANSWER_BY_TLS, CLOSED: CLOSED_BY_TLS}  # what the same means where REDIS_URL asks for TLS
NO_CONNECTION_LEFT = "has no connection left, so raise its maxclients"

# What is wrong by the error and a piece of its text, the first that fits. Redis may well answer, but not as it must.
FAULTS: tuple[tuple[type[Exception], str, str], ...] = (
    (NotPrimary, "", REPLICA),
    (ReadOnlyError, "", REPLICA),
    (AuthenticationError, "Authentication required", "wants a password, so set it in REDIS_URL"),
    (AuthenticationError, "without any password", "has no password, so take the one in REDIS_URL out"),
    (AuthenticationError, "", "refuses the password, so check the user and the password in REDIS_URL"),
    (NoPermissionError, "", "does not give this user the rights it needs, so set those in docs/operations.md"),
    (RedisError, "CERTIFICATE_VERIFY_FAILED",
     "shows a certificate that we do not trust, so check ssl_ca_certs and the host name in REDIS_URL"),
    (RedisError, "WRONG_VERSION_NUMBER", NO_ANSWER_BY_TLS),
    (RedisError, "CERTIFICATE_REQUIRED", "wants a client certificate, so set ssl_certfile, ssl_keyfile in REDIS_URL"),
    (RedisError, "No such file", "can't be asked, since REDIS_URL names a file that is not there"),
    (RedisError, "[SSL", "can't agree with us on TLS, so check the ssl_ options of REDIS_URL"),
    (RedisError, "Connection closed by server", CLOSED),
    (RedisError, "Connection reset by peer", CLOSED),
    (RedisError, "while writing to socket", CLOSED),
    (RedisError, "protected mode", "lets in its own machine only (protected mode), so set a password there"),
    (RedisError, "DB index is out of range", "has no database of that number, so check REDIS_DB"),
    (OutOfMemoryError, "", "has no memory left, so raise its maxmemory"),
    (BusyLoadingError, "", "is still loading its data, so wait until it has"),
    (RedisError, "MISCONF", "takes no writes since it can't save them to its disk, so see its log"),
    (RedisError, "NOREPLICAS", "takes no writes since it has too few replicas, so see its log"),
    (RedisError, "max number of clients", NO_CONNECTION_LEFT),
    (MaxConnectionsError, "", NO_CONNECTION_LEFT),
    (ClusterDownError, "", CLUSTER),
    (ClusterCrossSlotError, "", CLUSTER),
    (AskError, "", CLUSTER),  # MOVED too
    (InvalidResponse, "", "is no Redis, so check REDIS_HOST and REDIS_PORT"),
    (ResponseError, "", "refuses a command of the service, so see the log for the reason"),
)  # fmt: skip


def fault_of(error: Exception) -> str:
    """Return what is wrong with Redis and what to do, in words that follow its name, as "refuses the password, so ...".

    `error` is what redis-py raised, or UnusableRedis. The words hold no piece of the error, so they may go to a client.
    """
    if isinstance(error, UnusableRedis):
        return error.fault
    known = (words for kind, text, words in FAULTS if isinstance(error, kind) and text in str(error))
    fault = next(known, NO_ANSWER)
    return BY_TLS.get(fault, fault) if settings.REDIS_URL.startswith("rediss:") else fault
