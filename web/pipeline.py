"""From an upload to its predictions: wait for a turn, prepare the image, queue it, wait for the answer."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, NamedTuple

from PIL import Image

from helpers import ServiceError, Shape, base64_encode_image
from image_queue import QueueFull, WebQueue
from web.errors import OUR_FAULT, ModelFailed
from web.image_preparation import BadImage, bytes_to_decode, open_image, prepare_image, reason
from web.metrics import Metrics
from web.process import shared_folder
from web.turns import NoTurn, Turns

log = logging.getLogger(__name__)

STAGES = ("prepare", "queue", "compute")


class Classified(NamedTuple):
    """An image's predictions, the size of its batch, and the seconds spent in each of STAGES."""

    predictions: list[dict[str, Any]]
    batch: int
    seconds: dict[str, float]


class Pipeline:
    """Classifies the uploads of one web process."""

    def __init__(self, queue: WebQueue, metrics: Metrics) -> None:
        self.queue = queue
        self.metrics = metrics
        # Decoding a photo takes a core and up to a few hundred megabytes, so images take turns in order of arrival.
        self.turns = Turns(shared_folder)
        # For requests with several images: one thread per image, which waits for its answer.
        self.threads = ThreadPoolExecutor(128, thread_name_prefix="ask")

    def classify_all(
        self, uploads: list[IO[bytes]], deadline: float, request_id: str, top: int
    ) -> list[Classified | ServiceError]:
        """Classify several images at once. Return for each its result, or its error if it failed."""
        one = partial(self.classify_or_error, deadline=deadline, request_id=request_id, top=top)
        return list(self.threads.map(one, uploads))

    def classify_or_error(
        self, upload: IO[bytes], deadline: float, request_id: str, top: int
    ) -> Classified | ServiceError:
        """Return the result of classify(), or its error."""
        try:
            return self.classify(upload, deadline, request_id, top)
        except ServiceError as error:
            return error
        except Exception:
            log.exception("Request %s", request_id)
            return ServiceError(OUR_FAULT)

    def classify(self, upload: IO[bytes], deadline: float, request_id: str, top: int) -> Classified:
        """Classify the image in `upload`, close the upload, and count the result. `top` 0 means the setting TOP.

        `deadline` is in unix seconds. Raises ServiceError.
        """
        try:
            result = self._prepare_and_ask(upload, deadline, request_id, top)
        except ServiceError as error:
            self.metrics.count_failed(error.code)
            if isinstance(error, BadImage):
                log.info("request %s: bad image: %s", request_id, reason(error))
            raise
        self.metrics.count_classified(result.batch, result.seconds)
        return result

    def _prepare_and_ask(self, upload: IO[bytes], deadline: float, request_id: str, top: int) -> Classified:
        begun = time.monotonic()
        shape = self.queue.shape()
        image = [self._prepare(upload, deadline, shape)]
        prepared = time.monotonic()
        # pop() leaves no reference here, so that the queue can free the image while it waits.
        answer = self.queue.ask(image.pop(), deadline, request_id, top, shape)
        if "error" in answer:
            raise ModelFailed(answer["error"]["message"])
        # Older model servers report neither times nor the batch.
        waited = time.monotonic() - prepared - answer.get("held_s", 0.0)
        seconds = (prepared - begun, waited, answer.get("compute_s", 0.0))
        return Classified(answer["predictions"], answer.get("batch", 0), dict(zip(STAGES, seconds, strict=True)))

    def _prepare(self, upload: IO[bytes], deadline: float, shape: Shape) -> str:
        """Wait for a turn, then return the image in `upload` as base64 text of pixels of `shape`.

        `shape` is (height, width, channels). Closes the upload. Raises MissingImage, BadImage, TooLarge, and QueueFull
        if half of the time until `deadline` (unix seconds) passes without a turn or without memory for the image.
        """
        seconds = max(0.0, deadline - time.time()) / 2
        limit = time.monotonic() + seconds
        try:
            with upload, self.turns.turn(seconds):
                opened = [open_image(upload)]
                upload.close()
                return self._encode(opened.pop(), shape, limit)
        except NoTurn:
            raise QueueFull("Too many images are being prepared, so try again in a few seconds.") from None
        except ServiceError as error:
            drop_tracebacks(error)
            raise

    def _encode(self, image: Image.Image, shape: Shape, limit: float) -> str:
        """Reserve the memory to decode `image`, prepare it, and return it as base64 text.

        Raises BadImage, TooLarge, and NoTurn if the memory is not free by `limit` (monotonic).
        """
        height, width, channels = shape
        with self.turns.memory(bytes_to_decode(image, (width, height)), limit - time.monotonic()):
            return base64_encode_image(prepare_image(image, (width, height), channels))


def drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks from an error and its causes.

    They keep the decoded image alive, and the error may be kept until the other images of its request are done.
    """
    while error:
        error.with_traceback(None)
        error = error.__cause__ or error.__context__
