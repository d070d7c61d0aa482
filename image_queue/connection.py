"""Connections to Redis that follow a fail-over.

A fail-over behind one name (a virtual IP, a load balancer, a Kubernetes Service) turns the old primary into a replica
and often leaves connections to it open. So a connection to a replica counts as broken, and its replacement resolves the
name again, or asks the Sentinels.
"""

import re
from socket import socket
from typing import Any, cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError, MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

import settings
from image_queue.sentinel import FORM, Address, Sentinels, read_url

# A connection counts as dead if a reply is this many seconds overdue; the reply to a blocking poll is due when the poll
# ends. Without a limit a cut cable would never be noticed; with less than a second a busy Redis would count as dead.
SOCKET_GRACE = 5
# The same behind Sentinels, and the limit on connecting there and on each reply until the connection is ready. They are
# shorter because the wait for an old primary that is frozen or cut off adds to the time of a fail-over.
SENTINEL_GRACE = 3
HANDSHAKE_LIMIT = 2
MAX_CONNECTIONS = 10_000  # of one process, unless Redis reports a limit
CLOSE_SURPLUS_EVERY = 5.0  # seconds

Info = dict[str, Any]


class NotPrimary(ConnectionError):
    """Redis accepts no writes: it is a replica, as an old primary is after a fail-over, or has too few replicas."""


class PrimaryConnectionBase(AbstractConnection):
    """A connection that breaks with NotPrimary if its Redis is a replica or becomes one."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next reply. Raises NotPrimary and the errors of redis-py."""
        try:
            return super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not _shows_another_primary(error):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise NotPrimary(str(error)) from error

    def can_read(self, timeout: float = 0) -> bool:
        """Return whether an unrequested reply has arrived. If it is an error, raise it.

        A Redis without a free connection sends such an error right after the connection is made. redis-py would only
        report that the connection is not ready.
        """
        if not super().can_read(timeout):
            return False
        try:
            self.read_response(timeout=0, disconnect_on_error=False)
        except RedisTimeout:
            return False  # a TLS session ticket, not a reply
        return True


def _shows_another_primary(error: ResponseError) -> bool:
    """Return whether there may be another primary: this Redis is a replica, or a primary without enough replicas.

    The error of a failed EXEC quotes the reason. UNBLOCKED ends a blocking command when a primary becomes a replica.
    """
    return isinstance(error, ReadOnlyError | MasterDownError) or bool(
        re.search(r"because of: READONLY|^UNBLOCKED .*instance state changed|NOREPLICAS", str(error))
    )


class PrimaryConnection(PrimaryConnectionBase, Connection):
    """A PrimaryConnectionBase over TCP."""


class PrimarySSLConnection(PrimaryConnectionBase, SSLConnection):
    """A PrimaryConnectionBase over TLS."""


class PrimaryUnixConnection(PrimaryConnectionBase, UnixDomainSocketConnection):
    """A PrimaryConnectionBase over a Unix socket."""


