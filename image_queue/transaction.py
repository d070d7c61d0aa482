"""A transaction that is sent to Redis as one packet.

redis-py's own copies an image once more, and sends each part by itself, for which Redis wakes up each time.
"""

from itertools import chain
from typing import Any

from redis.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ResponseError

Command = tuple[bytes, ...]


def transaction(pool: ConnectionPool, *commands: Command) -> list[Any]:
    """Execute `commands` in one transaction and return their replies. Raises RedisError."""
    all_commands = [(b"MULTI",), *commands, (b"EXEC",)]
    packet = b"".join(chain.from_iterable(map(packed, all_commands)))
    connection = pool.get_connection()
    try:
        connection.send_packed_command([packet])  # type: ignore[no-untyped-call]
        replies = [reply_or_error(connection) for _ in all_commands]
    finally:
        pool.release(connection)
    executed = replies[-1]
    for reply in [*replies, *executed] if isinstance(executed, list) else replies:
        if isinstance(reply, ResponseError):
            raise reply
    return list(executed)


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
