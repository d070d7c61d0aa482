"""The part of bench.py that measures three models in one service: each alone in turn, and all of them together."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Bench, Figures, means
from system import ROOT, WEB, directory, redis_server, responds, run_apache, running, wait_until

IMAGE = "jpeg-90kB"
CLIENTS = 48
TURNS = 3
BUNDLED, DIGITS = ROOT / "models/efficientnet_lite0.keras", ROOT / "models/digits.keras"


def models(bench: Bench) -> None:
    """Measure three models alone, one after the other, and in a mix that asks them in turn."""
    rows: dict[str, list[Figures]] = {}
    with three_models(bench.scratch) as (url, names):
        for _ in range(TURNS):  # alternate, because the speed of a shared machine drifts within minutes
            for row, asked in [*((name, (name,)) for name in names), ("mix", tuple(names))]:
                rows.setdefault(row, []).append(bench.load(url, IMAGE, CLIENTS, models=asked))
    bench.figures["models"] = {row: means(figures) for row, figures in rows.items()}


@contextmanager
def three_models(scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Run a service with the bundled model, digits and a copy of it; give its URL and the models' names."""
    copy = scratch / "numbers.keras"
    for suffix in (".keras", ".labels.txt", ".json"):
        shutil.copy(DIGITS.with_suffix(suffix), copy.with_suffix(suffix))
    paths = [BUNDLED, DIGITS, copy]
    names = [path.stem for path in paths]
    with directory() as logs, redis_server(logs / "redis") as (_, where), ExitStack() as stack:
        settings = where | {"MODELS": ",".join(map(str, paths))}
        for name in names:
            command = [sys.executable, "run_model_server.py", "--model", name]
            stack.enter_context(running(command, logs / name, **settings)).wait_for_log("* Joined the queue")
        url = stack.enter_context(run_apache(wait=True, log=logs / "apache", **WEB, **settings))
        wait_until(lambda: all(responds(url, f"/readyz/{name}") for name in names), "all models are ready")
        yield url, names
