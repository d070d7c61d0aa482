"""A network of its own for some programs, whose cable a test can cut."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from harness import Missing, free_port, need


class Network(NamedTuple):
    """A network namespace that is connected with this machine.

    `host` is its address and `peer` this machine's, `prefix` the beginning of a command that runs in it. `cable` cuts
    ("down") and restores ("up") the connection.
    """

    host: str
    peer: str
    prefix: list[str]
    cable: Callable[[str], object]


@contextmanager
def network() -> Iterator[Network]:
    """Make a network namespace. Raises Missing where this is forbidden."""
    name, number = f"cut{free_port()}", free_port() % 256  # so that test runs on the same machine do not collide
    peer, host = f"10.213.{number}.1", f"10.213.{number}.2"
    ip = need("ip")
    inside = [need("nsenter"), f"--net=/run/netns/{name}"]  # `ip -n` would also mount, which some machines forbid
    made = subprocess.run([ip, "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Missing(f"cannot create a network namespace here: {made.stderr}")
    try:
        for command in (
            [ip, "link", "add", f"{name}-a", "type", "veth", "peer", "name", f"{name}-b", "netns", name],
            [ip, "address", "add", f"{peer}/30", "dev", f"{name}-a"],
            [ip, "link", "set", f"{name}-a", "up"],
            [*inside, ip, "address", "add", f"{host}/30", "dev", f"{name}-b"],
            [*inside, ip, "link", "set", f"{name}-b", "up"],
            [*inside, ip, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)
        yield Network(
            host,
            peer,
            inside,
            lambda state: subprocess.run([*inside, ip, "link", "set", f"{name}-b", state], check=True),
        )
    finally:
        subprocess.run([ip, "netns", "delete", name], check=True)
