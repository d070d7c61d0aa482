"""The versions of a model that the live model servers have."""

import re
from typing import Any

from image_queue import NoModelServer
from web.health import Servers
from web.served_models import UnknownModel


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


def none_alive(name: str) -> NoModelServer:
    """Return the error for a model that is known, but has no live server."""
    return NoModelServer(f"No model server of {name} is alive, so start run_model_server.py or wait until it is.")


def version_of(about: dict[str, Any]) -> str:
    """Return the version of a server's model. Older servers have only weights, named by a file: made URL-safe here."""
    return str(about.get("version", "")) or re.sub(r"[^A-Za-z0-9._-]+", "-", str(about["weights"]))


def listed(names: set[str]) -> str:
    """Return the names for a message, sorted."""
    return ", ".join(sorted(names))
