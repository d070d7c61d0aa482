"""The code of the benchmarks: what it counts and how it reports."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Missing, Service
from tqdm import tqdm

sys.path.append(str(ROOT / "benchmarks"))

import closed_loop
import measure
import overhead_parts
import queue_parts
import report
import several_models
import system
import targets

import images

FIGURES = {
    "machine": {"cpu": "a processor", "cores": 2, "python": "3.11"},
    "model": {"plain 1": 10.0, "xla 8": 12.0, "predict 1": 3.0},
    "prepare": {"png-432kB": {"per_s": 60.0, "one_ms": 30.0, "full_ms": 30.0}},
    "in_process_ms": 130.0,
    "L": 12.0,
}


def values_of(figures: dict[str, Any]) -> dict[str, float]:
    """The targets whose parts were measured."""
    return {each.what: each.value for each in targets.targets(figures) if not math.isnan(each.value)}


def closed(url: str, image: Path, clients: int) -> dict[str, float]:
    return system.child("closed_loop.py", url, str(image), str(clients), "2")


@pytest.mark.slow("loads a service for seconds")
def test_clients_in_a_closed_loop_are_counted(service: Service) -> None:
    figures = closed(service.url, ROOT / "models/digits/three.png", 8)

    assert figures["failed"] == 0
    assert figures["requests"] >= figures["per_s"] > 0
    assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]


@pytest.mark.slow("loads a service for seconds")
def test_response_without_a_prediction_counts_as_failed(service: Service) -> None:
    figures = closed(service.url, ROOT / "README.md", 2)

    assert figures["failed"] == figures["requests"] > 0
    assert figures["per_s"] == 0


def test_throughput_leaves_out_the_first_batch() -> None:
    four_a_second = [(second + place / 1000, 0.5) for second in (1.0, 2.0, 3.0) for place in range(4)]

    assert closed_loop.summary(four_a_second)["per_s"] == pytest.approx(4, rel=0.01)


def test_serial_limit_combines_the_fastest_call_and_decoding() -> None:
    assert targets.serial_limit(FIGURES, "png-432kB") == pytest.approx(10)  # 1 / (1/12 + 1/60)


def test_report_shows_only_targets_whose_parts_were_measured() -> None:
    loads = {"png-432kB x 64": {"per_s": 9.0, "failed": 0}, "png-432kB x 1": {"per_s": 7.0, "p50": 135.0, "failed": 0}}

    text = report.markdown(FIGURES | {"resnet50": loads})

    assert "| throughput at 64 clients / L | at least 0.95 | 0.75 | missed |" in text
    assert "| p50 of one idle request minus decode and predict, ms | at most 5 | 5 | reached |" in text  # 135 - 130
    assert "8 model servers" not in text


def test_report_compares_the_bundled_model_with_resnet50() -> None:
    ours = dict.fromkeys(report.BUNDLED, 4.0) | {"service_per_s": 45.0, "limit_per_s": 60.0, "failed": 0}
    other = dict.fromkeys(report.BUNDLED, 8.0) | {"service_per_s": 15.0, "limit_per_s": 20.0, "failed": 0}

    text = report.markdown(FIGURES | {"bundled": {"EfficientNet-Lite0": ours, "ResNet50": other}})

    assert "|  | EfficientNet-Lite0 | ResNet50 | ratio |" in text
    assert "| images/s through the service, 64 clients | 45 | 15 | 3 |" in text
    assert "| through the service / L | 0.75 | 0.75 |  |" in text
    assert "| start of bin/serve to the first answer, s | 4 | 8 | 0.5 |" in text
    assert "| failed | 0 | 0 |  |" in text


def test_report_shows_where_the_cpu_goes() -> None:
    service = {"per_s": 70.0, "failed": 0, "cpu_ms": {"web": 18.0, "Apache": 1.3, "Redis": 0.7, "model server": 4.0}}
    mosec = {"per_s": 140.0, "failed": 0, "cpu_ms": {"mosec": 13.0}}
    loads = {"service, png-432kB x 64": service, "mosec, png-432kB x 64": mosec}

    text = report.markdown(FIGURES | {"mosec": loads})

    assert "| ms of a request | web | Apache | Redis | model server | mosec | all |" in text
    assert "| mosec: service, png-432kB x 64 | 18 | 1.3 | 0.7 | 4 |  | 24 |" in text
    assert "| mosec: mosec, png-432kB x 64 |  |  |  |  | 13 | 13 |" in text
    assert "| requests/s with the costless model / mosec | at least 1.0 | 0.5 | missed |" in text


def test_decoding_and_the_webs_other_work_are_compared_with_plain_pillow() -> None:
    decode = {name: {"service_ms": 4.0, "plain_ms": 10.0} for name in images.IMAGES}
    cost = {"web_ms": 6.5, "service_ms": 4.0, "plain_ms": 10.0}

    values = values_of(FIGURES | {"decode": decode, "web cost": cost})

    assert values["web: CPU of a request beyond decoding / plain Pillow's decoding"] == pytest.approx(0.25)
    assert values["decode and resize / plain Pillow, png-screenshot"] == pytest.approx(0.4)


def test_models_at_once_are_compared_with_each_alone_in_turn() -> None:
    rates = {"a, alone": 100.0, "b, alone": 50.0, "a, with the others": 60.0, "b, with the others": 15.0}

    values = values_of(FIGURES | {"models": {row: {"per_s": rate} for row, rate in rates.items()}})

    assert values["three models at once / each alone in turn"] == pytest.approx(0.6 + 0.3)


def test_an_answer_of_another_model_counts_as_failed(service: Service) -> None:
    image = str(ROOT / "models/digits/three.png")

    right, wrong = (system.child("closed_loop.py", service.url, image, "2", "0.5", model) for model in ("digits", "x"))

    assert (right["failed"], right["requests"] > 0) == (0, True)
    assert wrong["failed"] == wrong["requests"] > 0


@pytest.mark.slow("starts three model servers")
def test_three_models_are_measured_alone_and_at_once(tmp_path: Path) -> None:
    with tqdm(disable=True) as progress:
        bench = measure.Bench(tmp_path, 1.0, progress)
        several_models.models(bench)

    rows = bench.figures["models"]
    names = ("efficientnet_lite0", "second", "third")
    assert set(rows) == {f"{name}, {how}" for name in names for how in ("alone", "with the others")}
    assert all(row["failed"] == 0 and row["per_s"] > 0 for row in rows.values())


def test_queues_are_compared_with_redis_benchmark_and_with_one_server() -> None:
    intake = {
        "server": {"per_s": 4000.0, "cpu_ms": {"model server": 0.12, "Redis": 0.1}},
        "redis-benchmark": {"per_s": 5000.0},
        "clients": {"per_s": 900.0, "cpu_ms": {"model server": 0.3, "Redis": 0.25}},
    }
    rates = {"1 on one queue": 500.0, "4 on one queue": 1900.0, "2 cells of one": 950.0}
    scaling = {f"{name}, 2 ms an image": {"per_s": rate} for name, rate in rates.items()}

    values = values_of(FIGURES | {"intake": intake, "scaling": scaling})

    assert values == {
        "model server, 1 ms a batch: CPU of an image, ms": 0.12,
        "model server, 1 ms a batch: images/s / redis-benchmark": 0.8,
        "Redis: CPU of an image, pushed, taken and answered, ms": 0.25,
        "4 model servers / 1, 2 ms an image": 3.8,
        "2 cells / 1, 2 ms an image": 1.9,
    }


def test_unavoidable_backlog_matches_a_calculation_by_hand() -> None:
    # 10 images/s, or 8 while the clients use the cores, too. Request 495 is sent after 24.7 s and answered after
    # 61.875 s at the earliest, so it waits 37.175 s.
    burst = {"latency_ms": {"p99": 2 * 37_175.0}, "failed": 0, "interval_s": 0.05, "client_cpu_s": 25.0}

    values = values_of(FIGURES | {"bursts": {"500 x 0.05 s": burst}})

    assert values["500 requests at 1.75 L or 20/s: p99 / unavoidable backlog"] == pytest.approx(2)


@pytest.mark.slow("runs a whole part of the benchmark")
def test_plumbing_is_measured_and_reported(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench.py", "plumbing", "--seconds", "2", "--out", str(tmp_path)]

    printed = subprocess.check_output(command, cwd=ROOT, timeout=280, text=True)

    figures = json.loads((tmp_path / "bench.json").read_text())["plumbing"]
    assert all(row["failed"] == 0 and row["requests"] > 0 for row in figures.values())
    busy = figures["service, png-432kB x 64"]
    assert {"Apache", "Redis", "model server", "web"} <= set(busy["cores"])
    assert 20 < busy["peak_mb"]["web"] < 200
    # An image is 0.2 MB of base64, which is written once and read once.
    assert 0.4 < busy["redis_mb_per_request"] < 0.5
    assert busy["batches"]["most"] > 1
    assert printed.startswith("# Benchmarks")


@pytest.mark.slow("draws photos until one has the right size")
def test_images_have_the_sizes_in_their_names() -> None:
    assert len(images.IMAGES["png-432kB"]()) == pytest.approx(432_000, rel=0.1)
    assert len(images.IMAGES["jpeg-90kB"]()) == pytest.approx(90_000, rel=0.1)


@pytest.mark.slow("runs model servers of its own")
def test_full_queue_is_drained_and_clients_of_the_queue_are_answered() -> None:
    with queue_parts.cell(2, MODEL_MS="5", BATCH_SIZE="8") as cell:
        drained = queue_parts.drain(100, cell)
        waited = system.child("queue_clients.py", "4", "1", environment=cell.where)

    assert drained["per_s"] > 0
    assert sum(size * times for size, times in drained["batches"]["common"]) == 100
    assert drained["cpu_ms"].keys() == {"Redis", "model server"}
    assert waited["images"] > 4


@pytest.mark.slow("decodes for seconds")
def test_decoding_is_timed_in_two_ways() -> None:
    figures = system.child("alone.py", "decode", str(ROOT / "images/cat.jpg"), "0.5")

    assert figures.keys() == {"service_ms", "plain_ms"}
    assert min(figures.values()) > 0


@pytest.mark.tools
def test_mosec_reads_the_same_request_and_answers_alike(tmp_path: Path) -> None:
    if importlib.util.find_spec("mosec") is None:
        raise Missing("mosec is not installed")
    with overhead_parts.run_mosec(tmp_path) as (url, _):
        theirs = Service(url).predictions((ROOT / "models/digits/three.png").read_bytes())
        figures = closed(url, ROOT / "models/digits/three.png", 8)

    assert [each.keys() for each in theirs] == [{"label", "probability"}] * 3
    assert sum(each["probability"] for each in theirs) == pytest.approx(1)
    assert figures["requests"] > figures["failed"] == 0


def test_without_mosec_its_part_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = measure.Bench(tmp_path, 1, tqdm(disable=True))

    overhead_parts.mosec(bench)

    assert capsys.readouterr().err == "* mosec is left out: it is not installed; bin/bench installs it\n"
    assert bench.figures == {}


def test_unknown_part_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "no such part: nonsense" in done.stderr
