"""Metrics and logs: counts add up in every web process, and Prometheus' own tools accept them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import requests
from harness import (
    ROOT,
    Process,
    Service,
    free_port,
    need,
    responds,
    run_apache,
    run_redis,
    run_service,
    running,
    wait_until,
    web_processes,
)
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from samples import saved

WHITE = saved(Image.new("RGB", (32, 32), "white"), "PNG")
IMAGE = (ROOT / "models/digits/three.png").read_bytes()
MONITORING = ROOT / "deploy/monitoring"

ANSWERED = 'keras_rest_api_requests_total{endpoint="/predict",model="digits",status="200"}'

Figures = dict[str, float]


def figures(url: str) -> Figures:
    """All samples at `url`/metrics, keyed by name and labels in Prometheus' notation."""
    answer = requests.get(f"{url}/metrics", timeout=10)
    assert answer.status_code == 200
    return {
        sample.name + ("{" + ",".join(f'{k}="{v}"' for k, v in sample.labels.items()) + "}" if sample.labels else ""):
        sample.value
        for family in text_string_to_metric_families(answer.text) for sample in family.samples
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A service with two web processes, and the URL of its model server's metrics."""
    port = free_port()
    with run_service(tmp_path_factory.mktemp("measured"), METRICS_PORT=str(port)) as service:
        yield service, f"http://127.0.0.1:{port}"


def growth(before: Figures, after: Figures) -> Figures:
    """The increase of each counter; a new series counts from zero. Not for gauges."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def test_metrics_of_a_stress_test_add_up(measured: tuple[Service, str]) -> None:
    service, model_server = measured
    command = [sys.executable, "stress_test.py", "--url", f"{service.url}/predict", "--interval", "0", "--requests"]
    before = figures(service.url), figures(model_server), len(service.servers[0].batches)

    printed = subprocess.check_output([*command, "300"], cwd=ROOT, text=True, timeout=120)
    bad = service.post(b"no image")
    both = requests.post(f"{service.url}/predict", files=[("image", IMAGE), ("image", b"no image")], timeout=60)

    assert "300" in printed
    assert (bad.status_code, both.status_code) == (400, 200)
    web, server = growth(before[0], figures(service.url)), growth(before[1], figures(model_server))
    assert web[ANSWERED] == 301
    assert web['keras_rest_api_requests_total{endpoint="/predict",model="digits",status="400"}'] == 1
    # The 400 is not included: fast errors would hide how long images take.
    assert web['keras_rest_api_request_duration_seconds_count{model="digits"}'] == 301
    assert web['keras_rest_api_images_total{model="digits",outcome="classified"}'] == 301
    assert web['keras_rest_api_images_total{model="digits",outcome="bad_image"}'] == 2
    assert web['keras_rest_api_jobs_total{event="queued",model="digits"}'] == 301
    assert web['keras_rest_api_jobs_total{event="retried",model="digits"}'] == 0
    assert web['keras_rest_api_batch_size_count{model="digits"}'] == 301
    for stage in ("prepare", "queue", "compute"):
        assert web[f'keras_rest_api_stage_seconds_count{{model="digits",stage="{stage}"}}'] == 301
    assert server['keras_model_server_jobs_total{event="taken",model="digits"}'] == 301
    assert server['keras_model_server_images_total{model="digits",outcome="classified"}'] == 301
    assert server['keras_model_server_batch_size_sum{model="digits"}'] == 301
    batches = server['keras_model_server_batch_size_count{model="digits"}']
    assert server['keras_model_server_compute_seconds_count{model="digits"}'] == batches
    logged = service.servers[0].batches[before[2] :]
    assert len(logged) == batches
    assert sum(logged) == 301


def test_stats_agrees_with_the_metrics(measured: tuple[Service, str]) -> None:
    service, _ = measured
    service.post(IMAGE)
    service.post(b"no image")

    web, stats = figures(service.url), requests.get(f"{service.url}/stats", timeout=10).json()

    statuses = {"200", "400"}
    assert stats["requests"] == {
        each: web[f'keras_rest_api_requests_total{{endpoint="/predict",model="digits",status="{each}"}}']
        for each in statuses
    }
    assert stats["images"] == web['keras_rest_api_images_total{model="digits",outcome="classified"}']
    assert stats["queue_length"] == web['keras_rest_api_queue_length{model="digits"}'] == 0
    assert [about["model"] for about in stats["model_servers"].values()] == ["digits"]
    assert web['keras_rest_api_model_servers{model="digits"}'] == 1
    for ours, theirs in (("latency", "request_duration_seconds"), ("batch_size", "batch_size")):
        histogram = stats[ours]
        assert (
            histogram["count"]
            == histogram["buckets"]["+Inf"]
            == web[f'keras_rest_api_{theirs}_count{{model="digits"}}']
        )
        assert histogram["sum"] == pytest.approx(web[f'keras_rest_api_{theirs}_sum{{model="digits"}}'])
    assert 1 <= stats["batch_size"]["buckets"]["1"] <= stats["batch_size"]["buckets"]["16"] <= stats["images"]


def test_any_web_process_reports_the_counts_of_all(measured: tuple[Service, str]) -> None:
    service, _ = measured
    before = figures(service.url)[ANSWERED]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(service.post, [IMAGE] * 60))

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(figures, [service.url] * 20))

    assert {each[ANSWERED] - before for each in answers} == {60}


def test_counts_survive_the_death_of_a_web_process(measured: tuple[Service, str]) -> None:
    service, _ = measured
    service.post(IMAGE)
    before = figures(service.url)[ANSWERED]
    for _ in range(3):
        killed = web_processes(service.url)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(partial(replaced, service.url, killed), "new web processes answer")
        service.post(IMAGE)

    assert figures(service.url)[ANSWERED] - before == 3


def replaced(url: str, killed: list[int]) -> bool:
    return len(set(web_processes(url)) - set(killed)) == len(killed) and responds(url)


def test_metrics_report_that_redis_is_down(tmp_path: Path) -> None:
    port = free_port()
    with run_apache(REDIS_PORT=str(port)) as url:
        without, stats = figures(url), requests.get(f"{url}/stats", timeout=10).json()
        with run_redis(tmp_path / "redis", port):
            wait_until(lambda: figures(url)["keras_rest_api_redis_up"] == 1, "the metrics see Redis")

    assert without["keras_rest_api_redis_up"] == 0
    assert "keras_rest_api_queue_length" not in without
    assert stats["queue_length"] is None
    assert stats["model_servers"] == {}


def test_unwritable_metrics_folder_leaves_each_process_its_own_counts(redis_port: int) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": "/proc/nowhere"}
    code = """
import run_web_server
client = run_web_server.create_app().test_client()
client.get("/livez")
print(client.get("/metrics").text)
"""

    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )

    assert 'keras_rest_api_requests_total{endpoint="/livez",model="",status="200"} 1.0' in answer.stdout
    assert "the shared files can't be written" in answer.stderr


def test_metrics_port_in_use_stops_the_start(redis_port: int, tmp_path: Path) -> None:
    with run_redis(tmp_path / "redis", taken := free_port()):
        command = [sys.executable, "run_model_server.py", "--gpu", "1"]
        process = Process(command, tmp_path / "server", METRICS_PORT=str(taken - 1))
        wait_until(lambda: not process.alive, "the model server stops", 60)

    assert process.popen.returncode == 2
    assert f"Port {taken} of 127.0.0.1 can't be used" in process.log


@pytest.mark.slow("starts two model servers and waits for a heartbeat to expire")
def test_requeued_jobs_are_counted(redis_port: int, tmp_path: Path) -> None:
    port, queue = free_port(), f"queue-{free_port()}"
    deadly, good = [[sys.executable, script] for script in ("tests/deadly_server.py", "run_model_server.py")]
    with run_apache(IMAGE_QUEUE=queue) as url, ThreadPoolExecutor(1) as pool:
        with running(deadly, tmp_path / "deadly", IMAGE_QUEUE=queue) as killed:
            killed.wait_for_log("* Joined")
            answer = pool.submit(Service(url).post, WHITE)  # kills the server
            wait_until(lambda: not killed.alive, "the model server dies")
        with running(good, tmp_path / "good", IMAGE_QUEUE=queue, METRICS_PORT=str(port)):
            assert answer.result().status_code == 200
            counted = figures(f"http://127.0.0.1:{port}")

    assert counted['keras_model_server_jobs_total{event="recovered",model="digits"}'] == 1
    assert counted['keras_model_server_jobs_total{event="given_up",model="digits"}'] == 0


# Logs


@pytest.mark.slow("starts both programs")
def test_logs_can_be_json(redis_port: int, tmp_path: Path) -> None:
    with run_service(tmp_path, LOG_FORMAT="json") as service:
        good = service.post(IMAGE, headers={"X-Request-ID": "good-1"})
        bad = service.post(b"no image", headers={"X-Request-ID": "bad-1"})
    assert (good.status_code, bad.status_code) == (200, 400)

    web, server = (
        [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for text in ((tmp_path / "apache").read_text(), service.servers[0].log)
    )
    logged = {line["request"]: line for line in web if "request" in line}
    assert logged["good-1"].items() >= {"level": "INFO", "status": 200, "batch": 1, "images": 1}.items()
    assert {"time", "ms", "prepare_ms", "queue_ms", "compute_ms"} <= logged["good-1"].keys()
    assert logged["bad-1"].items() >= {"status": 400, "code": "bad_image"}.items()
    assert any(line.get("requests") == ["good-1"] for line in server)
    assert any(line["message"] == "* Model loaded" for line in server)


def test_web_log_has_a_line_for_each_request(measured: tuple[Service, str]) -> None:
    service, _ = measured

    service.post(IMAGE, headers={"X-Request-ID": "mine"})
    service.post(b"no image", headers={"X-Request-ID": "yours"})

    lines = (service.servers[0].log_path.parent / "apache").read_text().splitlines()
    assert any(re.fullmatch(r"[-\d]+ [\d:,]+ INFO /predict: 200 OK in [\d.]+ ms, request mine", line) for line in lines)
    assert any(re.search(r" INFO /predict: 400 bad_image in [\d.]+ ms, request yours$", line) for line in lines)


# For Prometheus and Grafana


def promtool(*arguments: str, given: str = "") -> str:
    answer = subprocess.run(
        [need("promtool"), *arguments], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


@pytest.mark.tools
def test_promtool_accepts_the_metrics(measured: tuple[Service, str]) -> None:
    service, model_server = measured
    service.post(IMAGE)

    assert promtool("check", "metrics", given=requests.get(f"{service.url}/metrics", timeout=10).text) == ""
    assert promtool("check", "metrics", given=requests.get(f"{model_server}/metrics", timeout=10).text) == ""


@pytest.mark.tools
def test_prometheus_configuration_and_alerts_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", str(MONITORING / "prometheus.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(ROOT / "tests/alerts_test.yml"))
