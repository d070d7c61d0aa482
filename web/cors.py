"""CORS: which origins' web pages may call the service from a browser. CORS_ORIGINS lists them; by default, none.

Before a browser sends a key, it asks for permission with a preflight request, which has no key. It hides every response
from the page, errors included, unless the response names the page's origin. deploy/apache/service.conf adds the same
headers to the errors that Apache sends.
"""

import flask

import settings

REQUEST_HEADERS = (  # that a page may send
    "Authorization, Content-Encoding, Content-Type, Inference-Header-Content-Length, X-Request-ID"
)
# That a page may read, besides the standard ones.
RESPONSE_HEADERS = "X-Request-ID, Retry-After, Server-Timing, X-Model, X-Model-Version, Inference-Header-Content-Length"
MAX_AGE = "7200"  # seconds that a browser may cache the answer to a preflight; Chromium's maximum
NOT_SHARED = "/metrics"

origins = {origin for origin in settings.CORS_ORIGINS.split(",") if origin}


def add_cors(app: flask.Flask) -> None:
    """Add the CORS headers to every response of `app`, except for /metrics. Does nothing without CORS_ORIGINS."""
    if origins:
        app.after_request(allow_origin)


def allow_origin(response: flask.Response) -> flask.Response:
    """Let a page of an allowed origin read this response; after a preflight, let it send its request."""
    sent = flask.request.headers
    allowed = "*" if "*" in origins else sent.get("Origin")
    if allowed != "*":
        response.vary.add("Origin")
    if allowed not in origins or flask.request.path == NOT_SHARED:
        return response
    response.headers["Access-Control-Allow-Origin"] = allowed
    response.headers["Access-Control-Expose-Headers"] = RESPONSE_HEADERS
    if is_preflight() and "Allow" in response.headers:  # a path that does not exist has no Allow
        response.headers["Access-Control-Allow-Methods"] = response.headers["Allow"]
        response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
        response.headers["Access-Control-Max-Age"] = MAX_AGE
    return response


def is_preflight() -> bool:
    """Whether a browser asks if it may send a request."""
    return flask.request.method == "OPTIONS" and "Access-Control-Request-Method" in flask.request.headers
