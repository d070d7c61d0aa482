"""A transaction that is sent to Redis as one packet.

redis-py's own copies an image once more, and sends each part by itself, for which Redis wakes up each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from redis.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ResponseError

Command = tuple[bytes, ...]


def transaction(pool: ConnectionPool, *commands: Command) -> list[Any]:
    """Execute `commands` in one transaction and return their replies. Raises RedisError."""
    all_commands = [(b"MULTI",), *commands, (b"EXEC",)]
    with borrowed(pool) as connection:
        packet = b"".join(chain.from_iterable(map(packed, all_commands)))
        connection.send_packed_command([packet])  # type: ignore[no-untyped-call]
        replies = [reply_or_error(connection) for _ in all_commands]
    executed = replies[-1]
    for reply in [*replies, *executed] if isinstance(executed, list) else replies:
        if isinstance(reply, ResponseError):
            raise reply
    return list(executed)


@contextmanager
def borrowed(pool: ConnectionPool) -> Iterator[AbstractConnection]:
    """Give a connection of `pool`. Raises RedisError."""
    connection = pool.get_connection()
    try:
        yield connection
    finally:
        pool.release(connection)


def packed(command: Command) -> list[bytes]:
    """Return the parts of a command in the protocol of Redis."""
    parts = [b"*%d\r\n" % len(command)]
    for word in command:
        parts += [b"$%d\r\n" % len(word), word, b"\r\n"]
    return parts


def reply_or_error(connection: AbstractConnection) -> Any:
    """Return the next reply, even if it is an error, since the replies after it must be read too."""
    try:
        return connection.read_response()
    except ResponseError as error:
        return error
