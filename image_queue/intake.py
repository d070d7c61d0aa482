"""Moves jobs from the queue to the taken list of a model server."""

from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from redis.exceptions import ConnectionError, ResponseError

from image_queue.connection import QueuePool
from image_queue.entry_parser import EntryParser

# Redis carries out all commands that it has received before it sends their replies. If it received those of a whole
# batch, it would first collect 50 MB while this side waits. With a few at a time, both work at once.
AT_ONCE = 8  # commands to send together, whenever no more than these are unanswered


class Intake:
    """The connection on which a model server takes jobs, with a parser that does not copy them."""

    def __init__(self, pool: QueuePool, longest: int) -> None:
        """Make a connection like those of `pool`, for entries of up to `longest` bytes; the first command connects."""
        self._pool = pool
        options: dict[str, Any] = pool.connection_kwargs | {"parser_class": partial(EntryParser, longest=longest)}
        self._connection = pool.connection_class(**options)

    def move(self, queue: str, taken: str, most: int, wait: float) -> Iterator[memoryview]:
        """Move up to `most` entries from the head of `queue` to the end of `taken`, and yield each.

        An entry is valid until the next one is asked for; one that is too long is cut to one byte more than the limit.
        Blocks up to `wait` seconds, but only for the first.

        Raises RedisError, but not if Redis rejects a command after it has moved an entry.
        """
        try:
            self._close_if_unusable()
            rejection = yield from self._entries(queue, taken, most, wait)
        except BaseException:
            self._connection.disconnect()  # the next command must not get the replies to these
            self._pool.close_idle()  # the other connections lead to the same Redis
            raise
        if rejection:
            raise rejection

    def _entries(
        self, queue: str, taken: str, most: int, wait: float
    ) -> Generator[memoryview, None, ResponseError | None]:
        """Yield the entries. If there are none, return the first rejection."""
        rejection: ResponseError | None = None
        moved = left = 0  # left: commands to be sent
        waiting = [("BLMOVE", queue, taken, "LEFT", "RIGHT", wait)] if wait else []
        unanswered = self._send([*waiting, ("LLEN", queue)])
        while unanswered or left:
            if unanswered <= AT_ONCE and left:
                count = min(AT_ONCE, left)
                unanswered += self._send([("LMOVE", queue, taken, "LEFT", "RIGHT")] * count)
                left -= count
            reply = self._reply()
            unanswered -= 1
            if isinstance(reply, memoryview):
                moved += 1
                yield reply
            elif isinstance(reply, int):  # the length of the queue
                left = min(reply, most - moved)
            else:  # the queue is empty, or Redis rejects the command
                left = 0
                rejection = rejection or reply
        return None if moved else rejection

    def _close_if_unusable(self) -> None:
        """Close the connection if Redis has closed it while it was idle; then the next command connects again."""
        with suppress(ConnectionError):
            if not (self._connection.is_connected and self._connection.can_read()):
                return
        self._connection.disconnect()

    def _send(self, commands: list[tuple[Any, ...]]) -> int:
        """Send commands; return their number."""
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        return len(commands)

    def _reply(self) -> memoryview | int | ResponseError | None:
        try:
            reply: memoryview | int | None = self._connection.read_response()
        except ResponseError as error:
            return error
        return reply
