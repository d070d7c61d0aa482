"""Asks Redis Sentinels for the address of the primary, if REDIS_URL begins with sentinel:// or sentinels://."""

import re
import time
from copy import copy
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import unquote

from redis.connection import Connection, SSLConnection, parse_url
from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError

DEFAULT_PORT = 26379
# A Sentinel has little to do, and usually another one can answer. With longer limits, a host that is cut off would hold
# up a fail-over.
SENTINEL_LIMIT = 1.0  # seconds to connect to a Sentinel, and again for its answer
CHECK_EVERY = 1.0  # seconds between checks whether open connections still lead to the primary
CHECK_AGAIN = 30.0  # seconds until the next check if no Sentinel answers, because a check holds up a command

URL = re.compile(
    r"sentinel(?P<tls>s?)://((?P<user>[^/?#]*)@)?(?P<hosts>[^/?#@]+)/(?P<primary>[^/?#]+)(/(?P<db>\d*))?"
    r"(\?(?P<options>.*))?"
)
HOST = re.compile(r"\[(?P<ipv6>[0-9A-Fa-f:.]+)\](:(?P<port6>\d+))?|(?P<name>[^\s:\[\]]+)(:(?P<port>\d+))?")
FORM = (
    "sentinel://HOST:PORT,HOST:PORT/NAME/DB, where NAME is the primary's name in sentinel.conf, with special "
    "characters as %2F, and options as in docs/operations.md"
)


class Address(NamedTuple):
    """Where a Sentinel or a Redis listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnknownPrimary(ResponseError):
    """The Sentinel monitors no primary of this name."""


class PrimaryNotFound(ConnectionError):
    """No Sentinel names the primary; `cause` is the error of the one at `sentinel`."""

    def __init__(self, sentinel: Address, cause: RedisError) -> None:
        super().__init__(sentinel, cause)
        self.sentinel = sentinel
        self.cause = cause

    def __str__(self) -> str:
        return f"Sentinel {self.sentinel}: {self.cause}"


class Sentinels:
    """The Sentinels that monitor a primary. Any number of threads may ask them."""

    def __init__(self, sentinels: list[Address], primary: str, *, tls: bool, **options: Any) -> None:
        """Ask about the primary named `primary`; `options` are those of redis-py for a connection to a Sentinel."""
        self._sentinels = sentinels  # the one to ask first is at the front
        self._name = primary
        self._class = SSLConnection if tls else Connection
        limits = {"socket_timeout": SENTINEL_LIMIT, "socket_connect_timeout": SENTINEL_LIMIT}
        # As in connect(): RESP2 and no name of a library, so that the user needs no other permission.
        self._options = {"protocol": 2, "driver_info": None} | limits | options
        self._class(**self._options)  # does not connect, but raises for an unknown option
        self._text = f"sentinel{'s' if tls else ''}://{','.join(map(str, sentinels))}/{primary}"
        self._lock = Lock()
        self._asked = self._next_check = 0.0  # on the monotonic clock
        self._answer: Address | PrimaryNotFound | None = None
        self._known: Address | None = None  # the last address that a Sentinel gave

    def __str__(self) -> str:
        """Return REDIS_URL without its secrets and options."""
        return self._text

    def primary(self) -> Address:
        """Return the address of the primary. Raises PrimaryNotFound.

        When many connections break at once, one thread asks for all: an answer to a question that was asked after this
        call began is new enough. So no thread waits for more than two rounds of questions.
        """
        begun = time.monotonic()
        with self._lock:
            if self._asked < begun:
                self._ask()
            answer = self._answer
        if isinstance(answer, PrimaryNotFound):
            raise copy(answer)  # other threads may raise it too
        assert answer
        return answer

    def moved_from(self, address: Address) -> bool:
        """Return whether the Sentinels name a primary other than the one at `address`.

        One thread asks them every CHECK_EVERY seconds; the others use what is known.
        """
        if time.monotonic() > self._next_check and self._lock.acquire(blocking=False):
            try:
                self._ask()
            finally:
                self._lock.release()
        return self._known not in (None, address)

    def distrust(self) -> None:
        """Ask another Sentinel first the next time: the last answer was out of date, or the fail-over is not over."""
        with self._lock:
            self._sentinels.append(self._sentinels.pop(0))

    def _ask(self) -> None:
        """Set `_answer` to the first address that a Sentinel gives, or to the error that says most."""
        self._asked = time.monotonic()
        failures: list[PrimaryNotFound] = []
        for sentinel in [*self._sentinels]:
            try:
                self._answer = self._known = self._ask_one(sentinel)
            except RedisError as error:
                failures.append(PrimaryNotFound(sentinel, error))
                continue
            self._sentinels.remove(sentinel)
            self._sentinels.insert(0, sentinel)
            self._next_check = time.monotonic() + CHECK_EVERY
            return
        self._next_check = time.monotonic() + CHECK_AGAIN
        # A Sentinel that rejects the question says more than one that does not answer.
        self._answer = min(failures, key=lambda failure: type(failure.cause) in (ConnectionError, TimeoutError))

    def _ask_one(self, sentinel: Address) -> Address:
        connection: Any = self._class(host=sentinel.host, port=sentinel.port, **self._options)
        try:
            connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
            reply = connection.read_response()
        finally:
            connection.disconnect()
        if reply is None:
            raise UnknownPrimary(f"no primary is named {self._name}")
        host, port = reply
        return Address(host.decode(), int(port))


def read_url(url: str) -> tuple[Sentinels, dict[str, Any]]:
    """Return the Sentinels of a URL, and redis-py's options for connections to their primary.

    Raises ValueError, and TypeError for an unknown option.
    """
    found = URL.fullmatch(url)
    if not found:
        raise ValueError(FORM)
    sentinels = [_address(text) for text in found["hosts"].split(",")]
    # redis-py parses the other parts, so that they mean the same as after redis://.
    others = f"redis://{found['user'] or ''}@host/{found['db'] or 0}?{found['options'] or ''}"
    options: dict[str, Any] = parse_url(others)  # type: ignore[no-untyped-call]
    del options["host"]
    username, password = options.pop("sentinel_username", None), options.pop("sentinel_password", None)
    tls_options = {name: value for name, value in options.items() if name.startswith("ssl_")}
    about = {"username": username, "password": password} | tls_options
    return Sentinels(sentinels, unquote(found["primary"]), tls=bool(found["tls"]), **about), options


def _address(text: str) -> Address:
    found = HOST.fullmatch(text)
    port = int(found["port"] or found["port6"] or DEFAULT_PORT) if found else 0
    if not found or not 0 < port < 2**16:
        raise ValueError(FORM)
    return Address(found["name"] or found["ipv6"], port)
