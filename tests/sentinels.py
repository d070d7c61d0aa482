"""A primary and a replica with three Sentinels that watch them, for the tests of fail-overs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from harness import Process, answers, free_port, redis_server, running, wait_until
from namespaces import Host
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from image_queue import ImageQueue, UnusableRedis, fault_of
from image_queue.sentinel import Address

NAME = "images"  # of the primary, in the Sentinels' configuration
DOWN_AFTER = 2  # seconds without an answer after which a Sentinel takes the primary for dead

SENTINEL = """\
port {port}
bind {host}
dir {folder}
protected-mode no
logfile ""
sentinel monitor {name} {primary_host} {primary_port} 2
sentinel down-after-milliseconds {name} {down_after}
sentinel failover-timeout {name} 6000
sentinel parallel-syncs {name} 1
"""


@contextmanager
def run_sentinel(
    log: Path, where: Address, primary: Address, *lines: str, prefix: Sequence[str] = ()
) -> Iterator[Process]:
    """Run a Sentinel with these `lines` besides SENTINEL. `prefix` is the beginning of the command."""
    configuration = log.with_suffix(".conf")  # Sentinel writes to it, so each needs one
    text = SENTINEL.format(
        port=where[1], host=where[0], folder=log.parent, name=NAME, down_after=1000 * DOWN_AFTER,
        primary_host=primary[0], primary_port=primary[1],
    )  # fmt: skip
    configuration.write_text(text)
    with running([*prefix, redis_server(), str(configuration), "--sentinel"], log) as process:
        yield process


class Trio:
    """Three Sentinels, and the two Redis servers that they watch."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.sentinels: list[Address] = []
        self.servers: dict[Address, Process] = {}
        self._prefixes: dict[Address, Sequence[str]] = {}
        self._folder = folder
        self._stack = stack

    def add_server(self, host: str, *options: str, prefix: Sequence[str] = ()) -> Address:
        """Run a Redis, and return its address when it answers."""
        place = Address(host, free_port())
        self._prefixes[place] = prefix
        self._run(place, *options)
        return place

    def restart(self, place: Address) -> None:
        """Run a Redis again, as an administrator or systemd would. The Sentinels make it a replica."""
        self._run(place)

    def _run(self, place: Address, *options: str) -> None:
        # Copies itself to a new replica at once, and keeps nothing on disk.
        command = [redis_server(), "--port", str(place[1]), "--bind", place[0], "--save", "", "--dir",
                   str(self._folder), "--repl-diskless-sync-delay", "0", "--protected-mode", "no"]  # fmt: skip
        log = self._folder / f"redis-{place[1]}"
        self.servers[place] = self._stack.enter_context(running([*self._prefixes[place], *command, *options], log))
        wait_until(lambda: answers(client_of(place)), "Redis answers")

    def add_sentinel(self, host: str, primary: Address, prefix: Sequence[str] = ()) -> None:
        """Run a Sentinel that watches `primary`, and wait until it answers."""
        place = Address(host, free_port())
        self._prefixes[place] = prefix
        self._stack.enter_context(run_sentinel(self._folder / f"sentinel-{place[1]}", place, primary, prefix=prefix))
        wait_until(lambda: answers(client_of(place)), "the Sentinel answers")
        self.sentinels.append(place)

    def restart_sentinel(self, place: Address) -> None:
        """Run a Sentinel again, with the configuration that it has written."""
        log = self._folder / f"sentinel-{place[1]}"
        command = [redis_server(), str(log.with_suffix(".conf")), "--sentinel"]
        self._stack.enter_context(running([*self._prefixes[place], *command], log))
        wait_until(lambda: answers(client_of(place)), "the Sentinel answers")

    @property
    def url(self) -> str:
        return f"sentinel://{','.join(map(str, self.sentinels))}/{NAME}/0"

    @property
    def primary(self) -> Address:
        """The primary that the last Sentinel names."""
        host, port = ask(self.sentinels[-1], "GET-MASTER-ADDR-BY-NAME")
        return Address(host.decode(), int(port))

    def is_ready(self) -> bool:
        """Whether a fail-over can happen: the replica is in sync, and the Sentinels know it and each other."""
        with suppress(RedisError):
            primary = self.primary
            [replica] = [client_of(place) for place in self.servers if place != primary]
            found = replica.info("replication")
            in_sync = found.get("master_port") == primary[1] and found.get("master_link_status") == "up"
            return bool(in_sync) and all(self._knows_all(place) for place in self.sentinels)
        return False

    def _knows_all(self, sentinel: Address) -> bool:
        reply = ask(sentinel, "MASTER")
        words = reply if isinstance(reply, list) else [word for pair in reply.items() for word in pair]
        state = dict(zip(words[::2], words[1::2], strict=True))
        found = {key.decode(): value.decode() for key, value in state.items()}
        wanted = {"num-other-sentinels": "2", "num-slaves": "1", "flags": "master"}
        return found.items() >= wanted.items()

    def seconds_to_another_primary(self, fault: Callable[[], object]) -> float:
        """Cause `fault`; return the seconds until the replica is the primary."""
        old, begun = self.primary, time.monotonic()
        other = client_of(next(place for place in self.servers if place != old))
        fault()
        wait_until(lambda: is_primary(other), "the replica is promoted", 60)
        return time.monotonic() - begun


def is_primary(redis: Redis) -> bool:
    """Whether a Redis is the primary. One that is just being promoted closes all connections."""
    with suppress(RedisError):
        return bool(redis.info("replication")["role"] == "master")
    return False


def ask(sentinel: Address, *words: str) -> Any:
    """Return the reply of a Sentinel to a SENTINEL command about the primary."""
    client: Any = client_of(sentinel)
    return client.execute_command("SENTINEL", words[0], NAME, *words[1:])


def client_of(place: Address) -> Redis:
    """Return a client that never repeats a command."""
    return Redis(*place, socket_timeout=5, protocol=2, retry=Retry(NoBackoff(), 0))


@contextmanager
def run_trio(folder: Path, there: Host | None = None) -> Iterator[Trio]:
    """Run the five. The first Redis, which is the primary, and the first Sentinel run on the host `there`."""
    first, second, prefix = (there.address, there.peer, there.prefix) if there else ("127.0.0.1", "127.0.0.1", [])
    with ExitStack() as stack:
        trio = Trio(folder, stack)
        primary = trio.add_server(first, prefix=prefix)
        trio.add_server(second, "--replicaof", first, str(primary[1]))
        trio.add_sentinel(first, primary, prefix)
        trio.add_sentinel(second, primary)
        trio.add_sentinel(second, primary)
        wait_until(trio.is_ready, "the Sentinels know all", 60)
        yield trio


def fault() -> str:
    """Return what is wrong with the Redis in the settings; "" if nothing is."""
    try:
        ImageQueue().check()
    except UnusableRedis as error:
        return error.fault
    except RedisError as error:
        return fault_of(error)
    return ""
