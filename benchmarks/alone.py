"""Measure one step alone, without the service, and print the figures as a line of JSON.

    alone.py model SIZE WAY    images/s of ResNet50 in batches of SIZE; WAY is plain, xla, predict, frozen or
                               frozen-twice (two batches at once, as in the model server)
    alone.py prepare IMAGE SECONDS
                               images/s of decoding on all cores; ms of one image; CPU ms of plain Pillow at full size
    alone.py decode IMAGE SECONDS
                               ms of CPU to decode and resize an image: the service's code and plain Pillow, by turns
    alone.py answer IMAGE      ms of decoding, resizing and classifying, one image at a time
    alone.py served            images/s of the model server's model (MODEL) at its batch size, two batches at once
    alone.py load              seconds for the model server's model to load and to warm up

ResNet50 is untrained, which takes the same time as a trained one.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median

import decoding
import numpy as np
from decoding import TARGET

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from web.process import limit_malloc

SECONDS = 8.0  # of each measurement


def median_seconds(
    call: Callable[[], object], seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median seconds of a call by `clock`, after two warm-up calls."""
    call()
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        started = clock()
        call()
        times.append(clock() - started)
    return median(times)


def model(size: int, way: str) -> dict[str, float]:
    """Return images/s of ResNet50 in batches of `size`, from raw pixels to probabilities."""
    from model_server.backends.tensorflow import TensorFlow  # noqa: PLC0415 - slow
    from model_server.keras_import import import_keras  # noqa: PLC0415

    network = import_keras().applications.ResNet50(weights=None)
    pixels = np.random.default_rng(0).integers(0, 256, (size, *TARGET, 3)).astype(np.uint8)
    if way == "predict":
        return {"per_s": size / median_seconds(lambda: network.predict(pixels, verbose=0))}
    if way.startswith("frozen"):
        network = TensorFlow(network)
    else:
        network.compile(jit_compile=way == "xla")
    if way == "frozen-twice":
        return {"per_s": calls_per_second(lambda: network.predict_on_batch(pixels), 2) * size}
    return {"per_s": size / median_seconds(lambda: network.predict_on_batch(pixels))}


def calls_per_second(call: Callable[[], object], threads: int) -> float:
    """Return how often `threads` threads together can run `call`, in calls a second."""
    call()
    call()
    counts = [0] * threads
    begun = time.perf_counter()

    def keep_calling(thread: int) -> None:
        while time.perf_counter() < begun + SECONDS:
            call()
            counts[thread] += 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(keep_calling, range(threads)))
    return sum(counts) / (time.perf_counter() - begun)


def decodes_per_second(data: bytes, start: float, seconds: float) -> float:
    """Return the decodes a second of one process, which begins at `start` (time.time()) and takes `seconds`."""
    time.sleep(max(0.0, start - time.time()))
    done, begun = 0, time.time()  # on a busy machine, the process itself may start late
    while time.time() < begun + seconds:
        decoding.service(data)
        done += 1
    return done / (time.time() - begun)


def prepare(path: str, seconds: float) -> dict[str, float]:
    """Return images/s on all cores at once, ms of one image, and ms of CPU of plain Pillow without JPEG draft mode."""
    data = Path(path).read_bytes()
    cores = os.cpu_count() or 1
    one = median_seconds(lambda: decoding.service(data), seconds / 4)
    full = median_seconds(lambda: decoding.plain(data, draft=False), seconds / 4, time.process_time)
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        rates = pool.starmap(decodes_per_second, [(data, time.time() + 2, seconds)] * cores)
    return {"per_s": sum(rates), "one_ms": 1000 * one, "full_ms": 1000 * full}


def decode(path: str, seconds: float) -> dict[str, float]:
    """Return the ms of CPU to decode and resize an image in the service's way and in Pillow's, by turns.

    All cores do this at once, because a core that shares its caches and units with another one is slower.
    """
    data = Path(path).read_bytes()
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores, limit_malloc) as pool:  # malloc as in a web process
        times = pool.starmap(time_decodes, [(data, time.time() + 2, seconds)] * cores)
    return {name: fmean(each[name] for each in times) for name in times[0]}


def time_decodes(data: bytes, start: float, seconds: float) -> dict[str, float]:
    """Return the median ms of CPU of each way within `seconds` from `start` (time.time()) on."""
    ways = {"service_ms": decoding.service, "plain_ms": decoding.plain}
    times: dict[str, list[float]] = {name: [] for name in ways}
    time.sleep(max(0.0, start - time.time()))
    while time.time() < start + seconds or len(times["plain_ms"]) < 5:
        for name, way in ways.items():
            begun = time.process_time()
            way(data)
            times[name].append(1000 * (time.process_time() - begun))
    return {name: median(each) for name, each in times.items()}


def answer(path: str) -> dict[str, float]:
    """Return the ms from file to probabilities for one image in one process, as in a service without overhead."""
    from model_server.backends.tensorflow import TensorFlow  # noqa: PLC0415 - slow
    from model_server.keras_import import import_keras  # noqa: PLC0415

    data = Path(path).read_bytes()
    network = TensorFlow(import_keras().applications.ResNet50(weights=None))
    return {"one_ms": 1000 * median_seconds(lambda: network.predict_on_batch(decoding.service(data)[np.newaxis]))}


def served() -> dict[str, float]:
    """Return images/s of the settings' model, computed as in the model server, and its batch size."""
    from model_server import classifier  # noqa: PLC0415 - reads the settings

    network = classifier.load()
    network.warm_up()
    size = network.batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, *network.shape)).astype(np.uint8)
    return {"per_s": calls_per_second(lambda: network.classify(pixels), 2) * size, "batch_size": size}


def load() -> dict[str, float]:
    """Return the seconds of each step of a model server's start."""
    started = time.perf_counter()
    from model_server import classifier, keras_import  # noqa: PLC0415 - its time is measured

    keras_import.import_keras()
    imported = time.perf_counter()
    loaded = classifier.load()
    built = time.perf_counter()
    loaded.warm_up()
    return {"import_s": imported - started, "load_s": built - imported, "warm_up_s": time.perf_counter() - built}


def main() -> None:
    """Run the measurement named on the command line."""
    what, *words = sys.argv[1:]
    if what == "model":
        figures = model(int(words[0]), words[1])
    elif what == "prepare":
        figures = prepare(words[0], float(words[1]))
    elif what == "decode":
        figures = decode(words[0], float(words[1]))
    elif what == "answer":
        figures = answer(words[0])
    elif what == "served":
        figures = served()
    else:
        figures = load()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
