"""Hosts on this machine: network namespaces on one Ethernet switch, whose cables a test can cut."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from harness import Missing, free_port, kill_at_once, need

HERE = 254  # the last number of this machine's own address in the network


class Host(NamedTuple):
    """A host: its address, this machine's address in the same network, and the namespaces of itself and the switch."""

    name: str
    address: str
    peer: str
    namespace: str
    switch: str

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command that runs there."""
        return inside(self.namespace)

    def cable(self, state: str) -> None:
        """Cut ("down") or restore ("up") its connection. Nobody is told: packets are lost, as after a cut elsewhere."""
        do(*inside(self.switch), "ip", "link", "set", self.name, state)

    def pids(self) -> list[int]:
        """The processes that run there."""
        listed = subprocess.check_output(["ip", "netns", "pids", self.namespace], text=True)
        return [int(pid) for pid in listed.split()]

    def lose_power(self) -> None:
        """End all its programs at once, and send no packet that tells others so."""
        self.cable("down")
        kill_at_once(self.pids())


@contextmanager
def hosts(**numbers: int) -> Iterator[dict[str, Host]]:
    """Make a host for each name, with the given number at the end of its address. Raises Missing where forbidden."""
    mark, network = f"test{free_port()}", f"10.213.{free_port() % 256}"  # so that runs on one machine do not collide
    switch, peer = f"{mark}-switch", f"{network}.{HERE}"
    need("ip")
    with ExitStack() as stack:
        add_namespace(switch, stack)  # of its own, or this machine's firewall would filter what it forwards
        do(*inside(switch), "ip", "link", "add", "switch", "type", "bridge")
        do(*inside(switch), "ip", "link", "set", "switch", "up")
        plug_in("tests", mark, switch, f"{peer}/24")
        found = {}
        for name, number in numbers.items():
            host = Host(name, f"{network}.{number}", peer, f"{mark}-{name}", switch)
            add_namespace(host.namespace, stack)
            do(*host.prefix, "ip", "link", "set", "lo", "up")
            plug_in(name, "eth0", switch, f"{host.address}/24", host.namespace)
            found[name] = host
        yield found


def plug_in(port: str, device: str, switch: str, address: str, namespace: str = "") -> None:
    """Connect `device`, in a namespace or by default in this machine's network, with a `port` of the switch."""
    prefix = inside(namespace) if namespace else []
    do(*inside(switch), "ip", "link", "add", port, "type", "veth", "peer", "name", f"{port}-b")
    do(*inside(switch), "ip", "link", "set", f"{port}-b", "netns", namespace or str(os.getpid()), "name", device)
    do(*inside(switch), "ip", "link", "set", port, "master", "switch", "up")
    do(*prefix, "ip", "address", "add", address, "dev", device)
    do(*prefix, "ip", "link", "set", device, "up")


def add_namespace(name: str, stack: ExitStack) -> None:
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Missing(f"cannot create a network namespace here: {made.stderr}")
    stack.callback(do, "ip", "netns", "delete", name)


def inside(namespace: str) -> list[str]:
    """Return the beginning of a command that runs in a network namespace."""
    return [need("nsenter"), f"--net=/run/netns/{namespace}"]  # `ip -n` would also mount, which some machines forbid


def do(*command: str) -> None:
    subprocess.run(command, check=True)
