"""The alerts and the dashboard are by model, and a model that is no longer served can be forgotten."""

import json
import re
import subprocess
from collections.abc import Iterator

import pytest
import requests
from console_blocks import commands
from harness import ROOT, Service, free_port, need, run_service, wait_until
from letters import run_letters
from prometheus_client.parser import text_string_to_metric_families

MONITORING = ROOT / "deploy/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
ALERTS = re.findall(r"expr: (.*?)\n {8}\w", (MONITORING / "alerts.yml").read_text(), re.DOTALL)
METRIC = re.compile(r"(keras_\w+|process_resident_memory_bytes)(?:\{([^}]*)\})?")


def test_every_figure_of_the_dashboard_is_of_the_chosen_models() -> None:
    [variable] = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "model"]
    selectors = [found for expression in EXPRESSIONS for found in METRIC.findall(expression)]

    assert variable["query"]["query"] == "label_values(keras_rest_api_model_servers, model)"
    assert len(selectors) > 15
    without = [metric for metric, labels in selectors if 'model=~"$model"' not in labels]
    assert without == ["keras_rest_api_redis_up"]


def test_panels_are_numbered_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    squares = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(squares)) == len(squares)
    assert max(x for x, _ in squares) < 24


@pytest.fixture(scope="module")
def pair(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A service whose second model `old` was retired, and the URL of the metrics of the server that is left."""
    folder, port = tmp_path_factory.mktemp("pair"), free_port()
    with run_service(folder, METRICS_PORT=str(port)) as service:
        with run_letters(service, folder, "old"):
            wait_until(lambda: servers_of(service, "old") == 1, "the second model is served")
        wait_until(lambda: servers_of(service, "old") == 0, "its server is gone")
        yield service, f"http://127.0.0.1:{port}"


def labels_of(url: str) -> dict[str, list[dict[str, str]]]:
    """The labels of each sample of /metrics, by the sample's name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(requests.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def servers_of(service: Service, model: str) -> int | None:
    """The number of model servers that /metrics reports for a model; None if it does not know the model."""
    for family in text_string_to_metric_families(requests.get(f"{service.url}/metrics", timeout=10).text):
        for sample in family.samples:
            if sample.name == "keras_rest_api_model_servers" and sample.labels["model"] == model:
                return int(sample.value)
    return None


def test_the_metrics_have_the_labels_that_dashboard_and_alerts_use(pair: tuple[Service, str]) -> None:
    service, model_server = pair
    assert service.post((ROOT / "models/digits/three.png").read_bytes()).status_code == 200
    known = labels_of(service.url) | labels_of(model_server)

    selectors = [found for expression in EXPRESSIONS + ALERTS for found in METRIC.findall(expression)]

    assert {metric for metric, _ in selectors} <= known.keys()
    for metric, labels in selectors:
        wanted = set(re.findall(r"(\w+)[=!]~?", labels)) - {"job"}  # which Prometheus adds
        assert all(wanted <= each.keys() for each in known[metric]), metric
    by_model = {metric for metric, _ in selectors if metric != "keras_rest_api_redis_up"}
    assert all("model" in each for metric in by_model for each in known[metric])


def test_a_retired_model_is_forgotten_as_operations_says(pair: tuple[Service, str], redis_port: int) -> None:
    service, _ = pair
    wait_until(lambda: answers_with(service, 503, "no_model_server"), "every web process knows the model")
    section = (ROOT / "docs/operations.md").read_text().split("\n### Stop serving a model\n")[1].split("\n## ")[0]
    [command] = commands(section)
    assert command.startswith("redis-cli del ")
    need("redis-cli")

    here = command.replace("image_queue", service.queue).replace("NAME", "old")
    subprocess.run(here.replace("redis-cli", f"redis-cli -p {redis_port}").split(), check=True, timeout=30)

    wait_until(lambda: answers_with(service, 404, "unknown_model"), "every web process has forgotten the model")
    assert servers_of(service, "old") is None
    assert servers_of(service, "digits") == 1


def answers_with(service: Service, status: int, code: str) -> bool:
    """Whether every web process answers so when it is asked whether the retired model is ready."""
    answers = [requests.get(f"{service.url}/readyz/old", timeout=10) for _ in range(10)]
    return {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(status, code)}
