"""The model server: takes a batch from Redis, classifies it with Keras, answers, until it is told to stop.

    python run_model_server.py

Run as many as there are GPUs; they share the queue. SIGTERM or Ctrl-C: it takes no more, answers what it computes, puts
back the rest and leaves with exit code 0. Exit code 2: a setting or the model makes no sense, and one line says why.
"""

import argparse
import ctypes
import logging
import os
import pwd
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
from redis.exceptions import RedisError

import settings
from helpers import Pixels, Refusal, base64_decode_image, log_to_stderr, pauses
from image_queue import Answer, Batch, DeclaredDead, ImageQueue, Job, ServerQueue, failed

if TYPE_CHECKING:
    from classifier import Classifier, Prediction

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_REFUSED = settings.EXIT_BAD_SETTING

# A server whose heartbeat is older than this many of its slowest batches counts as dead. A batch can take several
# times as long as at warm-up when the web prepares images on the same cores.
BATCHES_TO_LIVE = 5
SHORTEST_LIFE = 5.0  # seconds


class ModelServer:
    """One model server at work, a batch at a step()."""

    def __init__(self, classifier: "Classifier", queue: ServerQueue) -> None:
        self.classifier = classifier
        self.queue = queue
        self.stopping = False
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ahead: Future[Batch] | None = None  # what is taken while a batch is computed
        self._unsent: tuple[list[Job], list[Answer]] | None = None

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler: finish the batch, then leave."""
        self.stopping = True

    def run(self) -> None:
        """Serve until stop() is called, through every loss of Redis."""
        self._join()
        while not self.stopping:
            try:
                self.step()
            except DeclaredDead:
                log.warning("The heartbeat lapsed: joining again")
                self._unsent = None  # was handed out
                self._join()
            except RedisError as error:
                self.queue.complain(error, 0)
                self._join()
        self._leave()

    def step(self) -> None:
        """Answer one batch, or wait SERVER_SLEEP for one. Raises DeclaredDead, RedisError."""
        self.queue.beat()
        batch = self._next()
        if not batch.entries:
            return
        if not batch.suspect:
            self._ahead = self._helper.submit(self._take, settings.BATCH_SIZE, ahead=True)
        answers = self._classify(batch)
        self._unsent = batch.jobs, answers
        self.queue.answer(batch.jobs, answers, batch.entries)
        self._unsent = None

    def _next(self) -> Batch:
        """Return what was taken during the last batch, filled up with what came since, or wait for a first job."""
        batch = self._ahead.result() if self._ahead else Batch()
        self._ahead = None
        if not batch.entries:
            return self._take(settings.BATCH_SIZE, settings.SERVER_SLEEP)
        if len(batch.jobs) < settings.BATCH_SIZE:
            batch += self._take(settings.BATCH_SIZE - len(batch.jobs), ahead=True)
        batch.drop_expired()  # they have waited for the last batch to end
        return batch

    def _take(self, most: int, wait: float = 0, *, ahead: bool = False) -> Batch:
        batch = self.queue.take(most, wait, ahead=ahead)
        batch.images = [self._decode(job) for job in batch.jobs]
        return batch

    def _decode(self, job: Job) -> Pixels | None:
        try:
            return base64_decode_image(job.image, settings.IMAGE_DTYPE, self.classifier.shape)
        except ValueError as error:
            log.error("Job %s can't be decoded: %s", job.id, error)
            return None

    def _classify(self, batch: Batch) -> list[Answer]:
        """Return an answer for each job of `batch`, in its order."""
        images = [image for image in batch.images if image is not None]
        if images:
            stacked = np.stack(images)
            log.info("* Batch size: %s", stacked.shape)
            results = iter(self.classifier.classify(stacked))
        return [UNREADABLE if image is None else _answer(next(results)) for image in batch.images]

    def _join(self) -> None:
        """Hand out what could not be handed out, then be alive with nothing in flight; wait for Redis if need be."""
        if self._ahead:
            self._ahead.exception()  # wait for it: what it took goes back to the queue
            self._ahead = None
        for pause in pauses():
            if self.stopping:
                return
            try:
                self._send_late()
                self.queue.join()
                log.info("* Joined the queue %s as %s", self.queue.key, self.queue.name)
                return
            except RedisError as error:
                self.queue.complain(error, pause)
                self._sleep(pause)

    def _send_late(self) -> None:
        """Hand out answers that outlived the connection, or the Redis, that their jobs came through."""
        if self._unsent:
            jobs, answers = self._unsent
            with suppress(DeclaredDead):  # which it was, and is about to join again
                self.queue.answer(jobs, answers, entries=0)
            log.info("Answered %d images late", len(jobs))
            self._unsent = None

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.05)  # short, because a signal handler only sets a flag

    def _leave(self) -> None:
        self._helper.shutdown()
        try:
            self._send_late()
            self.queue.leave()
        except RedisError as error:
            log.warning("Redis does not answer (%s): what was taken goes back when the heartbeat lapses", error)


UNREADABLE = failed(
    "The image did not arrive as it was sent: IMAGE_* must be the same for the web and the model server."
)
BROKEN = failed("The model could not classify this image; try another.")


def _answer(result: "list[Prediction] | Exception") -> Answer:
    if isinstance(result, Exception):
        log.error("An image broke the model", exc_info=result)
        return BROKEN
    return {"predictions": [{"label": label, "probability": probability} for label, probability in result]}


PR_SET_NO_NEW_PRIVS = 38  # prctl.h
UNPRIVILEGED = ("www-data", "nobody")


def give_up_root() -> None:
    """Become an ordinary user where root started us. Raises Refusal.

    Only root may be able to read the code and the model, as under /root; what strangers sent is not for root to read.
    """
    if os.geteuid() != 0:
        return
    try:
        user = _unprivileged_user()
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except OSError as error:
        raise Refusal(
            f"Root can't become {UNPRIVILEGED[0]} ({error}): start the model server as another user."
        ) from None
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # nor may a program that it starts
    if prctl:
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    log.info("Root has become %s", user.pw_name)


def _unprivileged_user() -> pwd.struct_passwd:
    for name in UNPRIVILEGED:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise OSError("there is no such user")


def classify_process() -> None:
    """Load the model, then classify what comes until told to stop. Raises Refusal."""
    # Here, because it takes seconds, and a wrong setting or no Redis should be told at once.
    import classifier  # noqa: PLC0415

    log.info("* Loading model...")
    model = classifier.load()
    model.warm_up()
    give_up_root()
    log.info("* Model loaded")
    life = max(SHORTEST_LIFE, BATCHES_TO_LIVE * max(model.slowest, settings.SERVER_SLEEP))
    about = classifier.describe() | {"shape": model.shape, "batch_size": settings.BATCH_SIZE}
    server = ModelServer(model, ServerQueue(about, life))
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    server.run()


def look_for_redis() -> None:
    """Say at once when Redis is not there; the wait for it comes when the model is loaded. Raises Refusal."""
    queue = ImageQueue()
    try:
        queue.check()
    except RedisError as error:
        queue.complain(error, 0)


def main() -> int:
    """Run one model server; return its exit code."""
    argparse.ArgumentParser(
        description="Classify the images on the queue. Its settings are in settings.py."
    ).parse_args()
    log_to_stderr()
    for number in (signal.SIGTERM, signal.SIGINT):  # while loading there is nothing to finish
        # Not sys.exit: raised within a C library that is being imported, it becomes another exception.
        signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))
    try:
        look_for_redis()
        classify_process()
    except Refusal as error:
        log.error("%s", error)
        return EXIT_REFUSED
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
