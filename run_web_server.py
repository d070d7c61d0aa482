"""The web: takes a client's image, prepares it, queues it for the model server and returns the answer as JSON.

Apache loads `app` through keras_rest_api_app.wsgi. For debugging, Flask's own server runs it:

    python run_web_server.py [--port 5000]
"""

import argparse
import concurrent.futures
import ctypes
import logging
import re
import resource
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import flask
from PIL import Image
from redis.exceptions import RedisError
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

import settings
from helpers import ServiceError, Shape, base64_encode_image, log_to_stderr, megabytes, pauses
from image_queue import (
    CLOSE_SURPLUS_EVERY,
    IMAGES_REFUSED,
    NoModelServer,
    QueueFull,
    RedisDown,
    ResultTimeout,
    UnusableRedis,
    WebQueue,
)
from web import metrics as web_metrics
from web.access import RateLimited, Unauthorized, check_key, rate_check
from web.cors import add_cors
from web.health import add_health_routes
from web.image_preparation import BadImage, TooLarge, bytes_to_decode, open_image, prepare_image, reason
from web.inference_protocol import add_protocol_routes, is_protocol_path, protocol_error
from web.pages import WELCOME, add_pages, send, wants_page
from web.storage import choose_folder
from web.turns import NoMemoryNow, Turns
from web.uploads import UnsupportedMediaType, uploads

log = logging.getLogger(__name__)

QUEUE_STATUSES: dict[type[ServiceError], int] = {QueueFull: 503, RedisDown: 503, NoModelServer: 503, ResultTimeout: 504}
RETRY_AFTER = 5  # seconds, told to clients whose request can't be accepted now
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE_BLOCK = 2**21  # bytes
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MOST_TOP = 1000
STATIC = Path(__file__).parent / "web/static"


app = flask.Flask(__name__, static_folder=None)  # no address leads to a folder

queue = WebQueue(web_metrics.count_jobs)
check_rate = rate_check(app, queue)
add_health_routes(app, queue)
add_protocol_routes(app, queue)
web_metrics.add_metrics_routes(app, queue)
add_pages(app)
add_cors(app)
# Decoding a photo takes a core and up to a few hundred megabytes for a moment. So with hundreds of requests waiting,
# only as many are prepared at once as the machine has cores for and memory, first come, first served.
preparing = Turns(web_metrics.common_directory)
# Who waits for the answers to requests of several images, beside the threads of Apache, of which each has but one.
asking = ThreadPoolExecutor(128, thread_name_prefix="ask")


class BadRequest(ServiceError):
    """A parameter of the address is not one that the service takes."""

    status, code = 400, "bad_request"


class ModelFailed(ServiceError):
    """The model server could not classify this image."""

    status, code = 500, "model_failed"


@app.get("/")
def homepage() -> flask.Response:
    """Say that the service is there: to a browser with a page, to others with a line."""
    line = "Welcome to the PyImageSearch Keras REST API!"
    response = send(WELCOME) if wants_page() else flask.make_response(line)
    response.vary.add("Accept")
    return response


@app.get("/openapi.json")
def openapi() -> flask.Response:
    """Describe this interface to programs, by OpenAPI 3.1."""
    return flask.send_from_directory(STATIC, "openapi.json")


@app.before_request
def begin() -> None:
    """Note when the request began, and its id: its client's own if that is one, else Apache's."""
    given = flask.request.headers.get("X-Request-ID", "")
    apaches = flask.request.environ.get("UNIQUE_ID")
    flask.g.request_id = given if REQUEST_ID.fullmatch(given) else apaches or uuid.uuid4().hex
    flask.g.begun = time.monotonic()


