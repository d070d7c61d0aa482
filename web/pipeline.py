"""From an upload to its predictions: wait for a turn, prepare the image, queue it, wait for the answer."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple

from PIL import Image

from helpers import ServiceError, Shape, base64_encode_image
from image_queue import Answer, QueueFull, WebQueue
from web.body_parts import Part, PixelPart
from web.errors import OUR_FAULT, ModelFailed, ModelReplaced
from web.image_preparation import BadImage, bytes_to_decode, open_image, prepare_image, reason
from web.metrics import Metrics
from web.process import shared_folder, web_processes
from web.turns import NoTurn, Turns

log = logging.getLogger(__name__)

Upload = IO[bytes] | Part
STAGES = ("prepare", "queue", "compute")


class Classified(NamedTuple):
    """An image's predictions, the size of its batch, the seconds spent in each of STAGES, and who gave the answer.

    `scores` and `indices` are those of the answer, empty if they were not wanted.
    """

    predictions: list[dict[str, Any]]
    batch: int
    seconds: dict[str, float]
    model: str
    version: str
    scores: str
    indices: list[int]


class Wanted(NamedTuple):
    """What a request wants to know: its id, its deadline in unix seconds, the model's queue, and how many predictions.

    `top` 0 means the setting TOP. `named` says that the client named the model, so no other one may answer. `scores`
    asks for the probabilities of all classes too.
    """

    request_id: str
    deadline: float
    queue: WebQueue
    top: int = 0
    named: bool = False
    scores: bool = False


class Pipeline:
    """Classifies the uploads of one web process."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        # Decoding a photo takes a core and up to a few hundred megabytes, so images take turns in order of arrival.
        self.turns = Turns(shared_folder, processes=web_processes())
        # For requests with several images: one thread per image, which waits for its answer.
        self.threads = ThreadPoolExecutor(128, thread_name_prefix="ask")

    def classify_all(self, uploads: Sequence[Upload], wanted: Wanted) -> list[Classified | ServiceError]:
        """Classify several images at once. Return for each its result, or its error if it failed."""
        return list(self.threads.map(partial(self.classify_or_error, wanted=wanted), uploads))

    def classify_or_error(self, upload: Upload, wanted: Wanted) -> Classified | ServiceError:
        """Return the result of classify(), or its error."""
        try:
            return self.classify(upload, wanted)
        except ServiceError as error:
            return error
        except Exception:
            log.exception("Request %s", wanted.request_id)
            return ServiceError(OUR_FAULT)

    def classify(self, upload: Upload, wanted: Wanted) -> Classified:
        """Classify the image in `upload`, close the upload, and count the result. Raises ServiceError."""
        try:
            result = self._prepare_and_ask(upload, wanted)
        except ServiceError as error:
            self.metrics.count_failed(wanted.queue.model, error.code)
            if isinstance(error, BadImage):
                log.info("request %s: bad image: %s", wanted.request_id, reason(error))
            raise
        self.metrics.count_classified(wanted.queue.model, result.batch, result.seconds)
        return result

    def _prepare_and_ask(self, upload: Upload, wanted: Wanted) -> Classified:
        begun = time.monotonic()
        shape = upload.shape if isinstance(upload, PixelPart) else wanted.queue.shape()
        image = [self._prepare(upload, wanted.deadline, shape)]
        prepared = time.monotonic()
        # pop() leaves no reference here, so that the queue can free the image while it waits.
        answer = wanted.queue.ask(
            image.pop(), wanted.deadline, wanted.request_id, wanted.top, shape, scores=wanted.scores
        )
        check_answer(answer, wanted)
        # Older model servers report neither times nor the batch, nor who they are.
        waited = time.monotonic() - prepared - answer.get("held_s", 0.0)
        seconds = dict(zip(STAGES, (prepared - begun, waited, answer.get("compute_s", 0.0)), strict=True))
        who = answer.get("model", wanted.queue.model), answer.get("version", "")
        scores = answer.get("scores", ""), answer.get("indices", [])
        return Classified(answer["predictions"], answer.get("batch", 0), seconds, *who, *scores)

    def _prepare(self, upload: Upload, deadline: float, shape: Shape) -> str:
        """Wait for a turn, then return the image in `upload` as base64 text of pixels of `shape`.

        `shape` is (height, width, channels). Closes the upload. Raises MissingImage, BadImage, TooLarge, and QueueFull
        if half of the time until `deadline` (unix seconds) passes without a turn or without memory for the image.
        """
        try:
            with upload, self.turn(deadline) as limit:
                if isinstance(upload, PixelPart):
                    return upload.encode()
                opened = [open_image(upload)]
                upload.close()
                return self._encode(opened.pop(), shape, limit)
        except ServiceError as error:
            drop_tracebacks(error)
            raise

    @contextmanager
    def turn(self, deadline: float) -> Iterator[float]:
        """Hold a turn; the value is the time.monotonic() until which the block may wait for memory.

        Raises QueueFull if half of the time until `deadline` (unix seconds) passes without a turn or without memory.
        """
        seconds = max(0.0, deadline - time.time()) / 2
        limit = time.monotonic() + seconds
        try:
            with self.turns.turn(seconds):
                yield limit
        except NoTurn:
            raise QueueFull("Too many images are being prepared, so try again in a few seconds.") from None

    def _encode(self, image: Image.Image, shape: Shape, limit: float) -> str:
        """Reserve the memory to decode `image`, prepare it, and return it as base64 text.

        Raises BadImage, TooLarge, and NoTurn if the memory is not free by `limit` (monotonic).
        """
        height, width, channels = shape
        with self.turns.memory(bytes_to_decode(image, (width, height)), limit - time.monotonic()):
            return base64_encode_image(prepare_image(image, (width, height), channels))


def check_answer(answer: Answer, wanted: Wanted) -> None:
    """Raise ModelFailed if the answer is an error, ModelReplaced if it is not one that the client can use.

    While the default model is replaced by one of another name, servers of both take images from its queue. Model
    servers of an older version know no scores.
    """
    if "error" in answer:
        raise ModelFailed(answer["error"]["message"])
    model = answer.get("model", wanted.queue.model)
    if wanted.named and model != wanted.queue.model:
        raise ModelReplaced(f"The model {wanted.queue.model} is being replaced by {model}, so try again.")
    if wanted.scores and "scores" not in answer:
        raise ModelReplaced("The model server is being upgraded, so try again when that is done.")


def drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks from an error and its causes.

    They keep the decoded image alive, and the error may be kept until the other images of its request are done.
    """
    while error:
        error.with_traceback(None)
        error = error.__cause__ or error.__context__
