"""Static files: the page at /, the interactive API documentation at /docs, their scripts and styles, openapi.json.

Every file is listed here, and no directory is served. Files are sent from disk and not kept in memory. Links in the
pages are relative, because a proxy may put the service under a prefix.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import flask

STATIC = Path(__file__).parent / "static"
IMAGES = Path(__file__).parents[1] / "images"
SWAGGER = "flask_swagger_ui"  # only its static files are used

COMMON_POLICY = "connect-src 'self'; script-src 'self'; base-uri 'none'; frame-ancestors 'none'"
WELCOME_POLICY = f"default-src 'none'; {COMMON_POLICY}; style-src 'self'; img-src 'self' blob:; form-action 'self'"
DOCS_POLICY = f"default-src 'none'; {COMMON_POLICY}; style-src 'self'; img-src 'self' blob: data:; form-action 'none'"


class Page(NamedTuple):
    """A file to serve: its path, its media type, and for HTML its Content-Security-Policy."""

    path: Path
    media_type: str
    policy: str = ""


def swagger() -> Path:
    """Return the folder with Swagger UI's files, without importing the package. Raises ModuleNotFoundError."""
    package = find_spec(SWAGGER)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"{SWAGGER} is not installed, so install requirements/service.txt.")
    return Path(package.origin).parent / "dist"


SCRIPTS = (
    "page.js", "basics.js", "card.js", "export.js", "figures.js", "folders.js", "key.js", "models.js", "request.js",
    "results.js", "service.js",
)  # fmt: skip
# Photos that the page offers as samples if the model knows the ImageNet classes.
SAMPLES = ("cat.jpg", "coffee.jpg", "officer.jpg")
WELCOME = Page(STATIC / "index.html", "text/html", WELCOME_POLICY)
FILES = {
    "/page.css": Page(STATIC / "page.css", "text/css"),
    **{f"/{name}": Page(STATIC / name, "text/javascript") for name in SCRIPTS},
    "/favicon.svg": Page(STATIC / "favicon.svg", "image/svg+xml"),
    **{f"/samples/{name}": Page(IMAGES / name, "image/jpeg") for name in SAMPLES},
    "/openapi.json": Page(STATIC / "openapi.json", "application/json"),
    "/docs": Page(STATIC / "docs.html", "text/html", DOCS_POLICY),
    "/docs/docs.css": Page(STATIC / "docs.css", "text/css"),
    "/docs/docs.js": Page(STATIC / "docs.js", "text/javascript"),
    "/docs/swagger-ui.css": Page(swagger() / "swagger-ui.css", "text/css"),
    "/docs/swagger-ui-bundle.js": Page(swagger() / "swagger-ui-bundle.js", "text/javascript"),
}


def add_pages(app: flask.Flask) -> None:
    """Add a route for each file to `app`."""
    for path in FILES:
        app.add_url_rule(path, endpoint=path, view_func=lambda: send(FILES[flask.request.path]))


def send(page: Page) -> flask.Response:
    """Return a file. Browsers revalidate it by its ETag, so a page and its scripts always have the same version."""
    response = flask.send_file(page.path, mimetype=page.media_type)
    if page.policy:
        response.headers["Content-Security-Policy"] = page.policy
    return response


def wants_page() -> bool:
    """Whether the client prefers HTML to text, as browsers do; curl accepts anything."""
    return flask.request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html"