@app.after_request
def end(response: flask.Response) -> flask.Response:
    """Tell the client the id of its request, count it, and where it was for /predict write a line to the log."""
    response.headers["X-Request-ID"] = flask.g.request_id
    seconds = time.monotonic() - flask.g.begun
    # OPTIONS, a browser's preflight, does nothing of what is counted by the address.
    known = flask.request.url_rule if flask.request.method != "OPTIONS" else None
    endpoint = known.rule if known else "none"
    more = flask.g.get("more", {})  # how long each stage took and of how many images, or the error's code
    web_metrics.count_request(endpoint, response.status_code, seconds, more.get("images", 0))
    if endpoint == web_metrics.PREDICT:
        told = {"status": response.status_code, "ms": round(1000 * seconds, 1), "request": flask.g.request_id}
        log.info("/predict: %d %s in %.1f ms, request %s", response.status_code, more.get("code", "OK"), told["ms"],
                 flask.g.request_id, extra=told | more)  # fmt: skip
    return response


@app.post("/predict")
def predict() -> flask.Response:
    """Classify the image in the multipart field `image`, or each of several, or the body itself."""
    # Before anything touches the body: a stranger's upload is not even read.
    check_key()
    check_rate()
    top = wanted_top()
    images = uploads(flask.request)  # a slow network is not the service's time
    deadline = time.time() + settings.REQUEST_TIMEOUT
    if len(images) == 1:
        found = classify(images[0], deadline, flask.g.request_id, top)
        return timed(result_of(found), [found])
    ask = partial(outcome, deadline=deadline, request_id=flask.g.request_id, top=top)
    outcomes = list(asking.map(ask, images))
    answered = [each for each in outcomes if isinstance(each, Classified)]
    body = {"success": len(answered) == len(outcomes), "results": [result_of(each) for each in outcomes]}
    return timed(body, answered)


class Classified(NamedTuple):
    """What the model server says of an image, the images of its batch, and the seconds that each stage took."""

    predictions: list[dict[str, Any]]
    batch: int
    prepare: float
    queue: float
    compute: float


def classify(upload: IO[bytes], deadline: float, request_id: str, top: int) -> Classified:
    """Return what the image in `upload` shows, and count it: `top` classes, or TOP where that is 0.

    Raises ServiceError.
    """
    try:
        found = prepare_and_ask(upload, deadline, request_id, top)
    except ServiceError as error:
        web_metrics.count_refused(error.code)
        if isinstance(error, BadImage):
            log.info("request %s: bad image: %s", request_id, reason(error))
        raise
    stages = {"prepare": found.prepare, "queue": found.queue, "compute": found.compute}
    web_metrics.count_classified(found.batch, stages)
    return found


def prepare_and_ask(upload: IO[bytes], deadline: float, request_id: str, top: int) -> Classified:
    """Return what classify() does. Raises ServiceError."""
    begun = time.monotonic()
    shape = queue.shape()
    image = [in_turn(upload, deadline, shape)]
    prepared = time.monotonic()
    answer = queue.ask(image.pop(), deadline, request_id, top, shape)  # so that none is kept here while it waits
    if "error" in answer:
        raise ModelFailed(answer["error"]["message"])
    # A model server that is yet to be upgraded says nothing of its times.
    waited = time.monotonic() - prepared - answer.get("held_s", 0.0)
    batch, compute = answer.get("batch", 0), answer.get("compute_s", 0.0)
    return Classified(answer["predictions"], batch, prepared - begun, waited, compute)


def outcome(upload: IO[bytes], deadline: float, request_id: str, top: int) -> Classified | ServiceError:
    """Return what classify() does, or what it raises: one bad image of several is no reason to refuse the others."""
    try:
        return classify(upload, deadline, request_id, top)
    except ServiceError as error:
        return error
    except Exception:
        log.exception("Request %s", request_id)
        return ServiceError(OUR_FAULT)


def result_of(found: Classified | ServiceError) -> dict[str, Any]:
    """Return what the client is told of one image."""
    if isinstance(found, ServiceError):
        return error_body(found.code, str(found))
    return {"success": True, "predictions": found.predictions}


