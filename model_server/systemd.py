"""What a model server and its launcher or systemd tell each other: reports as in sd_notify(3), and a variable."""

import os
import socket
from contextlib import suppress

READY, STOPPING, WATCHDOG, STATUS = "READY=1", "STOPPING=1", "WATCHDOG=1", "STATUS="
REPLACES = "REPLACES_PID"  # variable that the launcher sets for a model server that replaces the process of this pid
PATIENCE = 1  # second for the receiver to read, so that nothing hangs if it never does


def notify_systemd(state: str) -> None:
    """Send a state to systemd, such as READY=1; does nothing without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        # The next WATCHDOG=1 follows soon, so never hold up the batches for this one.
        messenger.settimeout(0 if state == WATCHDOG else PATIENCE)
        messenger.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        messenger.send(state.encode())
