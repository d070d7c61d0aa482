"""The parts of bench.py that measure real models: ResNet50, the bundled photo model, and digits."""

import json
import resource
import subprocess
import sys
import time

import requests
from measure import Bench, Figures, batch_sizes
from system import AS_INSTALLED, ROOT, START_LIMIT, Measured, child, responds, run_serve, service, wait_until
from targets import PHOTO, in_series, serial_limit

from images import LOADS

RESNET50 = {"MODEL": "ResNet50", "MODEL_WEIGHTS": "random"}
BUNDLED = {"MODEL": str(ROOT / "models/efficientnet_lite0.keras")}
DIGITS = {"MODEL": str(ROOT / "models/digits.keras")}
LIMITS_SIZES = (1, 8, 32)  # of the batches
CLIENTS = (1, 8, 64, 256)
OVERLOAD = 1.75  # times what the cores can serve
FIRST_ANSWER_LIMIT = 120  # seconds; the service itself gives up after REQUEST_TIMEOUT


def limits(bench: Bench) -> None:
    """Measure the model alone and the decoding alone."""
    model = {}
    for size in LIMITS_SIZES:
        for way in ("plain", "xla", "predict", "frozen", "frozen-twice"):
            bench.show(f"the model alone, batches of {size}, {way}")
            model[f"{way} {size}"] = child("alone.py", "model", str(size), way)["per_s"]
    bench.figures["model"] = model
    bench.figures["prepare"] = {name: bench.prepare(name) for name in LOADS}


def resnet50(bench: Bench) -> None:
    """Measure the whole service with ResNet50."""
    with service(**RESNET50) as ours:
        rows = {}
        for clients in CLIENTS:
            # Measure the baseline right before and right after, while the service is idle.
            before = _baseline(bench, clients)
            rows[f"{PHOTO} x {clients}"] = bench.load_with_costs(ours, PHOTO, clients, _load_seconds(bench, clients))
            bench.figures |= {name: (before[name] + each) / 2 for name, each in _baseline(bench, clients).items()}
        for name in LOADS:
            if name != PHOTO:
                rows[f"{name} x 64"] = bench.load_with_costs(ours, name, 64)
        bench.figures["resnet50"] = rows
        bench.figures["bursts"] = {
            f"500 x {interval:.3g} s": _burst(bench, ours, interval) for interval in _intervals(bench)
        }


def _baseline(bench: Bench, clients: int) -> dict[str, float]:
    """Return the baseline for this number of clients; empty where there is none."""
    if clients == 1:
        bench.show("decode and predict in one process")
        return {"in_process_ms": child("alone.py", "answer", bench.image(PHOTO))["one_ms"]}
    if clients == 64 and "model" in bench.figures:
        way, size = max(bench.figures["model"], key=bench.figures["model"].__getitem__).split()
        model = child("alone.py", "model", size, way)["per_s"]
        return {"L": in_series(model, bench.prepare(PHOTO)["per_s"])}
    return {}


def _load_seconds(bench: Bench, clients: int) -> float:
    # At a dozen answers a second, it takes longer until each of 256 clients has had several answers.
    return bench.seconds * (1 if clients <= 64 else 2)


def _intervals(bench: Bench) -> list[float]:
    """Return the seconds between requests for each burst: the tutorial's, none, and an overload on any machine.

    The target was set on two cores, where the tutorial's 20 requests a second were 1.75 times the capacity. A faster
    machine serves 20 a second without a backlog, so it needs a shorter interval.
    """
    overload = []
    if {"model", "prepare"} <= bench.figures.keys():
        overload = [1 / (OVERLOAD * serial_limit(bench.figures, PHOTO))]
    return [0.05, 0, *(interval for interval in overload if interval < 0.05)]