def timed(body: dict[str, Any], classified: list[Classified]) -> flask.Response:
    """Return the answer with the milliseconds of each stage in its header Server-Timing: of several images the most."""
    most = {name: max((getattr(each, name) for each in classified), default=0) for name in Classified._fields[1:]}
    total = time.monotonic() - flask.g.begun
    flask.g.more = {f"{name}_ms": round(1000 * most[name], 1) for name in ("prepare", "queue", "compute")}
    flask.g.more |= {"batch": most["batch"], "images": len(classified)}
    response = flask.jsonify(body)
    response.headers["Server-Timing"] = (
        f"prepare;dur={1000 * most['prepare']:.1f}, queue;dur={1000 * most['queue']:.1f}, "
        f'compute;dur={1000 * most["compute"]:.1f};desc="batch of {most["batch"]}", total;dur={1000 * total:.1f}'
    )
    return response


def wanted_top() -> int:
    """Return how many predictions the client wants, by ?top=N; 0 where it does not say. Raises BadRequest."""
    given = flask.request.args.get("top")
    if given is None:
        return 0
    if not (re.fullmatch(r"\d{1,4}", given, re.ASCII) and 1 <= int(given) <= MOST_TOP):
        raise BadRequest(f"top is how many predictions you want, so send a whole number from 1 to {MOST_TOP}.")
    return int(given)


def in_turn(upload: IO[bytes], deadline: float, shape: Shape) -> str:
    """Return what prepare_upload() does, when its turn has come. Raises what it raises.

    Raises QueueFull when half of the time until `deadline` (unix seconds) is over before that.
    """
    limit = time.monotonic() + max(0.0, deadline - time.time()) / 2
    prepared = preparing.submit(partial(prepare_upload, upload, shape, limit))
    try:
        concurrent.futures.wait([prepared], max(0.0, limit - time.monotonic()))
        if not prepared.done() and prepared.cancel():  # it has not begun
            upload.close()
            raise too_many_images()
        return prepared.result()
    finally:
        del prepared  # its error would keep it, and it the error


def prepare_upload(upload: IO[bytes], shape: Shape, limit: float) -> str:
    """Return the image in `upload` as base64 text, prepared as pixels of `shape` (height, width, channels).

    Raises MissingImage, BadImage, TooLarge, and QueueFull when there is no memory for it until `limit` (of the
    monotonic clock).
    """
    try:
        with upload:  # closed, so that hundreds of waiting requests do not keep their uploads
            opened = [open_image(upload)]
        return encoded(opened.pop(), shape, limit)
    except NoMemoryNow:
        raise too_many_images() from None
    except ServiceError as error:
        forget_frames(error)
        raise


def forget_frames(error: BaseException | None) -> None:
    """Take the tracebacks from an error and its causes.

    They keep the image, and an error may be kept until the other images of its request are answered.
    """
    while error:
        error.with_traceback(None)
        error = error.__cause__ or error.__context__


def encoded(image: Image.Image, shape: Shape, limit: float) -> str:
    """Return `image` prepared and as base64 text, as soon as there is the memory to decode it.

    Raises BadImage, TooLarge, and NoMemoryNow when that is not so until `limit` (of the monotonic clock).
    """
    height, width, channels = shape
    with preparing.memory(bytes_to_decode(image, (width, height)), limit - time.monotonic()):
        return base64_encode_image(prepare_image(image, (width, height), channels))


def too_many_images() -> QueueFull:
    """Return the error for an image whose turn does not come."""
    return QueueFull("Too many images are being prepared, so try again in a few seconds.")


def status_of(kind: type[ServiceError]) -> int:
    """Return the HTTP status of an error."""
    return QUEUE_STATUSES.get(kind, kind.status)


@app.errorhandler(ServiceError)
def service_error(error: ServiceError) -> tuple[flask.Response, int]:
    """Answer what the service itself found wrong."""
    response, status = error_response(status_of(type(error)), error.code, str(error), **error.more)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimited):
        response.headers["Retry-After"] = str(error.wait)
    if isinstance(error, UnsupportedMediaType):
        response.headers["Accept-Encoding"] = "gzip, deflate"
    return response, status


