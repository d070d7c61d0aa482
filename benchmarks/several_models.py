"""The part of bench.py that measures three models in one service: each alone in turn, and all of them at once."""

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Bench, Figures, means
from system import ROOT, WEB, directory, redis_server, responds, run_apache, running, wait_until

IMAGE = "jpeg-90kB"
CLIENTS = 32  # of each model
TURNS = 3
BUNDLED = ROOT / "models/efficientnet_lite0.keras"


def models(bench: Bench) -> None:
    """Measure three models, loaded one after the other, and all at once, each by clients of its own."""
    rows: dict[str, list[Figures]] = {}
    with three_models(bench.scratch) as (url, names), ThreadPoolExecutor(len(names)) as threads:
        bench.image(IMAGE)  # made before several threads need it

        def load(name: str) -> Figures:
            return bench.load(url, IMAGE, CLIENTS, models=(name,))

        for _ in range(TURNS):  # alternate, because the speed of a shared machine drifts within minutes
            for name in names:
                rows.setdefault(f"{name}, alone", []).append(load(name))
            for name, figures in zip(names, threads.map(load, names), strict=True):
                rows.setdefault(f"{name}, with the others", []).append(figures)
    bench.figures["models"] = {row: means(figures) for row, figures in rows.items()}


@contextmanager
def three_models(scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Run a service with the bundled model three times, under three names; give its URL and the names."""
    paths = [BUNDLED, *(scratch / f"{name}.keras" for name in ("second", "third"))]
    for path in paths[1:]:
        for suffix in (".keras", ".json"):  # the JSON file has the labels
            shutil.copy(BUNDLED.with_suffix(suffix), path.with_suffix(suffix))
    names = [path.stem for path in paths]
    with directory() as logs, redis_server(logs / "redis") as (_, where), ExitStack() as stack:
        settings = where | {"MODELS": ",".join(map(str, paths))}
        for name in names:
            command = [sys.executable, "run_model_server.py", "--model", name]
            stack.enter_context(running(command, logs / name, **settings)).wait_for_log("* Joined the queue")
        url = stack.enter_context(run_apache(wait=True, log=logs / "apache", **WEB, **settings))
        wait_until(lambda: all(responds(url, f"/readyz/{name}") for name in names), "all models are ready")
        yield url, names
