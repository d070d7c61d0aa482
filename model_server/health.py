"""Whether the model server works: what /livez and /readyz say at METRICS_PORT.

It follows the working loop. Redis does not count: restarting the model server would not bring Redis back.
"""

import time


class Health:
    """The state of the loop. The loop reports to it; the thread that serves METRICS_PORT reads it."""

    def __init__(self) -> None:
        self.limit = 60.0  # seconds that a step of the loop may take
        self._last_step: float | None = None  # None until the model is loaded
        self._joined = False

    def step(self) -> None:
        """Note that the loop works. Call it in each step, also while Redis is away."""
        self._last_step = time.monotonic()

    def joined(self) -> None:
        """Note that this server takes jobs."""
        self._joined = True

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
