"""The parts of bench.py that measure the web's overhead: beside decoding alone, beside mosec, beside the tutorial."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from measure import Bench, Figures, means, middle
from system import (
    ROOT,
    Measured,
    apache,
    application,
    cpu_seconds,
    descendants,
    directory,
    free_port,
    running,
    service,
    service_in,
)
from targets import PHOTO

from images import IMAGES, LOADS

HERE = ROOT / "benchmarks"
LARGE_JPEG = "jpeg-12MP"
TURNS = 3


def tutorial(bench: Bench) -> None:
    """Measure a reconstruction of the tutorial's design."""
    with application(_wsgi("tutorial_web")) as root:
        (root / "run_model_server.py").symlink_to(HERE / "tutorial_server.py")
        with service_in(root, APACHE_DEFINES="WEB_PROCESSES=1 WEB_THREADS=10") as theirs:
            rows = {f"{PHOTO} x {clients}": bench.load_with_costs(theirs, PHOTO, clients) for clients in (1, 64)}
    bench.figures["tutorial"] = rows


def plumbing(bench: Bench) -> None:
    """Measure the service with a model that costs nothing, decoding behind the same Apache, and decoding alone."""
    rows: Figures = {}
    alone, web = [bench.prepare(PHOTO)], []
    with (
        costless_service(bench) as ours,
        application(_wsgi("decode_only")) as root,
        directory() as logs,
        apache(root, logs / "apache") as url,
    ):
        # Alternate, because they are compared and the speed of a shared machine drifts within minutes.
        for name, clients in [(PHOTO, 64), (PHOTO, 1), *((name, 64) for name in LOADS)]:
            busy = bench.load_with_costs(ours, name, clients)
            if (name, clients) == (PHOTO, 64):
                web.append(bench.decode(PHOTO) | {"web_ms": busy["cpu_ms"]["web"]})
                alone.append(bench.prepare(PHOTO))
            for row, figures in (
                (f"service, {name} x {clients}", busy),
                (f"decode only, {name} x {clients}", bench.load(url, name, clients)),
            ):
                rows[row] = max(rows.get(row, figures), figures, key=lambda each: each["per_s"])
    bench.figures |= {"plumbing": rows, "web cost": means(web)}
    bench.figures["alone"] = {PHOTO: means(alone), LARGE_JPEG: bench.prepare(LARGE_JPEG)}


def costless_service(bench: Bench) -> AbstractContextManager[Measured]:
    """Run the service with a model that costs nothing."""
    model = bench.scratch / "costless.keras"
    subprocess.run([sys.executable, str(HERE / "costless.py"), str(model)], check=True, capture_output=True)
    return service(MODEL=str(model))


def _wsgi(module: str) -> str:
    """Return the text of a .wsgi file that serves the app of a module of this folder."""
    return f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom {module} import app as application\n"


def mosec(bench: Bench) -> None:
    """Measure the service with a model that costs nothing, and mosec beside it."""
    if importlib.util.find_spec("mosec") is None:
        bench.leave_out("mosec", "it is not installed; bin/bench installs it")
        return
    ours, theirs = [], []
    with costless_service(bench) as measured, run_mosec(bench.scratch) as (url, pid):
        for _ in range(TURNS):
            ours.append(bench.load_with_costs(measured, PHOTO, 64))
            before = _cpu_of_all(pid)
            figures = bench.load(url, PHOTO, 64)
            used = _cpu_of_all(pid) - before
            theirs.append(figures | {"cpu_ms": {"mosec": 1000 * used / figures["requests"]}})
    bench.figures["mosec"] = {f"service, {PHOTO} x 64": middle(ours), f"mosec, {PHOTO} x 64": middle(theirs)}


@contextmanager
def run_mosec(scratch: Path) -> Iterator[tuple[str, int]]:
    """Run mosec; give its URL and its pid."""
    port = str(free_port())
    command = [sys.executable, str(HERE / "mosec_server.py"), "--address", "127.0.0.1", "--port", port]
    # Its limits are raised to the service's: with its 3 seconds, 64 clients on a slow machine would get errors.
    command += ["--timeout", "60000", "--capacity", "1000"]
    with running(command, scratch / "mosec.log") as process:
        process.wait_for_log("http service is running")
        yield f"http://127.0.0.1:{port}", process.popen.pid


def _cpu_of_all(pid: int) -> float:
    return cpu_seconds([pid, *descendants(pid)])


def decode(bench: Bench) -> None:
    """Measure the CPU of decoding and resizing each image, by the service's code and by plain Pillow."""
    bench.figures["decode"] = {name: bench.decode(name) for name in IMAGES}
