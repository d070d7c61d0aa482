"""The code of the benchmarks: what it counts and how it reports."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Service

sys.path.append(str(ROOT / "benchmarks"))

import closed_loop
import report
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


def test_clients_in_a_closed_loop_are_counted(service: Service) -> None:
    figures = closed(service.url, ROOT / "models/digits/three.png", 8)

    assert figures["failed"] == 0
    assert figures["requests"] >= figures["per_s"] > 0
    assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]


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

    assert "| throughput at 64 clients / L | at least 0.95 | 0.75 |" in text
    assert "| p50 of one idle request minus decode and predict, ms | at most 5 | 5 |" in text  # 135 - 130
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


@pytest.mark.slow("draws photos of 12 megapixels")
def test_images_have_the_sizes_in_their_names(tmp_path: Path) -> None:
    sizes = {name: path.stat().st_size for name, path in images.write_images(tmp_path).items()}

    assert sizes["png-432kB"] == pytest.approx(432_000, rel=0.1)
    assert sizes["jpeg-90kB"] == pytest.approx(90_000, rel=0.1)


def test_unknown_part_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "no such part: nonsense" in done.stderr
