"""The web program: takes a client's image, prepares it, queues it for a model server and returns the answer as JSON.

Apache loads it through keras_rest_api_app.wsgi. For debugging, run it on Flask's development server:

    python run_web_server.py [--port 5000]
"""

import argparse
import logging
import re
import time
from typing import Any

import flask
from werkzeug.exceptions import ClientDisconnected, HTTPException

import settings
from helpers import ServiceError
from image_queue import WebQueue
from web import errors
from web.access import add_rate_limit, check_key, check_rate
from web.cors import add_cors
from web.health import add_health_routes
from web.image_preparation import prepare_image  # noqa: F401 - the tutorial defines it in this file
from web.inference_protocol import add_protocol_routes, is_protocol_path, protocol_error
from web.metrics import PREDICT, Metrics, add_metrics_routes
from web.pages import WELCOME, add_pages, send, wants_page
from web.pipeline import Classified, Pipeline, Wanted
from web.process import set_up_process, watch_redis
from web.request_log import add_request_log
from web.response_headers import describe
from web.served_models import ServedModels
from web.uploads import uploads

log = logging.getLogger(__name__)

MOST_TOP = 1000


def create_app() -> flask.Flask:
    """Return the app with its queue, threads and routes. No thread starts before the first image."""
    app = flask.Flask(__name__, static_folder=None)
    metrics = Metrics()
    queue = app.extensions["queue"] = WebQueue()
    models = app.extensions["models"] = ServedModels(queue, metrics.count_jobs)
    app.extensions["pipeline"] = Pipeline(metrics)
    app.add_url_rule("/", view_func=homepage)
    app.add_url_rule(PREDICT, view_func=predict, methods=["POST"])
    app.add_url_rule(f"{PREDICT}/<name>", view_func=predict, methods=["POST"])
    add_rate_limit(app, queue)
    add_health_routes(app, models)
    add_protocol_routes(app, models)
    add_metrics_routes(app, models, metrics)
    add_pages(app)
    add_cors(app)
    add_request_log(app, metrics)
    app.register_error_handler(ServiceError, service_error)
    app.register_error_handler(errors.WebError, web_error)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected_error)
    return app


def homepage() -> flask.Response:
    """Welcome the client: a browser gets a page, any other client a line of text."""
    response = send(WELCOME) if wants_page() else flask.make_response("Welcome to the PyImageSearch Keras REST API!")
    response.vary.add("Accept")
    return response


def predict(name: str = "") -> flask.Response:
    """Classify each image in the multipart field `image`, or the image that is the body, with the model `name`.

    "" is the default model.
    """
    # Check before reading the body, so that nothing is received from clients without a key.
    check_key()
    check_rate()
    queue = flask.current_app.extensions["models"].queue(name)
    flask.g.model = queue.model
    top = requested_top()
    images = uploads(flask.request)
    deadline = time.time() + settings.REQUEST_TIMEOUT  # excludes the upload: a slow network is not our fault
    pipeline: Pipeline = flask.current_app.extensions["pipeline"]
    wanted = Wanted(flask.g.request_id, deadline, queue, top, named=bool(name))
    if len(images) == 1:
        result = pipeline.classify(images[0], wanted)
        return described(result_body(result), [result])
    results = pipeline.classify_all(images, wanted)
    classified = [each for each in results if isinstance(each, Classified)]
    body = {"success": len(classified) == len(results), "results": [result_body(each) for each in results]}
    return described(body, classified)


def requested_top() -> int:
    """Return how many predictions the client wants (?top=N); 0 if it does not say. Raises BadRequest."""
    given = flask.request.args.get("top")
    if given is None:
        return 0
    if not (re.fullmatch(r"\d{1,4}", given, re.ASCII) and 1 <= int(given) <= MOST_TOP):
        raise errors.BadRequest(f"top is the number of predictions, so send a whole number from 1 to {MOST_TOP}.")
    return int(given)


def result_body(result: Classified | ServiceError) -> dict[str, Any]:
    """Return the JSON for one image."""
    if isinstance(result, ServiceError):
        return errors.error_body(result.code, str(result))
    return {"success": True, "predictions": result.predictions}


def described(body: dict[str, Any], classified: list[Classified]) -> flask.Response:
    """Return the response, with the headers about the images that have predictions."""
    response = flask.jsonify(body)
    describe(response, classified)
    return response


def service_error(error: ServiceError) -> flask.Response:
    """Respond to an error of the service, such as a full queue."""
    return error_response(errors.status_of(type(error)), error.code, str(error), **error.more)


def web_error(error: errors.WebError) -> flask.Response:
    """Respond to an error of the web program, with the headers of the error."""
    response = service_error(error)
    response.headers.update(error.headers)
    return response


def http_error(error: HTTPException) -> flask.Response:
    """Respond to an error that Flask raised, such as an unknown path."""
    status = error.code or 500
    message = errors.HTTP_MESSAGES.get(status, f"{error.name}: check how the request is made.")
    if isinstance(error, ClientDisconnected):
        message = errors.UPLOAD_INTERRUPTED
    response = error_response(status, error.name.lower().replace(" ", "_"), message)
    response.headers.extend((name, value) for name, value in error.get_headers() if name == "Allow")
    return response


def unexpected_error(error: Exception) -> flask.Response:
    """Respond to a bug: the traceback goes to the log, not to the client."""
    log.error("%s %s, request %s", flask.request.method, flask.request.path, flask.g.request_id, exc_info=error)
    return service_error(ServiceError(errors.OUR_FAULT))


def error_response(status: int, code: str, message: str, **more: Any) -> flask.Response:
    """Return an error as JSON with `more` fields beside it; under /v2 in the Open Inference Protocol's form."""
    flask.g.log_fields = {"code": code}
    ours = not is_protocol_path(flask.request.path)
    response = flask.jsonify(errors.error_body(code, message) | more if ours else protocol_error(message))
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = str(errors.RETRY_AFTER)
    return response


def main() -> None:
    """Run Flask's development server, for debugging."""
    parser = argparse.ArgumentParser(description="Run the web program on Flask's development server, for debugging.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    arguments = parser.parse_args()
    set_up_process()
    app = create_app()
    watch_redis(app.extensions["queue"])
    app.run(arguments.host, arguments.port, threaded=True)


if __name__ == "__main__":
    main()