class SentinelConnectionBase(PrimaryConnectionBase, Connection):
    """A connection that asks the Sentinels where to connect to, and breaks when they name another primary."""

    def __init__(self, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._sentinels = sentinels

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """Connect to the primary. Raises PrimaryNotFound, NotPrimary and the errors of redis-py."""
        if self._sock:
            return
        self.host, self.port = self._sentinels.primary()
        try:
            super().connect_check_health(*args, **kwargs)
            self._check_role()
        except RedisError:
            self._sentinels.distrust()
            self.disconnect()  # type: ignore[no-untyped-call]
            raise
        cast(socket, self._sock).settimeout(self.socket_timeout)

    def _connect(self) -> Any:
        patience, self.socket_timeout = self.socket_timeout, HANDSHAKE_LIMIT
        try:
            return super()._connect()  # type: ignore[no-untyped-call]
        finally:
            self.socket_timeout = patience

    def _check_role(self) -> None:
        # Not ROLE, because the service's user may run INFO anyway.
        self.send_command("INFO", "replication", check_health=False)  # type: ignore[no-untyped-call]
        if b"role:master" not in bytes(self.read_response()):  # a model server's parser returns a view
            raise NotPrimary(f"the Sentinels name {self.host}:{self.port}, which is a replica")

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next reply. Raises NotPrimary and the errors of redis-py."""
        try:
            return super().read_response(*args, **kwargs)
        except NotPrimary:
            self._sentinels.distrust()
            raise

    def check_health(self) -> None:
        """Check before a command that this is still the primary, which redis-py does not. Raises NotPrimary.

        An old primary that only the Sentinels can't reach would otherwise keep its connections, and so its jobs.
        """
        if self._sentinels.moved_from(Address(self.host, self.port)):
            self.disconnect()  # type: ignore[no-untyped-call]
            raise NotPrimary(f"the Sentinels name another primary than {self.host}:{self.port}")
        super().check_health()  # type: ignore[no-untyped-call]


class SentinelConnection(SentinelConnectionBase):
    """A SentinelConnectionBase over TCP."""


class SentinelSSLConnection(SentinelConnectionBase, SSLConnection):
    """A SentinelConnectionBase over TLS."""


CONNECTIONS = {"redis": PrimaryConnection, "rediss": PrimarySSLConnection, "unix": PrimaryUnixConnection,
               "sentinel": SentinelConnection, "sentinels": SentinelSSLConnection}  # fmt: skip


class QueuePool(ConnectionPool):
    """The connections of a process. It closes idle ones that are broken or no longer needed."""

    _peak = 0  # connections in use at once since the last close_surplus()

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:
        """Return a connection that is ready. Raises RedisError."""
        connection = super().get_connection(*args, **kwargs)
        with self._lock:
            self._peak = max(self._peak, len(self._in_use_connections))
        return connection

    def release(self, connection: Any) -> None:
        """Take `connection` back. If it is broken, close the idle ones too, since they lead to the same Redis."""
        super().release(connection)
        if not connection.is_connected:
            self.close_idle()

    def close_surplus(self) -> None:
        """Close the idle connections that were not needed since the last call, as after a burst."""
        with self._lock:
            in_use = len(self._in_use_connections)
            needed, self._peak = self._peak - in_use, in_use
        self.close_idle(needed)

    def close_idle(self, keep: int = 0) -> None:
        """Close all idle connections except for the `keep` most recently used."""
        with self._lock:
            surplus = max(0, len(self._available_connections) - keep)
            closing = self._available_connections[:surplus]
            del self._available_connections[:surplus]
            self._created_connections -= surplus
        for connection in closing:
            connection.disconnect()


def connect() -> Redis:
    """Return a client that never waits without a limit and never repeats a command.

    By default redis-py 8 repeats a command whose reply was lost, which would lose or duplicate jobs. It also allows
    only 100 connections, but each waiting request holds one.
    """
    options: dict[str, Any] = {
        "protocol": 2,  # older proxies reject RESP3's HELLO, and nothing here needs RESP3
        "socket_timeout": max(settings.CLIENT_SLEEP, settings.SERVER_SLEEP) + SOCKET_GRACE,
        "socket_connect_timeout": SOCKET_GRACE,
        "socket_keepalive": True,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": MAX_CONNECTIONS,
        "driver_info": None,  # sending the library's name needs a permission that nothing else here needs
    }
    if settings.REDIS_URL:
        return Redis(connection_pool=_pool_by_url(options))
    options |= {"host": settings.REDIS_HOST, "port": settings.REDIS_PORT, "db": settings.REDIS_DB}
    return Redis(connection_pool=QueuePool(connection_class=PrimaryConnection, **options))


def _pool_by_url(options: dict[str, Any]) -> QueuePool:
    scheme = settings.REDIS_URL.partition(":")[0]
    behind_sentinels = scheme.startswith("sentinel")
    options["connection_class"] = CONNECTIONS[scheme]
    if scheme == "unix":
        del options["socket_keepalive"]
    try:
        if behind_sentinels:
            sentinels, from_url = read_url(settings.REDIS_URL)
            options["socket_timeout"] += SENTINEL_GRACE - SOCKET_GRACE
            options |= {"socket_connect_timeout": HANDSHAKE_LIMIT, "sentinels": sentinels} | from_url
            pool = QueuePool(**options)
        else:
            pool = QueuePool.from_url(settings.REDIS_URL, **options)
        pool.connection_class(**pool.connection_kwargs)  # does not connect, but raises for an unknown option
    except (ValueError, TypeError, RedisError):
        # Do not show the error: if the password contains a /, the error quotes part of it.
        allowed = FORM if behind_sentinels else "a URL as in docs/operations.md, special characters as %2F"
        settings.refuse("REDIS_URL", settings.REDIS_URL, allowed)
    return pool


def info_of_primary(redis: Redis) -> Info:
    """Return the reply to INFO. Raises NotPrimary if Redis is a replica, RedisError."""
    for _ in range(2):
        info: Info = redis.info()
        if info.get("role") not in ("slave", "replica"):
            return info
        # This may be an old connection to the former primary, so ask once more on a new connection.
        cast(QueuePool, redis.connection_pool).close_idle()
    raise NotPrimary(f"its INFO says role:{info['role']}")
