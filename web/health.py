"""Health checks for load balancers and monitors: /livez and /readyz."""

from typing import Any

import flask
from redis.exceptions import RedisError

from image_queue import NoModelServer, RedisDown, UnusableRedis, fault_of
from web.served_models import ServedModels, State
from web.storage import check_free_space

Body = dict[str, Any]
Servers = dict[str, dict[str, Any]]


def add_health_routes(app: flask.Flask, models: ServedModels) -> None:
    """Add /livez and /readyz to `app`."""

    @app.get("/livez")
    def livez() -> Body:
        """Respond whenever this process works."""
        return {"live": True}

    @app.get("/readyz")
    def readyz() -> Body:
        """Report ready if the default model is, and which others are."""
        states = check_queue(models)
        others = {name: summary(state) for name, state in sorted(states.items()) if name}
        return ready(models.default(), states[models.default()]) | {"models": others}

    @app.get("/readyz/<name>")
    def model_readyz(name: str) -> Body:
        """Report ready if this model is."""
        states = check_queue(models)
        if name not in states:
            raise models.unknown(name)
        return ready(name, states[name])

    def ready(model: str, state: State) -> Body:
        """Report ready if a warmed-up server of the model is alive and there is disk space for uploads."""
        if not state.servers:
            whose = f" of {model}" if model else ""
            message = f"No model server{whose} is alive, so start run_model_server.py or wait until it is."
            raise NoModelServer(message, ready=False)
        check_free_space()
        warnings = {"warnings": [f"Redis {risk}." for risk in models.risks]} if models.risks else {}
        named = {"model": model} if model else {}
        return {"ready": True, **named, "model_servers": state.servers, "queue_length": state.waiting, **warnings}


def check_queue(models: ServedModels) -> dict[str, State]:
    """Check that Redis accepts writes; return the state of each model. Raises RedisDown."""
    try:
        models.check()
        return models.states()
    except (RedisError, UnusableRedis) as error:
        raise RedisDown(f"Redis {fault_of(error)}.", ready=False) from None


def summary(state: State) -> Body:
    """Return the state of a model among others."""
    return {"ready": bool(state.servers), "model_servers": len(state.servers), "queue_length": state.waiting}
