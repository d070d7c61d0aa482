"""The routes below /v2: health and metadata as the Open Inference Protocol has them.

The protocol (github.com/kserve/open-inference-protocol) is what clients such as tritonclient speak. Its errors have a
shape of their own, {"error": "text"}.
"""

import re
from collections.abc import Callable
from typing import Any

import flask

import settings
from helpers import ServiceError
from image_queue import WebQueue
from web.access import check_key
from web.health import Body, Servers, look
from web.storage import check_room

PREFIX = "/v2"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # IMAGE_DTYPE, by the protocol's names

View = Callable[..., Body]


class UnknownModel(ServiceError):
    """No live model server serves this model, or this version of it."""

    status, code = 404, "not_found"


class NoInference(ServiceError):
    """Tensors are not taken; images are, by /predict."""

    status, code = 501, "not_implemented"


def add_protocol_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add the routes to `app`, which asks Redis through `queue`."""

    def get(rule: str) -> Callable[[View], View]:
        # Clients write these addresses with and without a slash at the end.
        return app.get(PREFIX + rule, strict_slashes=False)

    @get("")
    def server_metadata() -> Body:
        return {"name": "keras-rest-api", "version": "1", "extensions": []}

    @get("/health/live")
    def server_live() -> Body:
        return {"live": True}

    @get("/health/ready")
    def server_ready() -> Body:
        look(queue)
        check_room()
        # The protocol's text calls the field "live" here too.
        return {"live": True, "ready": True}

    @get("/models/<name>")
    @get("/models/<name>/versions/<version>")
    def model_metadata(name: str, version: str = "") -> Body:
        """Describe the input, pixels as the queue has them, and the output, a probability for each class."""
        versions = find(look(queue)[0], name, version)
        about = versions[version or min(versions)]
        pixels = {"name": "pixels", "datatype": DATATYPES[settings.IMAGE_DTYPE], "shape": [-1, *about["shape"]]}
        classes = {"name": "probabilities", "datatype": "FP32", "shape": [-1, about["classes"]]}
        return {
            "name": name, "versions": sorted(versions), "platform": "keras", "inputs": [pixels], "outputs": [classes],
        }  # fmt: skip

    @get("/models/<name>/ready")
    @get("/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str = "") -> Body:
        find(look(queue)[0], name, version)
        return {"name": name, "ready": True}

    @app.post(f"{PREFIX}/models/<name>/infer")
    @app.post(f"{PREFIX}/models/<name>/versions/<version>/infer")
    def infer(name: str, version: str = "") -> Body:
        check_key()
        raise NoInference("This service does not take tensors, so send the image itself, by POST /predict.")


def find(servers: Servers, name: str, version: str = "") -> Servers:
    """Return the live versions of the model called `name`: what a server of each says of itself, by version.

    Raises UnknownModel when there is none, or not this `version`.
    """
    complete = [about for about in servers.values() if {"model", "shape", "classes", "weights"} <= about.keys()]
    versions = {version_of(about): about for about in complete if about["model"] == name}
    if not versions:
        raise UnknownModel(f"The models served here are: {listed({str(about['model']) for about in complete})}.")
    if version and version not in versions:
        raise UnknownModel(f"The versions of {name} served here are: {listed(set(versions))}.")
    return versions


def version_of(about: dict[str, Any]) -> str:
    """Return the version of a server's model: its weights, as text for an address, since clients don't quote it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(about["weights"]))


def listed(names: set[str]) -> str:
    """Return the names in their order, for a sentence."""
    return ", ".join(sorted(names))


def is_protocol_path(path: str) -> bool:
    """Whether an address is one of the protocol's, or would be if it were there."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def protocol_error(message: str) -> Body:
    """Return the one JSON shape of every error below /v2."""
    return {"error": message}
