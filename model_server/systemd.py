"""Tells systemd the state of the model server."""

import os
import socket
from contextlib import suppress


def notify_systemd(state: str) -> None:
    """Send a state to systemd, such as READY=1 (sd_notify(3)); does nothing without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        messenger.settimeout(1)  # never hang on a systemd that does not listen
        messenger.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        messenger.send(state.encode())
