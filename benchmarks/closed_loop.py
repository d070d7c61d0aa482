"""Clients in a closed loop, cheap enough to run on the cores under test: one process, plain sockets.

    closed_loop.py URL IMAGE CLIENTS SECONDS [MODEL...]

Each client keeps its connection open and sends its next request when the last one is answered. With several models it
asks them in turn, and an answer of another model counts as failed. A request costs 0.2 ms
of CPU here, and 2 ms from 64 threads with `requests`, as in tests/load.py. The first fifth of the time is warm-up and
does not count. Prints a line of JSON; latencies are in ms.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stress_test import percentile

BOUNDARY = "yardstick"
LIMIT = 120.0  # seconds for an answer
WARM_UP = 0.2  # share of the time


def request(host: str, image: bytes, model: str = "") -> bytes:
    """Return a POST of `image` to /predict or /predict/MODEL, as sent by curl -F."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
    body = head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    path = f"/predict/{model}" if model else "/predict"
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def answer(reader: asyncio.StreamReader, model: str) -> tuple[bool, bool]:
    """Read a response; return whether it is a prediction of `model`, and whether Apache closes the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    body = await reader.readexactly(length)
    right = head.startswith("http/1.1 200 ") and json.loads(body)["success"] is True
    return right and (not model or f"\nx-model: {model.lower()}\r" in head), "connection: close" in head


async def client(
    host: str, turns: Iterator[tuple[str, bytes]], until: float, ends: list[tuple[float, float]], failures: list[str]
) -> None:
    """Send the requests of `turns`, each with its model, until `until`; append (end, latency) in seconds to `ends`."""
    name, _, port = host.partition(":")
    reader = writer = None
    while time.perf_counter() < until:
        model, data = next(turns)
        started = time.perf_counter()
        try:
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection(name, int(port))
            writer.write(data)
            right, last = await asyncio.wait_for(answer(reader, model), LIMIT)
        except (OSError, EOFError, ValueError, LookupError, TimeoutError) as error:
            failures.append(repr(error))
            if writer:
                writer.close()
            writer = None
            continue
        now = time.perf_counter()
        if last:
            writer.close()
            writer = None
        ends.append((now, now - started)) if right else failures.append("no prediction")
    if writer:
        writer.close()


async def closed_loop(
    url: str, image: bytes, clients: int, seconds: float, models: Sequence[str] = ("",)
) -> dict[str, float]:
    """Return the figures of `clients` in a closed loop for `seconds`, who ask these models in turn."""
    host = urlsplit(url).netloc
    turns = cycle([(model, request(host, image, model)) for model in models])
    ends: list[tuple[float, float]] = []
    failures: list[str] = []
    begun = time.perf_counter()
    cpu = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(host, turns, begun + seconds, ends, failures))
    cpu = time.process_time() - cpu
    everything = len(ends) + len(failures)
    # Leave out the warm-up, and the answers after the end, when fewer and fewer clients are still sending.
    counted = [(end, latency) for end, latency in ends if begun + seconds * WARM_UP < end <= begun + seconds]
    return summary(counted) | {"failed": len(failures), "requests": everything, "client_ms": 1000 * cpu / everything}


def summary(counted: list[tuple[float, float]]) -> dict[str, float]:
    """Return throughput per second and latencies in ms of requests (end, latency) in seconds.

    The answers of a batch arrive all at once, so throughput is counted from the first end to the last.
    """
    ends = sorted(end for end, _ in counted)
    latencies = sorted(1000 * latency for _, latency in counted)
    if not ends:
        return {"per_s": 0.0}
    first = sum(end < ends[0] + 0.05 for end in ends)  # answers of the first batch
    span = ends[-1] - ends[0]
    ranks = {f"p{rank}": percentile(latencies, rank) for rank in (50, 95, 99)}
    return {"per_s": (len(ends) - first) / span if span else 0.0, "mean": fmean(latencies), **ranks}


def main() -> None:
    """Run the load named on the command line."""
    url, image, clients, seconds, *models = sys.argv[1:]
    loop = closed_loop(url, Path(image).read_bytes(), int(clients), float(seconds), models or [""])
    print(json.dumps(asyncio.run(loop)))


if __name__ == "__main__":
    main()
