"""A socket that stands in for systemd, and keeps what a program reports to it."""

import queue
import socket
import threading
import time

SILENCE = 2.0  # seconds; an idle model server reports several times a second


class Systemd:
    """The messages to an abstract socket, in order. A thread reads them, since a full socket would block the sender."""

    def __init__(self) -> None:
        self.address = f"@keras-rest-api-test-{time.monotonic_ns()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address.replace("@", "\0"))
        self.messages: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while message := self.socket.recv(1000):
            self.messages.put(message.decode())

    def hear(self, seconds: float = SILENCE) -> str:
        """The next message; empty if none comes."""
        try:
            return self.messages.get(timeout=seconds)
        except queue.Empty:
            return ""

    def hear_all(self) -> list[str]:
        """All messages that have not been read yet."""
        return [self.messages.get() for _ in range(self.messages.qsize())]
