"""HAProxy with its configuration of deploy/, and its admin socket."""

import socket
from pathlib import Path

from harness import ROOT, need

CONFIGURATION = ROOT / "deploy/haproxy/haproxy.cfg"


def haproxy_command(folder: Path, changes: dict[str, str]) -> list[str]:
    """Return the command that runs HAProxy with some `changes`, above all of addresses; it logs to stdout."""
    changes = {
        "/run/haproxy/admin.sock": f"{folder}/admin.sock", "log /dev/log local0": "log stdout format raw local0",
    } | changes  # fmt: skip
    text = CONFIGURATION.read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "haproxy.cfg").write_text(text)
    return [need("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]


def admin(folder: Path, command: str) -> str:
    """Send a command to HAProxy's socket, as socat does, and return the reply."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "admin.sock"))
        connection.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
