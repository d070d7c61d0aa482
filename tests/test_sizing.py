"""The arithmetic of benchmarks/sizing.py, with numbers worked out by hand."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from console_blocks import commands
from harness import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import sizing
import sizing_points
import system
from queue_parts import cell
from sizing import Costs, Hosts

COSTS = Costs(
    web_ms={"small": 4.0, "large": 10.0},
    file_bytes={"small": 100_000.0, "large": 500_000.0},
    redis_ms=0.2,
    model_server_ms=0.15,
    batch_ms=0.8,
    job_bytes=200_000.0,
)
HALF_USED = Hosts(cores=16, gpus=1, gbit=25.0, use=0.5, gpu_images_per_second=2000.0, batch=8.0)


def test_small_load_fits_one_host() -> None:
    plan = sizing.plan(100, {"small": 1.0}, COSTS, HALF_USED)

    assert plan.fits_one_host
    assert (plan.cells, plan.gpus, plan.model_servers) == (1, 1, 1)
    assert plan.web_cores == pytest.approx(0.8)  # 100 x 4 ms, half used
    assert plan.redis_cores == pytest.approx(0.04)
    assert plan.model_cores == pytest.approx(0.05)  # 0.25 ms an image, of which 0.1 are its share of a batch of 8


def test_large_load_needs_cells_with_hosts_of_their_own() -> None:
    plan = sizing.plan(10_000, {"small": 0.5, "large": 0.5}, COSTS, HALF_USED)

    assert plan.cells == 4  # 10,000 x 0.2 ms are 2 cores, half used
    assert plan.web_cores == pytest.approx(140)  # 7 ms an image on average
    assert plan.web_hosts == 4 * 3  # 35 cores in each cell
    assert plan.gpus == 4 * 3  # 2,500 images/s in each cell, and a GPU is planned with 1,000
    assert plan.model_hosts == plan.model_servers == 12
    assert plan.model_cores == pytest.approx(5)
    assert plan.upload_gbit == pytest.approx(24)  # 300 kB a file on average
    assert plan.redis_gbit == pytest.approx(16)


def test_network_of_redis_may_need_more_cells_than_its_cpu() -> None:
    slow = replace(HALF_USED, gbit=4.0)  # 2 Gbit/s are planned with

    assert sizing.cells_for(10_000, COSTS, slow) == 8  # 16 Gbit/s
    assert sizing.cells_for(10_000, COSTS, replace(slow, replicas=2)) == 24  # and twice that for the replicas


def test_one_model_server_takes_images_with_one_core() -> None:
    fast = replace(HALF_USED, gpu_images_per_second=20_000.0, gbit=1000.0)

    plan = sizing.plan(10_000, {"small": 1.0}, replace(COSTS, redis_ms=0.01), fast)

    assert (plan.cells, plan.gpus) == (1, 1)
    assert plan.model_servers == 5  # 10,000 x 0.25 ms are 2.5 cores, half used


def test_model_on_cpus_counts_its_cores() -> None:
    plan = sizing.plan(400, {"small": 1.0}, COSTS, replace(HALF_USED, gpu_images_per_second=0.0, model_ms=25.0))

    assert plan.model_cores == pytest.approx(20.2)  # 400 x 25.25 ms, half used
    assert (plan.gpus, plan.web_hosts, plan.model_hosts) == (0, 1, 2)


def test_capacity_is_that_of_the_models_or_of_the_cores() -> None:
    costs = {"web": 3.5, "Redis": 0.25, "model server": 0.25}

    assert sizing.capacity(costs, 100, 2) == 100
    assert sizing.capacity(costs, inf, 2) == 500


@pytest.mark.parametrize(
    ("mix", "message"),
    [("small=0.5,other=0.5", "no costs of other; there are those of small, large"), ("small=0.5", "add up to 1")],
)
def test_mix_must_be_of_known_pictures_and_complete(mix: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizing.parsed_mix(mix, COSTS)


def test_program_prints_a_row_for_each_load(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(asdict(COSTS) | {"machine": "of a test"}))
    words = "--images-per-second 100 10000 --mix small=0.5,large=0.5 --use 0.5 --batch 8 --gpu-images-per-second 2000"

    command = [sys.executable, "benchmarks/sizing.py", *words.split(), "--costs", str(costs)]
    printed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()

    assert len(printed) == 4
    assert printed[2] == "| 100 | 1 | 1.4, the same host | 0.04 | 1 | 0.05, the same host | 1 | 0.24, 0.16 |"
    assert printed[3] == "| 10,000 | 4 | 140, 12 | 4 | 12 | 5, 12 | 12 | 24, 16 |"


def test_documented_table_is_what_the_program_prints() -> None:
    text = (ROOT / "docs/scaling.md").read_text()
    [command] = [each for each in commands(text) if "sizing.py" in each]
    table = text.partition(command)[2].partition("|")[2].partition("\n\n")[0]

    printed = subprocess.check_output([sys.executable, *command.split()[1:]], cwd=ROOT, text=True)

    assert printed == f"|{table}\n"


def test_point_is_compared_with_what_the_costs_predict() -> None:
    measured = {"per_s": 190.0, "batch": 8.0, "cpu_ms": {"Redis": 0.25, "model server": 0.25, "clients": 1.0}}

    row = sizing_points.checked("a point", 200.0, COSTS, measured)

    assert row == "| a point | 200, 190 (-5%) | 0.04, 0.05 (+19%) | 0.05, 0.05 (-5%) |  |"


def test_point_without_a_limit_is_compared_with_what_the_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing_points, "CORES", 2)
    used = {"Redis": 0.2, "model server": 0.25, "web": 7.0, "clients": 0.55}

    row = sizing_points.checked("all", inf, COSTS, {"per_s": 275.0, "batch": 8.0, "cpu_ms": used}, web_ms=7.0)

    assert row.startswith("| all | 250, 275 (+10%) |")  # 8 ms an image
    assert row.endswith("| 1.75, 1.93 (+10%) |")


def test_costs_of_an_image_and_of_a_batch_follow_from_small_and_large_batches() -> None:
    def load(batch: float, redis: float, server: float) -> dict[str, Any]:
        return {"batch": batch, "job_bytes": 200_000.0, "cpu_ms": {"Redis": redis, "model server": server}}

    usual = [load(8, 0.22, 0.25), load(32, 0.18, 0.1)]
    slow = [load(8, 0.5, 0.9), load(32, 0.5, 0.9)]  # other programs ran

    costs = sizing_points.queue_costs([usual, slow, usual])

    # 0.15 ms are 3/32 of a batch.
    assert costs == {"redis_ms": 0.2, "model_server_ms": 0.05, "batch_ms": 1.6, "job_bytes": 200_000}


@pytest.mark.slow("runs two cells of its own")
def test_points_count_the_images_of_all_cells_and_their_cpu() -> None:
    figures = sizing_points.measure(sizing_points.sleeping(cells=2, servers=1), 2)

    assert 100 < figures["per_s"] <= 1.2 * 2 * sizing_points.MODEL_RATE
    assert 2 < figures["batch"] <= 8
    assert figures["cpu_ms"].keys() == {"Redis", "model server", "clients"}
    assert min(figures["cpu_ms"].values()) > 0
    assert figures["job_bytes"] == pytest.approx(201_500, rel=0.02)  # base64 of 224 x 224 pixels, and a little more


@pytest.mark.slow("runs a model server of its own")
def test_clients_of_the_queue_start_together_and_count_no_late_answers() -> None:
    with cell(1, MODEL_MS="500", BATCH_SIZE="1") as place:  # two batches at once: 4 images/s
        figures = system.child("queue_clients.py", "8", "2", environment=place.where)

    assert figures["per_s"] <= 4.5
    assert figures["images"] > 2 * figures["per_s"]  # those that were late were answered, too
    assert figures["client_ms"] > 0
