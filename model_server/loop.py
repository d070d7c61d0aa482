"""The model server's loop: takes batches from the queue, computes them, and sends the answers."""

import logging
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import NamedTuple

from redis.exceptions import RedisError

import settings
from helpers import pauses
from image_queue import Answer, Batch, HeartbeatExpired, Job, ServerQueue, failed
from model_server import metrics
from model_server.batching import BATCHES_AT_ONCE
from model_server.classifier import Classifier, Probabilities
from model_server.health import health
from model_server.systemd import READY, STOPPING, WATCHDOG, notify_systemd
from model_server.tray import Tray

log = logging.getLogger(__name__)

UNREADABLE = failed("The image on the queue is invalid: IMAGE_* must be the same for the web and the model server.")
BROKEN = failed("The model could not classify this image; try another.")

# Seconds to wait for more jobs while another batch is in flight. A batch takes a millisecond of CPU to take, start and
# answer, however few images it has, so a fast model would spend its time on batches of one.
GATHER = 0.002

WATCHDOG_EVERY = 0.2  # seconds between two reports to systemd, which would cost as much as a small batch


class Computed(NamedTuple):
    """A computed batch: a result for each image that could be decoded, in order, and the seconds that it took."""

    batch: Batch
    results: list[Probabilities | Exception]
    seconds: float


