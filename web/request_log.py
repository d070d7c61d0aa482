"""Gives each request an id, counts it in the metrics, and logs it if it asks for predictions."""

import logging
import re
import time
import uuid

import flask

from web.errors import printable
from web.metrics import PREDICT, Metrics

log = logging.getLogger(__name__)

INFER = "/infer"  # the end of the paths of inference under /v2
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def add_request_log(app: flask.Flask, metrics: Metrics) -> None:
    """Count every request to `app`, and log those for predictions."""

    @app.before_request
    def begin() -> None:
        """Note the start time and the request's id: the client's own if it is valid, otherwise Apache's."""
        given = flask.request.headers.get("X-Request-ID", "")
        from_apache = flask.request.environ.get("UNIQUE_ID")
        flask.g.request_id = given if REQUEST_ID.fullmatch(given) else from_apache or uuid.uuid4().hex
        flask.g.begun = time.monotonic()

    @app.after_request
    def end(response: flask.Response) -> flask.Response:
        response.headers["X-Request-ID"] = flask.g.request_id
        seconds = time.monotonic() - flask.g.begun
        # A browser's preflight (OPTIONS) must not count as a request for predictions.
        rule = flask.request.url_rule if flask.request.method != "OPTIONS" else None
        endpoint = rule.rule if rule else "none"
        more = flask.g.get("log_fields", {})  # the code of an error, or the times and the number of images
        metrics.count_request(endpoint, flask.g.get("model", ""), response.status_code, seconds, more.get("images", 0))
        if endpoint.startswith(PREDICT) or endpoint.endswith(INFER):
            fields = {"status": response.status_code, "ms": round(1000 * seconds, 1), "request": flask.g.request_id}
            path = printable(flask.request.path, 100)
            log.info("%s: %d %s in %.1f ms, request %s", path, response.status_code, more.get("code", "OK"),
                     fields["ms"], flask.g.request_id, extra=fields | more)  # fmt: skip
        return response
