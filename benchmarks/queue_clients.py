"""Clients of the queue without HTTP: push images as the web does, and wait for their answers.

    queue_clients.py CLIENTS SECONDS [START]

Each client is a thread that pushes its next image when the last one is answered, from the unix time START (default:
now). Prints a line of JSON: `per_s` leaves out the answers that came after the end, when fewer and fewer were waiting.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from helpers import USUAL_SHAPE, base64_encode_image
from image_queue import WebQueue

LIMIT = 60.0  # seconds for an answer


def client(queue: WebQueue, until: float) -> tuple[int, int]:
    """Push one image after another until `until` (time.monotonic()); return how many were answered, and too late."""
    image = base64_encode_image(np.zeros(USUAL_SHAPE, np.uint8))
    answered = late = 0
    while time.monotonic() < until:
        answered += "predictions" in queue.ask(image, time.time() + LIMIT)
        late = int(time.monotonic() > until)
    return answered, late


def main() -> None:
    """Run the clients named on the command line."""
    clients, seconds = int(sys.argv[1]), float(sys.argv[2])
    start = float(sys.argv[3]) if len(sys.argv) > 3 else time.time()
    time.sleep(max(0.0, start - time.time()))
    queue, until, cpu = WebQueue(), time.monotonic() + seconds, time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(client, [queue] * clients, [until] * clients))
    images, late = (sum(each) for each in zip(*counts, strict=True))
    cpu = time.process_time() - cpu
    print(json.dumps({"images": images, "per_s": (images - late) / seconds, "client_ms": 1000 * cpu / max(images, 1)}))


if __name__ == "__main__":
    main()
