"""The list of models in Redis: what the model servers announce, so that the web needs no list of its own."""

from typing import Any

from redis import Redis

import settings
from helpers import StartupError, default_model, model_name
from image_queue.parsing import parse_object

KNOWN_FOR = 86400  # seconds for which a model is known after the last heartbeat of its servers
# Parts of the keys of the default queue; `image_queue:shape`, for example, can't also be the queue of a model "shape".
RESERVED = {"models", "model", "shape", "taken", "server", "result", "accepted", "limit", "never"}


def queue_key(name: str) -> str:
    """Return the queue of the model `name`: IMAGE_QUEUE for the default model, otherwise one of its own.

    If the settings name no default model, it is IMAGE_QUEUE too. Raises StartupError if no model may have this name.
    """
    if name in ("", default_model()) or not default_model():
        return settings.IMAGE_QUEUE
    return own_key(name)


def own_key(name: str) -> str:
    """Return the queue of a model that is not the default. Raises StartupError if no model may have this name."""
    if name in RESERVED or name != model_name(f"{name}.keras"):
        raise StartupError(f"A model can't be called {name}, which the service needs for itself: rename its file.")
    return f"{settings.IMAGE_QUEUE}:{name}"


def list_key() -> str:
    """Return the key of the list of models."""
    return f"{settings.IMAGE_QUEUE}:models"


def marker_key(name: str) -> str:
    """Return the key that exists while a model is known."""
    return f"{settings.IMAGE_QUEUE}:model:{name}"


def announced(redis: Redis) -> dict[str, dict[str, Any]]:
    """Return what the servers of each known model announced last, by the model's name. Raises RedisError.

    Each has the model's queue in "queue".
    """
    listed = parse_object(redis.get(list_key()) or b"")
    return {name: about for name, about in sorted(listed.items()) if _is_valid(about)}


def _is_valid(about: object) -> bool:
    if not isinstance(about, dict):
        return False
    queue = about.get("queue")
    return isinstance(queue, str) and f"{queue}:".startswith(f"{settings.IMAGE_QUEUE}:")
