"""Whether the service lives and would answer: /livez and /readyz, for load balancers and monitors."""

from typing import Any

import flask
from redis.exceptions import RedisError

from image_queue import NoModelServer, RedisDown, WebQueue

Body = dict[str, Any]
Servers = dict[str, dict[str, Any]]


def add_health_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add the routes to `app`, which asks Redis through `queue`."""

    @app.get("/livez")
    def livez() -> Body:
        """Answer while the process does."""
        return {"live": True}

    @app.get("/readyz")
    def readyz() -> Body:
        """Say whether requests would be answered: Redis is there, and a warmed-up model server is alive."""
        servers, waiting = look(queue)
        return {"ready": True, "model_servers": servers, "queue_length": waiting}


def look(queue: WebQueue) -> tuple[Servers, int]:
    """Return the live model servers and how many images wait. Raises RedisDown, NoModelServer."""
    try:
        servers, waiting = queue.live_servers(), queue.waiting()
    except RedisError:
        raise RedisDown("Redis does not answer, so start it or check REDIS_HOST and REDIS_PORT.", ready=False) from None
    if not servers:
        raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.", ready=False)
    return servers, waiting
