"""The service against its OpenAPI description: schemathesis sends valid and invalid requests."""

import importlib
import io
import json
import subprocess
import sys
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from harness import ROOT, Service, need
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import ignored_auth

from run_web_server import create_app

API = ROOT / "docs/api.md"
IMAGES = [path.read_bytes() for path in sorted((ROOT / "models/digits").iterdir())]

schemathesis.openapi.format("binary", st.sampled_from(IMAGES))
for kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, st.sampled_from(IMAGES))

described = schemathesis.openapi.from_path(ROOT / "web/static/openapi.json")


@described.parametrize()
@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_service_conforms_to_openapi(service: Service, case: schemathesis.Case[Any]) -> None:
    excluded = [ignored_auth]  # API_KEYS is not set here; in the description a key is optional
    case.call_and_validate(base_url=service.url, excluded_checks=excluded)


@pytest.mark.parametrize(
    "parameters", [{}, {"classification": 2}, {"binary_data_output": True}, {"classification": -1}]
)
def test_answers_of_inference_conform_to_openapi(service: Service, parameters: dict[str, Any]) -> None:
    """The other test finds no valid request, since it makes up the names of models."""
    path = "/v2/models/{name}/infer"
    answer = requests.post(
        service.url + path.format(name="digits"), json=INFER | {"parameters": parameters}, timeout=60
    )

    assert answer.status_code in (200, 400)
    described[path]["POST"].validate_response(answer)


def test_openapi_json_is_served(service: Service) -> None:
    answer = requests.get(f"{service.url}/openapi.json", timeout=10)

    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["openapi"].startswith("3.1")


def test_openapi_describes_exactly_the_routes() -> None:
    rules = create_app().url_map.iter_rules()
    routes = {(rule.rule.replace("<", "{").replace(">", "}"), method.lower())
              for rule in rules for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}  # fmt: skip

    assert {(path, method) for path, methods in document()["paths"].items() for method in methods} == routes


def test_every_route_is_documented() -> None:
    text = API.read_text(encoding="utf-8")

    paths = [path.replace("{name}", "NAME").replace("{version}", "VERSION") for path in document()["paths"]]
    assert [path for path in paths if f"{path}`" not in text] == []


@pytest.mark.parametrize("status", ["400", "401", "404", "413", "415", "429", "500", "502", "503", "504"])
def test_openapi_describes_every_documented_error(status: str) -> None:
    rows = [line.split("|") for line in API.read_text(encoding="utf-8").splitlines()]
    codes = {row[2].strip(" `") for row in rows if row[1:2] == [f" {status} "]}

    described = document()["paths"]["/predict/{name}"]["post"]["responses"][status]["$ref"].rpartition("/")[2]
    description = document()["components"]["responses"][described]["description"]
    assert codes
    assert all(f"`{code}`" in description for code in codes)


# Clients generated from the description of the running service

THREE = (ROOT / "models/digits/three.png").read_bytes()
NO_IMAGE = b"No image."
FILE = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64encode(THREE).decode()]}
INFER = {"inputs": [FILE], "parameters": {"classification": 2}}


def generate(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tools
def test_client_from_openapi_generator_works(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = find_spec("openapi_generator_cli")
    assert package is not None
    jar = str(Path(str(package.origin)).with_name("openapi-generator.jar"))
    java = [need("java"), "-XX:TieredStopAtLevel=1", "-jar", jar]
    made = ["-g", "python", "-o", str(tmp_path), "--global-property", "apiTests=false,modelTests=false"]
    generate([*java, "generate", "-i", f"{service.url}/openapi.json", *made])
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("openapi_client")

    with client.ApiClient() as connection:  # its URL comes from the description
        classify, health = client.ClassifyApi(connection), client.HealthApi(connection)
        one = classify.predict([THREE], top=2).actual_instance
        several = classify.predict([THREE, NO_IMAGE]).actual_instance
        with pytest.raises(client.ApiException) as refused:
            classify.predict([NO_IMAGE])
        with pytest.raises(client.ApiException) as unknown:
            health.model_metadata("cats")
        ready, stats = health.readyz(), health.stats()

    assert [each.label for each in one.predictions] == ["3", "4"]
    assert [type(each.actual_instance) for each in several.results] == [client.Predictions, client.Error]
    assert several.results[1].actual_instance.error.code == "bad_image"
    assert (refused.value.status, refused.value.data.error.code) == (400, "bad_image")
    assert (unknown.value.status, unknown.value.data.error) == (404, "The models served here are: digits.")
    assert ready.ready
    assert stats.images >= 2


def test_client_from_openapi_python_client_works(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["--meta", "none", "--output-path", str(tmp_path / "made_client")]
    command = [sys.executable, "-m", "openapi_python_client", "generate"]
    generate([*command, "--url", f"{service.url}/openapi.json", *made])
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("made_client")
    models, types = importlib.import_module("made_client.models"), importlib.import_module("made_client.types")
    predict = importlib.import_module("made_client.api.classify.predict")
    metadata = importlib.import_module("made_client.api.health.model_metadata")
    infer = importlib.import_module("made_client.api.classify.model_infer")

    def form(*images: bytes) -> Any:
        return models.PredictFilesBody([types.File(io.BytesIO(image), "photo") for image in images])

    with client.Client(service.url) as connection:
        one = predict.sync(client=connection, body=form(THREE), top=2)
        several = predict.sync(client=connection, body=form(THREE, NO_IMAGE))
        refused = predict.sync_detailed(client=connection, body=form(NO_IMAGE))
        known = metadata.sync("digits", client=connection)
        unknown = metadata.sync("cats", client=connection)
        inferred = infer.sync("digits", client=connection, body=models.InferRequest.from_dict(INFER))

    assert [each.label for each in one.predictions] == ["3", "4"]
    assert [type(each) for each in several.results] == [models.Predictions, models.Error]
    assert (refused.status_code, refused.parsed.error.code) == (400, "bad_image")
    assert [each.datatype for each in known.inputs] == ["BYTES", "UINT8"]
    assert inferred.outputs[0].data[0].endswith(":3:3")
    assert unknown.error == "The models served here are: digits."


def document() -> dict[str, Any]:
    text: dict[str, Any] = json.loads((ROOT / "web/static/openapi.json").read_text())
    return text
