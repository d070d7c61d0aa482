"""Whether the service lives and would answer: /livez and /readyz, for load balancers and monitors."""

from typing import Any

import flask
from redis.exceptions import RedisError

from image_queue import NoModelServer, RedisDown, UnusableRedis, WebQueue, fault_of
from web.storage import check_room

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
        """Say whether requests would be answered: Redis, a warmed-up model server and room for uploads are there."""
        servers, waiting = look(queue)
        check_room()
        warnings = {"warnings": [f"Redis {risk}." for risk in queue.risks]} if queue.risks else {}
        return {"ready": True, "model_servers": servers, "queue_length": waiting, **warnings}


def look(queue: WebQueue) -> tuple[Servers, int]:
    """Return the live model servers and how many images wait, from a Redis that takes writes.

    Raises RedisDown, NoModelServer.
    """
    try:
        queue.check()
        servers, waiting = queue.live_servers(), queue.waiting()
    except (RedisError, UnusableRedis) as error:
        raise RedisDown(f"Redis {fault_of(error)}.", ready=False) from None
    if not servers:
        raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.", ready=False)
    return servers, waiting
