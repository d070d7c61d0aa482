"""The routes under /v2: health and metadata in the form of the Open Inference Protocol.

tritonclient and others use it (github.com/kserve/open-inference-protocol). Its errors are {"error": "text"}.
"""

import re
from collections.abc import Callable
from typing import Any

import flask

import settings
from image_queue import NoModelServer
from web.access import check_key
from web.errors import WebError
from web.health import Body, Servers, check_queue
from web.served_models import ServedModels
from web.storage import check_free_space

PREFIX = "/v2"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # the protocol's name of each IMAGE_DTYPE

View = Callable[..., Body]


class UnknownModel(WebError):
    """No live model server serves this model in this version."""

    status, code = 404, "not_found"


class TensorsNotSupported(WebError):
    """The service takes images, by POST /predict, but no tensors."""

    status, code = 501, "not_implemented"


def add_protocol_routes(app: flask.Flask, models: ServedModels) -> None:
    """Add the routes under /v2 to `app`."""

    def get(rule: str) -> Callable[[View], View]:
        # Some clients end these paths with a slash, others do not.
        return app.get(PREFIX + rule, strict_slashes=False)

    def live_servers() -> Servers:
        states = check_queue(models).values()
        servers = {server: about for state in states for server, about in state.servers.items()}
        if not servers:
            raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.")
        return servers

    def default_is_ready() -> None:
        if not check_queue(models)[models.default()].servers:
            raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.")

    @get("")
    def server_metadata() -> Body:
        return {"name": "keras-rest-api", "version": "1", "extensions": []}

    @get("/health/live")
    def server_live() -> Body:
        return {"live": True}

    @get("/health/ready")
    def server_ready() -> Body:
        default_is_ready()
        check_free_space()
        # The protocol's specification names this field "live" too.
        return {"live": True, "ready": True}

    @get("/models/<name>")
    @get("/models/<name>/versions/<version>")
    def model_metadata(name: str, version: str = "") -> Body:
        """Describe the input (pixels, as on the queue) and the output (a probability per class)."""
        versions = versions_of(live_servers(), name, version)
        about = versions[version or min(versions)]
        pixels = {"name": "pixels", "datatype": DATATYPES[settings.IMAGE_DTYPE], "shape": [-1, *about["shape"]]}
        classes = {"name": "probabilities", "datatype": "FP32", "shape": [-1, about["classes"]]}
        return {
            "name": name, "versions": sorted(versions), "platform": "keras", "inputs": [pixels], "outputs": [classes],
        }  # fmt: skip

    @get("/models/<name>/ready")
    @get("/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str = "") -> Body:
        versions_of(live_servers(), name, version)
        return {"name": name, "ready": True}

    @app.post(f"{PREFIX}/models/<name>/infer")
    @app.post(f"{PREFIX}/models/<name>/versions/<version>/infer")
    def infer(name: str, version: str = "") -> Body:
        check_key()
        raise TensorsNotSupported("This service does not take tensors, so send the image itself, by POST /predict.")


def versions_of(servers: Servers, name: str, version: str = "") -> Servers:
    """Return each version of the model `name`, with the heartbeat of one live server that has it.

    Raises UnknownModel if the model is not served, or not in the given `version`.
    """
    complete = [about for about in servers.values() if {"model", "shape", "classes", "weights"} <= about.keys()]
    versions = {version_of(about): about for about in complete if about["model"] == name}
    if not versions:
        raise UnknownModel(f"The models served here are: {listed({str(about['model']) for about in complete})}.")
    if version and version not in versions:
        raise UnknownModel(f"The versions of {name} served here are: {listed(set(versions))}.")
    return versions


def version_of(about: dict[str, Any]) -> str:
    """Return the version of a server's model. Older servers have only weights, named by a file: made URL-safe here."""
    return str(about.get("version", "")) or re.sub(r"[^A-Za-z0-9._-]+", "-", str(about["weights"]))


def listed(names: set[str]) -> str:
    """Return the names for a message, sorted."""
    return ", ".join(sorted(names))


def is_protocol_path(path: str) -> bool:
    """Whether errors at this path have the protocol's form; the path need not exist."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def protocol_error(message: str) -> Body:
    """Return the JSON of an error under /v2."""
    return {"error": message}