def _burst(bench: Bench, ours: Measured, interval: float) -> Figures:
    bench.show(f"stress_test.py --interval {interval:g}")
    written = bench.scratch / "burst.json"
    batches = len(ours.server.batches)
    command = [sys.executable, str(ROOT / "stress_test.py"), "--url", f"{ours.url}/predict"]
    command += ["--image", bench.image(PHOTO), "--interval", str(interval), "--json", str(written)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures: Figures = json.loads(written.read_text())
    del figures["results"]
    return figures | {
        "interval_s": interval,
        "client_cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "batches": batch_sizes(ours.server.batches[batches:]),
    }


def bundled(bench: Bench) -> None:
    """Compare the bundled photo model with ResNet50: alone, through the service, memory, start-up."""
    models = {"EfficientNet-Lite0": BUNDLED, "ResNet50": RESNET50}
    alone = {name: _alone(bench, name, model) for name, model in models.items()}
    prepare = bench.prepare(PHOTO)["per_s"]
    rows = {name: _in_service(bench, model) for name, model in models.items()}
    # Again in reverse order: the speed of a shared machine drifts within minutes.
    for name, model in reversed(models.items()):
        per_s = (alone[name]["per_s"] + _alone(bench, name, model)["per_s"]) / 2
        rows[name] |= {
            "alone_per_s": per_s,
            "batch_size": alone[name]["batch_size"],
            "limit_per_s": in_series(per_s, prepare),
        }
    for name, model in models.items():
        bench.show(f"start-up with {name}")
        rows[name] |= _start(bench, model)
    bench.figures["bundled"] = rows


def _alone(bench: Bench, name: str, model: dict[str, str]) -> Figures:
    bench.show(f"{name} alone")
    return dict(child("alone.py", "served", environment=model))


def _in_service(bench: Bench, model: dict[str, str]) -> Figures:
    """Return images/s of 64 clients, the latency of one client, and the model server's memory in MB."""
    with service(**model) as ours:
        busy = bench.load_with_costs(ours, PHOTO, 64)
        idle = bench.load(ours.url, PHOTO, 1)
        return {
            "service_per_s": busy["per_s"],
            "failed": busy["failed"] + idle["failed"],
            "p50_of_one_ms": idle["p50"],
            "memory_mb": ours.resident_mb("model server"),
            "peak_memory_mb": busy["peak_mb"]["model server"],
        }


def precision(bench: Bench) -> None:
    """Measure the speed and accuracy of other number formats and of XLA."""
    rows = {}
    for name, model in (("ResNet50", RESNET50), ("digits", DIGITS)):
        for policy, xla in (("float32", False), ("float32", True), ("mixed_bfloat16", False)):
            bench.show(f"{name}, {policy}, XLA {xla}")
            figures = child("precision.py", policy, str(xla), environment=model)
            rows[f"{name}, {policy}{', XLA' if xla else ''}"] = dict(figures)
    bench.figures["precision"] = rows


def start(bench: Bench) -> None:
    """Measure the time from bin/serve to the first answer, and the model's share of it."""
    bench.show("start-up")
    started = _start(bench, RESNET50)
    bench.figures["start"] = started | child("alone.py", "load", environment=RESNET50 | AS_INSTALLED)


def _start(bench: Bench, model: dict[str, str]) -> Figures:
    """Return the seconds from bin/serve to the first page, to the first answer and to its ready line."""
    log = bench.scratch / "serve.log"
    log.write_text("")
    begun = time.perf_counter()
    with run_serve(log, **model) as serve:
        wait_until(lambda: responds(serve.url), f"the web answers; see {log}", START_LIMIT)
        web = time.perf_counter() - begun
        wait_until(lambda: _classified(serve.url), f"a photo is classified; see {log}", START_LIMIT)
        answered = time.perf_counter() - begun
        serve.process.wait_for_log("* Ready")
        return {"first_answer_s": answered, "web_s": web, "ready_s": time.perf_counter() - begun}


def _classified(url: str) -> bool:
    """Whether a photo is classified; the request waits until the model server is ready."""
    photo = (ROOT / "images/cat.jpg").read_bytes()
    try:
        return requests.post(f"{url}/predict", files={"image": photo}, timeout=FIRST_ANSWER_LIMIT).ok
    except requests.RequestException:
        return False
