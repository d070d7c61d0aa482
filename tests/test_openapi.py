"""The interface against its own description: schemathesis makes requests of it, good ones and bad ones."""

import json
from typing import Any

import pytest
import requests
import schemathesis
from conftest import ROOT, Service
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import ignored_auth

import run_web_server

IMAGES = [path.read_bytes() for path in sorted((ROOT / "images").iterdir())]

schemathesis.openapi.format("binary", st.sampled_from(IMAGES))
for kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, st.sampled_from(IMAGES))

described = schemathesis.openapi.from_path(ROOT / "static/openapi.json")


@described.parametrize()
@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_the_service_does_what_its_description_says(service: Service, case: schemathesis.Case[Any]) -> None:
    # API_KEYS is not set here: the description says that a key may be wanted.
    case.call_and_validate(base_url=service.url, excluded_checks=[ignored_auth])


def test_the_service_gives_its_description(service: Service) -> None:
    answer = requests.get(f"{service.url}/openapi.json", timeout=10)

    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["openapi"].startswith("3.1")


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    rules = run_web_server.app.url_map.iter_rules()
    routes = {(rule.rule.replace("<", "{").replace(">", "}"), method.lower())
              for rule in rules for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}  # fmt: skip

    assert {(path, method) for path, methods in document()["paths"].items() for method in methods} == routes


def test_every_route_is_in_the_readme() -> None:
    section = (ROOT / "README.md").read_text().split("\n## API\n")[1].split("\n## ")[0]

    assert [path for path in document()["paths"] if f"{path.replace('{name}', 'NAME')}`" not in section] == []


@pytest.mark.parametrize("status", ["400", "401", "413", "415", "429", "500", "502", "503", "504"])
def test_every_error_of_predict_in_the_readme_is_described(status: str) -> None:
    rows = [
        line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {status} |")
    ]
    codes = {row[2].strip(" `") for row in rows}

    told = document()["paths"]["/predict"]["post"]["responses"][status]["description"]
    assert codes
    assert all(f"`{code}`" in told for code in codes)


def document() -> dict[str, Any]:
    text: dict[str, Any] = json.loads((ROOT / "static/openapi.json").read_text())
    return text
