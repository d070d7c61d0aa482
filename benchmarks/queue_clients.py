"""Clients of the queue without HTTP: push images as the web does, and wait for their answers.

    queue_clients.py CLIENTS SECONDS

Each client is a thread that pushes its next image when the last one is answered. Prints a line of JSON.
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


def client(queue: WebQueue, until: float) -> int:
    """Push one image after another until `until` (time.monotonic()); return how many were answered."""
    image = base64_encode_image(np.zeros(USUAL_SHAPE, np.uint8))
    answered = 0
    while time.monotonic() < until:
        answered += "predictions" in queue.ask(image, time.time() + LIMIT)
    return answered


def main() -> None:
    """Run the clients named on the command line."""
    clients, seconds = int(sys.argv[1]), float(sys.argv[2])
    queue, begun = WebQueue(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        images = sum(pool.map(client, [queue] * clients, [begun + seconds] * clients))
    print(json.dumps({"images": images, "per_s": images / (time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