class ModelServer:
    """A model server at work; each step() takes one batch.

    The main thread takes and decodes batches, BATCHES_AT_ONCE threads compute them, and one thread sends the answers
    in the order in which the batches were taken. So computing never waits for Redis while there is work.
    """

    def __init__(self, classifier: Classifier, queue: ServerQueue) -> None:
        self.classifier = classifier
        self.queue = queue
        self.stopping = False
        self._identity: Answer = {name: queue.about[name] for name in ("model", "version") if name in queue.about}
        self._computing = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="compute")
        self._answering = ThreadPoolExecutor(1, thread_name_prefix="answer")
        self._in_flight: deque[Future[None]] = deque()  # each done when its batch is answered; oldest first
        self._unsent: deque[Computed] = deque()  # the first is being sent, or waits because Redis failed
        self._spare_trays: deque[Tray] = deque()
        self._tray = self._another_tray()  # for the batch that is being taken
        self._next_report = 0.0  # time.monotonic() of the next report to systemd

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler: make run() finish the batches being computed, then leave."""
        self.stopping = True

    def run(self) -> None:
        """Serve until stop() is called; survive every loss of Redis."""
        self._join()
        while not self.stopping:
            try:
                self.step()
            except HeartbeatExpired:
                log.warning("The heartbeat expired: joining again")
                self._join()
            except RedisError as error:
                self.queue.log_redis_error(error, 0)
                self._join()
        health.left()
        notify_systemd(STOPPING)
        self._leave()

    def step(self) -> None:
        """Take a batch and start computing it, or wait SERVER_SLEEP for one.

        Raises HeartbeatExpired and RedisError, including those from sending the answers of earlier batches.
        """
        self.queue.beat()
        self._report_alive()
        self.settle(BATCHES_AT_ONCE)
        batch = self._take(Batch(), settings.SERVER_SLEEP)
        if not batch.entries:
            self.settle()  # a waiting suspect is taken only when nothing else is in flight
            return
        self.settle(BATCHES_AT_ONCE)
        if self._in_flight:
            self._fill_up(batch)
        if self.stopping:
            return  # _leave() requeues what was taken
        computing = self._computing.submit(self._classify, batch, self._tray)
        self._tray = self._another_tray()
        self._in_flight.append(self._answering.submit(self._answer, batch, computing))
        if batch.suspect:
            self.settle()

    def _report_alive(self) -> None:
        """Note that the loop goes on, and report it to systemd, at most every WATCHDOG_EVERY seconds."""
        health.step()
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + WATCHDOG_EVERY
            notify_systemd(WATCHDOG)

    def _fill_up(self, batch: Batch) -> None:
        """Wait for a free thread, or GATHER, and add the jobs that have come meanwhile.

        Call this only while another batch is in flight, so that an image that comes alone is computed at once.
        """
        if len(self._in_flight) == BATCHES_AT_ONCE:
            self.settle(BATCHES_AT_ONCE - 1)
        elif len(batch.jobs) < self.classifier.batch_size:
            time.sleep(GATHER)
        self._take(batch)
        self.queue.count("expired", batch.drop_expired())

    def settle(self, most: int = 0) -> None:
        """Wait until at most `most` batches are in flight. Raises HeartbeatExpired and RedisError of their answers."""
        while self._in_flight and (len(self._in_flight) > most or self._in_flight[0].done()):
            self._in_flight.popleft().result()

    def _take(self, batch: Batch, wait: float = 0) -> Batch:
        """Add jobs to `batch` until it is full or the queue empty; wait up to `wait` seconds for the first."""
        most = self.classifier.batch_size - len(batch.jobs)
        ahead = bool(self._in_flight or batch.jobs)
        batch += self.queue.take(most, wait, ahead=ahead, place=self._tray.placer(batch.rows))
        return batch

    def _another_tray(self) -> Tray:
        """Return one that is not in use. There are at most BATCHES_AT_ONCE + 1."""
        if self._spare_trays:
            return self._spare_trays.popleft()
        return Tray(self.classifier.batch_size, self.classifier.shape)

    def _classify(self, batch: Batch, tray: Tray) -> Computed:
        try:
            images = tray.images(batch.rows)
            if not len(images):
                return Computed(batch, [], 0.0)
            names = [job.request for job in batch.jobs]
            log.info("* Batch size: %s of requests %s", images.shape, " ".join(names), extra={"requests": names})
            metrics.BATCHES.observe(len(images))
            begun = time.monotonic()
            results = self.classifier.classify(images)
            seconds = time.monotonic() - begun
            metrics.COMPUTE.observe(seconds)
            return Computed(batch, results, seconds)
        finally:
            self._spare_trays.append(tray)

    def _answer(self, batch: Batch, computing: Future[Computed]) -> None:
        self._unsent.append(computing.result())
        if len(self._unsent) == 1:  # otherwise an earlier batch could not be sent, and _send_late() sends both
            self._send_oldest(batch.entries)

    def _send_oldest(self, entries: int) -> None:
        """Send the answers to the oldest unsent batch, and remove that many `entries` from the taken list."""
        batch, results, seconds = self._unsent[0]
        each = iter(results)
        pairs = zip(batch.jobs, batch.rows, strict=True)
        common: Answer = {"compute_s": seconds, "batch": len(results), **self._identity}
        answers = [UNREADABLE if row is None else self._answer_to(job, next(each), common) for job, row in pairs]
        try:
            self.queue.answer(batch.jobs, answers, entries)
        except HeartbeatExpired:  # the answers were sent anyway
            self._sent(answers)
            raise
        self._sent(answers)

    def _sent(self, answers: list[Answer]) -> None:
        self._unsent.popleft()
        for outcome, times in Counter(map(outcome_of, answers)).items():
            metrics.OUTCOMES.labels(outcome).inc(times)

    def _answer_to(self, job: Job, result: Probabilities | Exception, common: Answer) -> Answer:
        if isinstance(result, Exception):
            log.error("The image of request %s broke the model", job.request, exc_info=result)
            return BROKEN
        decoded = self.classifier.decode(result, job.top)
        predictions = [{"label": label, "probability": probability} for label, probability in decoded]
        scores = self.classifier.scores(result, job.top) if job.scores else {}
        return {"predictions": predictions, **scores, "held_s": time.monotonic() - job.taken, **common}

    def _join(self) -> None:
        """Finish what is in flight, send unsent answers, and write a new heartbeat; wait for Redis if needed."""
        health.left()
        while self._in_flight:
            self._in_flight.popleft().exception()  # only wait: _send_late() sends the answers
        for pause in pauses():
            if self.stopping:
                return
            self._report_alive()  # a restart would not bring Redis back
            try:
                self._send_late()
                self.queue.join()
                log.info("* Joined the queue %s as %s", self.queue.key, self.queue.name)
                health.joined()
                notify_systemd(READY)
                return
            except RedisError as error:
                self.queue.log_redis_error(error, pause)
                self._sleep(pause)

    def _send_late(self) -> None:
        """Send the answers that could not be sent because Redis was lost or has restarted."""
        while self._unsent:
            jobs = self._unsent[0].batch.jobs
            with suppress(HeartbeatExpired):  # expected: this server is about to join again or leave
                self._send_oldest(entries=0)  # our taken list may no longer have them
            log.info("Answered %d images late", len(jobs))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.05)  # short, because the signal handler only sets a flag

    def _leave(self) -> None:
        self._computing.shutdown()
        self._answering.shutdown()
        try:
            self._send_late()
            self.queue.leave()
        except RedisError as error:
            self.queue.log_redis_error(error, 0, "the taken jobs are requeued when the heartbeat expires")


def outcome_of(answer: Answer) -> str:
    """Return the label that the metrics give an answer."""
    return "unreadable" if answer is UNREADABLE else "model_failed" if answer is BROKEN else "classified"
