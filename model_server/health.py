"""Whether the model server works: what it tells systemd, and what /livez and /readyz say at METRICS_PORT.

Both follow the working loop. Redis does not count: restarting the model server would not bring Redis back.
"""

import os
import socket
import time
from contextlib import suppress


class Health:
    """The state of the loop. The loop calls step() and joined(); the thread that serves METRICS_PORT reads the rest."""

    def __init__(self) -> None:
        self.limit = 60.0  # seconds that a step of the loop may take
        self._last_step: float | None = None  # None until the model is loaded
        self._joined = False

    def step(self) -> None:
        """Note that the loop works. Call it in each step, also while Redis is away."""
        self._last_step = time.monotonic()
        notify_systemd("WATCHDOG=1")

    def joined(self) -> None:
        """Note that this server takes jobs."""
        self._joined = True
        notify_systemd("READY=1")

    def left(self) -> None:
        """Note that this server takes no more jobs: it is about to end, or has lost Redis."""
        self._joined = False

    def why_dead(self) -> str:
        """Return why a supervisor should restart this process; empty if it works."""
        if self._last_step is None:
            return "The model is not loaded yet."
        seconds = time.monotonic() - self._last_step
        return f"The loop has not made a step for {seconds:.0f} s." if seconds > self.limit else ""

    def why_not_ready(self) -> str:
        """Return why this server takes no jobs; empty if it does."""
        return self.why_dead() or ("" if self._joined else "No jobs are taken: Redis is away, or this server ends.")


health = Health()


def notify_systemd(state: str) -> None:
    """Send a state to systemd, such as READY=1 (sd_notify(3)); does nothing without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        messenger.settimeout(1)  # never hang if systemd does not read
        messenger.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        messenger.send(state.encode())
