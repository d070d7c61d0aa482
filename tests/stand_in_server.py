"""Stands in for run_model_server.py under the launcher: loads, fails, hangs and ends as the test tells it.

The file BEHAVIOR has what it should do, as JSON. It appends what happens to the file EVENTS, one line each.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model_server.systemd import READY, STATUS, STOPPING, WATCHDOG, notify_systemd

DEFAULTS = {
    "name": "first",
    "status": "",  # what it reports before it joins or fails
    "fails": None,  # exit code with which it ends instead of joining the queue
    "dies": False,  # whether a signal ends it instead
    "hangs": False,  # whether it never joins
    "stays": False,  # whether it ignores SIGTERM once it has joined
    "leave": 0,  # seconds that its last batch takes
}


def main() -> int:
    told = DEFAULTS | json.loads(Path(os.environ["BEHAVIOR"]).read_text())
    asked: list[int] = []

    def event(what: str) -> None:
        with Path(os.environ["EVENTS"]).open("a") as file:
            file.write(f"{told['name']} {what}\n")

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    event(f"loads {os.getpid()} {' '.join(sys.argv[1:])}".strip())
    if told["status"]:
        notify_systemd(f"{STATUS}{told['status']}")
    if told["dies"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if told["fails"] is not None:
        return int(told["fails"])
    while told["hangs"]:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    event("joins")
    notify_systemd(READY)
    while not asked or told["stays"]:
        notify_systemd(WATCHDOG)
        time.sleep(0.05)
    notify_systemd(STOPPING)
    time.sleep(told["leave"])
    event("left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
