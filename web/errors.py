"""The errors that clients see: status, headers and JSON.

This module must not import Flask: `run_model_server.py --check` uses it too, and the model server has no Flask.
"""

from collections.abc import Mapping
from typing import Any

from helpers import ServiceError
from image_queue import NoModelServer, QueueFull, RedisDown, ResultTimeout

RETRY_AFTER = 5  # seconds, sent with every 503
OUR_FAULT = "Something went wrong on the server, so try again or tell its operator."
UPLOAD_INTERRUPTED = "The upload was interrupted before its end, so send it again."
# For errors that Flask raises itself, by status.
HTTP_MESSAGES = {
    400: "The request is not valid HTTP for this service, so check how it is made.",
    404: "There is nothing at this address, so post the image to /predict.",
    405: "This address does not take this method, so post the image to /predict.",
}
# For the queue's errors, since the queue does not know HTTP.
STATUSES: dict[type[ServiceError], int] = {QueueFull: 503, RedisDown: 503, NoModelServer: 503, ResultTimeout: 504}


class WebError(ServiceError):
    """An error of the web program. Each subclass sets its HTTP status, its code and any headers."""

    status = 500
    headers: Mapping[str, str] = {}


class BadRequest(WebError):
    """A part of the request is malformed, such as a parameter or the form."""

    status, code = 400, "bad_request"


class ModelFailed(WebError):
    """The model server could not classify this image."""

    status, code = 500, "model_failed"


class ModelReplaced(WebError):
    """Another model answered than the one that the client named, which is no longer served."""

    status, code = 503, "model_replaced"


def status_of(kind: type[ServiceError]) -> int:
    """Return the HTTP status of an error class."""
    return kind.status if issubclass(kind, WebError) else STATUSES.get(kind, 500)


def error_body(code: str, message: str) -> dict[str, Any]:
    """Return the JSON of an error, except for the routes under /v2: see protocol_error()."""
    return {"success": False, "error": {"code": code, "message": message}}


def printable(text: str, most: int = 40) -> str:
    """Return the first `most` characters of an untrusted text, safe for a message or the log."""
    return "".join(each if each.isprintable() else "?" for each in text[:most])
