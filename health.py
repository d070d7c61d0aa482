"""Whether the service lives, would answer, and what it serves: for load balancers, monitors and model clients.

/livez and /readyz are the service's own; the routes below /v2 are those of the Open Inference Protocol
(github.com/kserve/open-inference-protocol) that ask for health and metadata.
"""

from typing import Any

import flask
from redis.exceptions import RedisError

import settings
from helpers import ServiceError
from image_queue import NoModelServer, RedisDown, WebQueue
from storage import check_room

DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # IMAGE_DTYPE, by the protocol's names

Body = dict[str, Any]
Servers = dict[str, dict[str, Any]]


class UnknownModel(ServiceError):
    """No live model server serves a model of this name."""

    status, code = 404, "not_found"


def add_health_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add the routes to `app`, which asks Redis through `queue`."""

    @app.get("/livez")
    def livez() -> Body:
        """Answer while the process does."""
        return {"live": True}

    @app.get("/readyz")
    def readyz() -> Body:
        """Say whether requests would be answered: Redis, a warmed-up model server and room for uploads are there."""
        servers, waiting = look(queue)
        check_room()
        return {"ready": True, "model_servers": servers, "queue_length": waiting}

    @app.get("/v2")
    def server_metadata() -> Body:
        return {"name": "keras-rest-api", "version": "1", "extensions": []}

    @app.get("/v2/health/live")
    def server_live() -> Body:
        return {"live": True}

    @app.get("/v2/health/ready")
    def server_ready() -> Body:
        look(queue)
        check_room()
        return {"ready": True}

    @app.get("/v2/models/<name>")
    def model_metadata(name: str) -> Body:
        """Say what goes into the model, pixels as the queue has them, and comes out, a probability for each class."""
        about = model(look(queue)[0], name)
        pixels = {"name": "pixels", "datatype": DATATYPES[settings.IMAGE_DTYPE], "shape": [-1, *about["shape"]]}
        classes = {"name": "probabilities", "datatype": "FP32", "shape": [-1, about["classes"]]}
        return {
            "name": name, "versions": [about["weights"]], "platform": "keras", "inputs": [pixels], "outputs": [classes],
        }  # fmt: skip

    @app.get("/v2/models/<name>/ready")
    def model_ready(name: str) -> Body:
        model(look(queue)[0], name)
        return {"name": name, "ready": True}


def look(queue: WebQueue) -> tuple[Servers, int]:
    """Return the live model servers and how many images wait. Raises RedisDown, NoModelServer."""
    try:
        servers, waiting = queue.live_servers(), queue.waiting()
    except RedisError:
        raise RedisDown("Redis does not answer, so start it or check REDIS_HOST and REDIS_PORT.", ready=False) from None
    if not servers:
        raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.", ready=False)
    return servers, waiting


def model(servers: Servers, name: str) -> dict[str, Any]:
    """Return what a live server says of the model called `name`. Raises UnknownModel."""
    for about in servers.values():
        if about.get("model") == name and {"shape", "classes", "weights"} <= about.keys():
            return about
    raise UnknownModel(
        f"The models served here are: {', '.join(sorted(str(each.get('model')) for each in servers.values()))}."
    )
