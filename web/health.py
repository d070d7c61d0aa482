"""Health checks for load balancers and monitors: /livez and /readyz."""

from typing import Any

import flask
from redis.exceptions import RedisError

from image_queue import NoModelServer, RedisDown, UnusableRedis, WebQueue, fault_of
from web.storage import check_free_space

Body = dict[str, Any]
Servers = dict[str, dict[str, Any]]


def add_health_routes(app: flask.Flask, queue: WebQueue) -> None:
    """Add /livez and /readyz to `app`."""

    @app.get("/livez")
    def livez() -> Body:
        """Respond whenever this process works."""
        return {"live": True}

    @app.get("/readyz")
    def readyz() -> Body:
        """Report ready if Redis works, a warmed-up model server is alive and there is disk space for uploads."""
        servers, waiting = check_queue(queue)
        check_free_space()
        warnings = {"warnings": [f"Redis {risk}." for risk in queue.risks]} if queue.risks else {}
        return {"ready": True, "model_servers": servers, "queue_length": waiting, **warnings}


def check_queue(queue: WebQueue) -> tuple[Servers, int]:
    """Check that Redis accepts writes; return the live model servers and the number of images in the queue.

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
