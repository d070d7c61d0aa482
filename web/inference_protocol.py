"""The routes below /v2: health and metadata in the form of the Open Inference Protocol.

Clients such as tritonclient speak it (github.com/kserve/open-inference-protocol). Its errors are {"error": "text"}.
"""

import re
from collections.abc import Callable
from typing import Any

import flask

import settings
from image_queue import WebQueue
from web.access import check_key
from web.errors import WebError
from web.health import Body, Servers, check_queue
from web.storage import check_free_space

PREFIX = "/v2"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # IMAGE_DTYPE: the protocol's name

View = Callable[..., Body]


class UnknownModel(WebError):
    """No live model server serves this model, or this version of it."""

    status, code = 404, "not_found"


class TensorsNotSupported(WebError):
    """The service takes images, through /predict, but no tensors."""

    status, code = 501, "not_implemented"


def add_protocol_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add the routes below /v2 to `app`."""

    def get(rule: str) -> Callable[[View], View]:
        # Some clients end these paths with a slash, others do not.
        return app.get(PREFIX + rule, strict_slashes=False)

    @get("")
    def server_metadata() -> Body:
        return {"name": "keras-rest-api", "version": "1", "extensions": []}

    @get("/health/live")
    def server_live() -> Body:
        return {"live": True}

    @get("/health/ready")
    def server_ready() -> Body:
        check_queue(queue)
        check_free_space()
        # The protocol's text calls the field "live" here too.
        return {"live": True, "ready": True}

    @get("/models/<name>")
    @get("/models/<name>/versions/<version>")
    def model_metadata(name: str, version: str = "") -> Body:
        """Describe the input (pixels as they are queued) and the output (a probability for each class)."""
        versions = versions_of(check_queue(queue)[0], name, version)
        about = versions[version or min(versions)]
        pixels = {"name": "pixels", "datatype": DATATYPES[settings.IMAGE_DTYPE], "shape": [-1, *about["shape"]]}
        classes = {"name": "probabilities", "datatype": "FP32", "shape": [-1, about["classes"]]}
        return {
            "name": name, "versions": sorted(versions), "platform": "keras", "inputs": [pixels], "outputs": [classes],
        }  # fmt: skip

    @get("/models/<name>/ready")
    @get("/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str = "") -> Body:
        versions_of(check_queue(queue)[0], name, version)
        return {"name": name, "ready": True}

    @app.post(f"{PREFIX}/models/<name>/infer")
    @app.post(f"{PREFIX}/models/<name>/versions/<version>/infer")
    def infer(name: str, version: str = "") -> Body:
        check_key()
        raise TensorsNotSupported("This service does not take tensors, so send the image itself, by POST /predict.")


def versions_of(servers: Servers, name: str, version: str = "") -> Servers:
    """Return the heartbeat of one live server for each version of the model `name`.

    Raises UnknownModel if the model is not served, or not in this `version`.
    """
    complete = [about for about in servers.values() if {"model", "shape", "classes", "weights"} <= about.keys()]
    versions = {version_of(about): about for about in complete if about["model"] == name}
    if not versions:
        raise UnknownModel(f"The models served here are: {listed({str(about['model']) for about in complete})}.")
    if version and version not in versions:
        raise UnknownModel(f"The versions of {name} served here are: {listed(set(versions))}.")
    return versions


def version_of(about: dict[str, Any]) -> str:
    """Return the version of a server's model: its weights file, made URL-safe because clients do not quote it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(about["weights"]))


def listed(names: set[str]) -> str:
    """Return the names, sorted, for a sentence."""
    return ", ".join(sorted(names))


def is_protocol_path(path: str) -> bool:
    """Whether errors at this path have the protocol's form, even if no such route exists."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def protocol_error(message: str) -> Body:
    """Return the JSON of an error below /v2."""
    return {"error": message}
