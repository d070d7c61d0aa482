"""Which pages of other origins may call the service from a browser: those that CORS_ORIGINS lists.

It is off unless set. A browser asks before it sends a key (the preflight, which needs none), and hides each answer and
error from the page unless it names the page's origin. deploy/apache/service.conf does the same for what Apache refuses.
"""

import flask

import settings

REQUEST_HEADERS = "Authorization, Content-Encoding, Content-Type, X-Request-ID"  # what a page may send
ANSWER_HEADERS = "X-Request-ID, Retry-After, Server-Timing"  # what it may read, besides what it always may
KEPT = "7200"  # seconds that a browser need not ask again; Chromium allows no more
FOR_NO_PAGE = "/metrics"

origins = {origin for origin in settings.CORS_ORIGINS.split(",") if origin}


def add_cors(app: flask.Flask) -> None:
    """Have each answer of `app` but those of /metrics name the origin that asks, if CORS_ORIGINS does."""
    if origins:
        app.after_request(share)


def share(response: flask.Response) -> flask.Response:
    """Let a page of an allowed origin read this answer, or after a preflight send its request."""
    asked = flask.request.headers
    allowed = "*" if "*" in origins else asked.get("Origin")
    if allowed != "*":
        response.vary.add("Origin")
    if allowed not in origins or flask.request.path == FOR_NO_PAGE:
        return response
    response.headers["Access-Control-Allow-Origin"] = allowed
    response.headers["Access-Control-Expose-Headers"] = ANSWER_HEADERS
    if is_preflight() and "Allow" in response.headers:  # else nothing is at this address
        response.headers["Access-Control-Allow-Methods"] = response.headers["Allow"]
        response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
        response.headers["Access-Control-Max-Age"] = KEPT
    return response


def is_preflight() -> bool:
    """Whether a browser asks if it may send a request."""
    return flask.request.method == "OPTIONS" and "Access-Control-Request-Method" in flask.request.headers
