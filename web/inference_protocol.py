"""The routes under /v2, in the form of the Open Inference Protocol: health, metadata, and inference.

tritonclient and others use it (github.com/kserve/open-inference-protocol). Its errors are {"error": "text"}.
"""

from collections.abc import Callable

import flask
import orjson

import settings
from image_queue import NoModelServer
from web.errors import BadRequest
from web.health import Body, Servers, check_queue
from web.inference import infer
from web.model_versions import none_alive, version_of, versions_of
from web.served_models import ServedModels, State
from web.storage import check_free_space
from web.tensors import IMAGE, PIXELS, PROBABILITIES
from web.uploads import whole_request

PREFIX = "/v2"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}  # the protocol's name of each IMAGE_DTYPE
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository"]
READY = "READY"
MAX_INDEX_REQUEST = 1000  # bytes

View = Callable[..., Body | list[Body]]


def add_protocol_routes(app: flask.Flask, models: ServedModels) -> None:
    """Add the routes under /v2 to `app`."""

    def get(rule: str) -> Callable[[View], View]:
        # Some clients end these paths with a slash, others do not.
        return app.get(PREFIX + rule, strict_slashes=False)

    def versions(name: str, version: str) -> Servers:
        states = check_queue(models)
        if name in states and not states[name].servers:
            raise none_alive(name)
        servers = {server: about for state in states.values() for server, about in state.servers.items()}
        return versions_of(servers, name, version)

    def default_is_ready() -> None:
        if not check_queue(models)[models.default()].servers:
            raise NoModelServer("No model server is alive, so start run_model_server.py or wait until it is.")

    @get("")
    def server_metadata() -> Body:
        return {"name": "keras-rest-api", "version": "1", "extensions": EXTENSIONS}

    @get("/health/live")
    def server_live() -> Body:
        return {"live": True}

    @get("/health/ready")
    def server_ready() -> Body:
        default_is_ready()
        check_free_space()
        # The protocol's specification names this field "live" too.
        return {"live": True, "ready": True}

    @get("/models/<name>")
    @get("/models/<name>/versions/<version>")
    def model_metadata(name: str, version: str = "") -> Body:
        """Describe the inputs, of which a request has one, and the output (a probability per class)."""
        known = versions(name, version)
        about = known[version or min(known)]
        image = {"name": IMAGE, "datatype": "BYTES", "shape": [-1]}
        pixels = {"name": PIXELS, "datatype": DATATYPES[settings.IMAGE_DTYPE], "shape": [-1, *about["shape"]]}
        classes = {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, about["classes"]]}
        tensors = {"inputs": [image, pixels], "outputs": [classes]}
        return {"name": name, "versions": sorted(known), "platform": "keras", **tensors}

    @get("/models/<name>/ready")
    @get("/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str = "") -> Body:
        versions(name, version)
        return {"name": name, "ready": True}

    @app.post(f"{PREFIX}/models/<name>/infer", strict_slashes=False)
    @app.post(f"{PREFIX}/models/<name>/versions/<version>/infer", strict_slashes=False)
    def model_infer(name: str, version: str = "") -> flask.Response:
        return infer(models, name, version)

    @get("/models")
    def index_of_all() -> list[Body]:
        return index(check_queue(models), models)

    @app.post(f"{PREFIX}/repository/index", strict_slashes=False)
    def repository_index() -> list[Body]:
        only_ready = index_request(flask.request)
        return [each for each in index(check_queue(models), models) if each["state"] == READY or not only_ready]


def index(states: dict[str, State], models: ServedModels) -> list[Body]:
    """Return the repository index: each version of each known model that a live server has, or the last known one."""
    entries = []
    for name, state in sorted(states.items()):
        live = sorted({version_of(about) for about in state.servers.values() if "weights" in about})
        entries += [{"name": name, "version": version, "state": READY, "reason": ""} for version in live]
        if name and not live:
            about = models.about(name)
            version = version_of(about) if "weights" in about else ""
            reason = "no model server is alive"
            entries.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason})
    return entries


def index_request(request: flask.Request) -> bool:
    """Return whether the client wants only models that are ready. Raises BadRequest."""
    stream, size, _ = whole_request(request)
    with stream:
        text = stream.read(size if size <= MAX_INDEX_REQUEST else 0)
    try:
        fields = orjson.loads(text or b"{}" if size <= MAX_INDEX_REQUEST else b"")
    except ValueError:
        fields = None
    ready = fields.get("ready", False) if isinstance(fields, dict) else None
    if not isinstance(ready, bool):
        raise BadRequest('The body must be empty or {"ready": true}.')
    return ready


def is_protocol_path(path: str) -> bool:
    """Whether errors at this path have the protocol's form; the path need not exist."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def protocol_error(message: str) -> Body:
    """Return the JSON of an error under /v2."""
    return {"error": message}
