"""The pages for people: what a browser gets at /, the interactive description at /docs, and the files of both.

Each address is that of one file, named here: none leads to a folder. The files are sent from the disk, and none is kept
in the memory of the process. Their links are relative, since a proxy may put the service under a prefix.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import flask

STATIC = Path(__file__).parent / "static"
IMAGES = Path(__file__).parents[1] / "images"
# Swagger UI, as its package has it; found without importing that, of which nothing but the files is wanted.
SWAGGER = "flask_swagger_ui"

NOTHING_ELSE = "connect-src 'self'; script-src 'self'; base-uri 'none'; frame-ancestors 'none'"
WELCOME_POLICY = f"default-src 'none'; {NOTHING_ELSE}; style-src 'self'; img-src 'self' blob:; form-action 'self'"
DOCS_POLICY = f"default-src 'none'; {NOTHING_ELSE}; style-src 'self'; img-src 'self' blob: data:; form-action 'none'"


class Page(NamedTuple):
    """A file, its media type, and for a page the Content-Security-Policy: what it may load, and from where."""

    path: Path
    media_type: str
    policy: str = ""


def swagger() -> Path:
    """Return the folder of Swagger UI's files. Raises ModuleNotFoundError where it is not installed."""
    package = find_spec(SWAGGER)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"{SWAGGER} is not installed, so install what requirements/service.txt names.")
    return Path(package.origin).parent / "dist"


SCRIPTS = (
    "page.js", "basics.js", "card.js", "export.js", "figures.js", "folders.js", "key.js", "model.js", "request.js",
    "results.js", "service.js",
)  # fmt: skip
# Photos that the page offers to try, where the model knows ImageNet's classes.
SAMPLES = ("cat.jpg", "coffee.jpg", "officer.jpg")
WELCOME = Page(STATIC / "index.html", "text/html", WELCOME_POLICY)
FILES = {
    "/page.css": Page(STATIC / "page.css", "text/css"),
    **{f"/{name}": Page(STATIC / name, "text/javascript") for name in SCRIPTS},
    "/favicon.svg": Page(STATIC / "favicon.svg", "image/svg+xml"),
    **{f"/samples/{name}": Page(IMAGES / name, "image/jpeg") for name in SAMPLES},
    "/docs": Page(STATIC / "docs.html", "text/html", DOCS_POLICY),
    "/docs/docs.css": Page(STATIC / "docs.css", "text/css"),
    "/docs/docs.js": Page(STATIC / "docs.js", "text/javascript"),
    "/docs/swagger-ui.css": Page(swagger() / "swagger-ui.css", "text/css"),
    "/docs/swagger-ui-bundle.js": Page(swagger() / "swagger-ui-bundle.js", "text/javascript"),
}


def add_pages(app: flask.Flask) -> None:
    """Add the address of each file to `app`."""
    for address, page in FILES.items():
        app.add_url_rule(address, endpoint=address, view_func=view(page))


def view(page: Page) -> Callable[[], flask.Response]:
    """Return the function that answers with a file; no partial(), which Flask-Limiter takes for no function."""

    def answer() -> flask.Response:
        return send(page)

    return answer


def send(page: Page) -> flask.Response:
    """Return a file, which browsers keep and ask for again by its ETag: the page and its script are of one version."""
    response = flask.send_file(page.path, mimetype=page.media_type)
    if page.policy:
        response.headers["Content-Security-Policy"] = page.policy
    return response


def wants_page() -> bool:
    """Tell whether the client would rather have HTML than text: browsers say so, and curl takes anything."""
    return flask.request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html"
