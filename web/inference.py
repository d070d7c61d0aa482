"""Inference in the Open Inference Protocol: from the request to the answer."""

import time
from contextlib import ExitStack
from itertools import chain
from typing import IO, Any

import flask
import numpy as np
import numpy.typing as npt
import orjson
import pybase64
from redis.exceptions import RedisError

import settings
from helpers import ServiceError
from image_queue import RedisDown
from web.access import check_key, check_rate
from web.body_parts import Part
from web.errors import ModelReplaced
from web.model_versions import none_alive, versions_of
from web.pipeline import Classified, Pipeline, Wanted
from web.response_headers import describe
from web.served_models import ServedModels
from web.storage import storage_errors
from web.tensors import PREFIX, PROBABILITIES, InferRequest, Json, NewStream, bytes_to_parse, json_size, parse
from web.uploads import SMALL, whole_request

HEADER = "Inference-Header-Content-Length"  # how many bytes of a body with binary data are JSON
Rows = list[list[str]] | npt.NDArray[np.float32]  # of an output: one for each image
TRIES = 3  # while a model is replaced, two versions may answer; soon there is one


def infer(models: ServedModels, model: str, version: str) -> flask.Response:
    """Classify the images of the request by one version of the model: any, or the given `version`.

    Raises ServiceError.
    """
    check_key()
    check_rate()
    queue = models.queue(model)
    flask.g.model = queue.model
    pipeline: Pipeline = flask.current_app.extensions["pipeline"]
    with ExitStack() as kept:
        body, size, new = whole_request(flask.request)
        kept.enter_context(body)
        deadline = time.time() + settings.REQUEST_TIMEOUT  # excludes the upload: a slow network is not our fault
        wanted = Wanted(flask.g.request_id, deadline, queue, named=True, scores=True)
        request = read(body, size, new, pipeline, wanted)
        wanted = wanted._replace(top=request.top or 1)  # without classification, labels are not needed
        for _ in range(TRIES):
            if version:
                check_version(models, model, version)
            results = classify(request.parts, pipeline, wanted)
            versions = {each.version for each in results}
            if versions == {version} or (len(versions) == 1 and not version):
                return response(request, results)
    raise ModelReplaced(f"The model {model} is being replaced, so try again in a few seconds.")


def check_version(models: ServedModels, model: str, version: str) -> None:
    """Check that a live server has this version of the model. Raises UnknownModel, NoModelServer, RedisDown."""
    try:
        servers = models.servers(model)
    except RedisError:
        raise RedisDown("The queue can't be reached now, so try again in a few seconds.") from None
    if not servers:
        raise none_alive(model)
    versions_of(servers, model, version)


def read(body: IO[bytes], size: int, new: NewStream, pipeline: Pipeline, wanted: Wanted) -> InferRequest:
    """Return the request in `body`, which has `size` bytes. Raises ServiceError.

    Parsing takes up to 40 times as much memory as the JSON has bytes, so large requests take turns like images.
    """
    text = Part(body, 0, json_size(flask.request.headers.get(HEADER), size))
    rest = Part(body, text.size, size - text.size)
    shape = wanted.queue.shape()
    with storage_errors():
        if text.size <= SMALL:
            return parse(text.read(), rest, shape, new)
        with pipeline.turn(wanted.deadline) as limit:
            content = text.read()
            with pipeline.turns.memory(bytes_to_parse(content), limit - time.monotonic()):
                return parse(content, rest, shape, new)


def classify(parts: list[Part], pipeline: Pipeline, wanted: Wanted) -> list[Classified]:
    """Return the result of each image. Raises the ServiceError of the first one that fails, with its number."""
    if len(parts) == 1:
        return [pipeline.classify(parts[0], wanted)]
    results = []
    for number, result in enumerate(pipeline.classify_all(parts, wanted)):
        if isinstance(result, ServiceError):
            result.args = (f"Image {number}: {result}",)
            raise result
        results.append(result)
    return results


def response(request: InferRequest, results: list[Classified]) -> flask.Response:
    """Return the answer to a request whose images all have results from the same version of the model."""
    fields: Json = {"model_name": results[0].model, "model_version": results[0].version}
    if request.id is not None:
        fields["id"] = request.id
    text, binary = answer(fields, output_of(request, results), binary=request.binary)
    response = flask.Response(text + binary, mimetype="application/octet-stream" if binary else "application/json")
    if binary:
        response.headers[HEADER] = str(len(text))
    describe(response, results)
    return response


def output_of(request: InferRequest, results: list[Classified]) -> Rows:
    """Return a row for each image: the strings that name its classes, or its probabilities, float32."""
    if request.top:
        return [list(map(class_text, each.predictions, each.indices)) for each in results]
    return np.stack([np.frombuffer(pybase64.b64decode(each.scores), "<f4") for each in results])


def class_text(prediction: Json, index: int) -> str:
    """Return a class as the protocol's classification extension has it: probability, index, label."""
    return f"{prediction['probability']:f}:{index}:{prediction['label']}"


def answer(fields: Json, rows: Rows, *, binary: bool) -> tuple[bytes, bytes]:
    """Return the JSON of the answer with `fields` and the output in `rows`, and its binary data, if wanted."""
    output: Json = {"name": PROBABILITIES, "shape": [len(rows), len(rows[0])]}
    values: Any
    if isinstance(rows, list):
        output["datatype"], values = "BYTES", list(chain.from_iterable(rows))
        data = b"".join(map(prefixed, values)) if binary else b""
    else:
        output["datatype"], values = "FP32", rows.ravel()
        data = rows.tobytes() if binary else b""
    output |= {"parameters": {"binary_data_size": len(data)}} if binary else {"data": values}
    return orjson.dumps(fields | {"outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY), data


def prefixed(text: str) -> bytes:
    """Return a text as an element of a binary BYTES tensor."""
    data = text.encode()
    return len(data).to_bytes(PREFIX, "little") + data
