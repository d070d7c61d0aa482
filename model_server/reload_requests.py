"""The launcher's side of model_server.reload: the clients that ask for a replacement, and what they are told."""

import json
import logging
import os
import socket
import struct
from contextlib import suppress

log = logging.getLogger(__name__)

CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the process at the other end of a Unix socket
PATIENCE = 1  # second for a client to read what it is told


def control_address(pid: int) -> str:
    """Return the address at which the launcher `pid` is asked to replace its model server.

    It has no file, so nothing is left behind. The namespace is part of it, because containers may share a network, and
    each has a launcher with pid 1.
    """
    return f"\0keras-rest-api/launcher/{os.stat('/proc/self/ns/pid').st_ino}/{pid}"


class ReloadRequests:
    """The clients of a launcher: those that wait for the next replacement, and those that follow the current one."""

    def __init__(self) -> None:
        """Listen at the address of this process."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        try:
            self.socket.bind(control_address(os.getpid()))
        except OSError as error:  # another user's program has this address
            log.warning("model_server.reload can't reach this launcher (%s), so use SIGHUP", error)
        self.socket.listen()
        self._waiting: list[socket.socket] = []
        self._following: list[socket.socket] = []

    def accept(self) -> int:
        """Accept the requests of this user and root. Return how many there were."""
        before = len(self._waiting)
        with suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                client.settimeout(PATIENCE)
                peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
                if CREDENTIALS.unpack(peer)[1] in (0, os.geteuid()):
                    self._waiting.append(client)
                else:
                    client.close()
        return len(self._waiting) - before

    def begin(self) -> None:
        """From now on, those that wait follow the replacement."""
        self._following, self._waiting = self._waiting, []

    def tell(self, text: str, replaced: bool | None = None) -> None:
        """Send a line to those that follow. `replaced` is the outcome, after which they are dropped; None before it."""
        line = json.dumps({"replaced": replaced, "text": text}) + "\n"
        for each in self._following:
            with suppress(OSError):  # it waits no longer
                each.sendall(line.encode())
            if replaced is not None:
                each.close()
        if replaced is not None:
            self._following = []

    def end(self, text: str) -> None:
        """Tell all clients that nothing will be replaced any more."""
        self._following += self._waiting
        self.tell(text, replaced=False)
