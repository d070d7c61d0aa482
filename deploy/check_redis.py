"""Print the problems of the configured Redis for bin/install, one line each.

Print nothing if Redis does not answer or refuses the connection: the web and the model server report that themselves.
"""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from redis.exceptions import RedisError

from image_queue import ImageQueue, UnusableRedis

if __name__ == "__main__":
    queue = ImageQueue()
    try:
        with suppress(RedisError):
            queue.check()
    except UnusableRedis as error:
        print(f"* {error}")
    for risk in queue.risks:
        print(f"* Redis at {queue.address} {risk}.")