@app.errorhandler(RequestEntityTooLarge)
def too_large(_error: RequestEntityTooLarge) -> tuple[flask.Response, int]:
    """Answer an upload beyond MAX_UPLOAD_BYTES."""
    limit = f"A request may have {megabytes(settings.MAX_UPLOAD_BYTES)}, so send a smaller image."
    return error_response(TooLarge.status, TooLarge.code, limit)


@app.errorhandler(HTTPException)
def http_error(error: HTTPException) -> tuple[flask.Response, int]:
    """Answer what Flask found wrong, such as a path that is not there."""
    status = error.code or 500
    code = error.name.lower().replace(" ", "_")
    message = MESSAGES.get(status, f"{error.name}: check how the request is made.")
    response, status = error_response(status, code, CUT_OFF if isinstance(error, ClientDisconnected) else message)
    response.headers.extend((name, value) for name, value in error.get_headers() if name == "Allow")
    return response, status


@app.errorhandler(Exception)
def unexpected_error(error: Exception) -> tuple[flask.Response, int]:
    """Answer a fault of ours: the traceback is for the log, not for the client."""
    log.error("%s %s, request %s", flask.request.method, flask.request.path, flask.g.request_id, exc_info=error)
    return error_response(500, ServiceError.code, OUR_FAULT)


OUR_FAULT = "Something went wrong on the server, so try again or tell its operator."
CUT_OFF = "The upload broke off before its end, so send it again."
MESSAGES = {
    400: "The request is not valid HTTP for this service, so check how it is made.",
    404: "There is nothing at this address, so post the image to /predict.",
    405: "This address does not take this method, so post the image to /predict.",
}


def error_body(code: str, message: str) -> dict[str, Any]:
    """Return the one JSON shape of every error that is not below /v2."""
    return {"success": False, "error": {"code": code, "message": message}}


def error_response(status: int, code: str, message: str, **more: Any) -> tuple[flask.Response, int]:
    """Return an error as an answer; `more` is for what a program may want to know besides."""
    flask.g.more = {"code": code}
    ours = not is_protocol_path(flask.request.path)
    response = flask.jsonify(error_body(code, message) | more if ours else protocol_error(message))
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER)
    return response, status


def watch_for_redis() -> None:
    """Say what is wrong with Redis at start, once per attempt, until nothing is; then close connections left idle."""
    for pause in pauses():
        try:
            queue.check()
            queue.warn()
            break
        except RedisError as error:
            queue.log_redis_error(error, pause)
            time.sleep(pause)
        except UnusableRedis as error:
            queue.log_redis_error(error, 60, IMAGES_REFUSED)
            break
    while True:
        time.sleep(CLOSE_SURPLUS_EVERY)
        queue.pool.close_surplus()


def keep_memory_small() -> None:
    """Keep one of malloc's arenas instead of eight a core, with at most LARGE_BLOCK at its end that nothing uses.

    Hundreds of threads else leave holes in an arena each: a process grew from 64 to 200 MB in a thousand requests. To
    return every block of a photo's size to the system at once would be smaller still, but to get it back, page by page,
    took a fifth of the time of a request.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK)


def allow_many_files() -> None:
    """Raise the limit on open files: each of hundreds of requests that wait has three, and 1,024 is a common limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def start() -> flask.Flask:
    """Return the app, with its log and its watch for Redis running."""
    keep_memory_small()
    allow_many_files()
    log_to_stderr(settings.LOG_FORMAT)
    choose_folder()
    for line in settings.warnings():
        log.warning(line)
    threading.Thread(target=watch_for_redis, name="watch-for-redis", daemon=True).start()
    return app


def main() -> None:
    """Run Flask's own server, for debugging."""
    parser = argparse.ArgumentParser(description="Run the web on Flask's own server, for debugging.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    arguments = parser.parse_args()
    start().run(arguments.host, arguments.port, threaded=True)


if __name__ == "__main__":
    main()
