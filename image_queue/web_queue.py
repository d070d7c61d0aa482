"""The web's side of the queue."""

import json
import math
import time
import uuid
from contextlib import closing, suppress
from copy import copy
from typing import cast

from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

import settings
from helpers import USUAL_SHAPE, Shape, as_shape, pauses
from image_queue.base import IMAGES_REFUSED, CountJobs, ImageQueue
from image_queue.errors import NoModelServer, QueueFull, RedisDown, ResultTimeout, UnusableRedis
from image_queue.in_flight import InFlight
from image_queue.job import Answer, Job
from image_queue.parsing import parse_object
from image_queue.pending_job import PendingJob
from image_queue.refreshed import Refreshed
from image_queue.transaction import transaction

REFRESH_EVERY = 1.0  # seconds after which a web process asks Redis again for what the model servers announce
SPARE_CONNECTIONS = 4  # besides one per image in flight: for health, metrics and rate limits, which are quick


class WebQueue(ImageQueue):
    """Queues images and returns their answers. Any number of threads may use it."""

    def __init__(self, count: CountJobs = lambda event, times: None) -> None:
        super().__init__(count)
        self.model = ""  # the model's name for messages; "" if only one is served
        self._full = False  # whether the queue was full at the last push
        self._shape = Refreshed(self._served_shape, USUAL_SHAPE, REFRESH_EVERY)
        self._in_flight = InFlight()

    def of(self, model: str, key: str, count: CountJobs) -> "WebQueue":
        """Return the queue `key` of a model, which shares the connections of this one."""
        queue = copy(self)
        queue.count, queue.key, queue.model, queue._full = count, key, model, False
        queue._shape = Refreshed(queue._served_shape, USUAL_SHAPE, REFRESH_EVERY)
        return queue

    def shape(self) -> Shape:
        """Return the shape to prepare images in, (height, width, channels): from IMAGE_*, or where empty, the model's.

        IMAGE_* are the default model's.
        """
        if self.key != settings.IMAGE_QUEUE:
            return self._shape.value()
        return settings.image_shape(self._shape.cached if settings.image_is_set() else self._shape.value())

    def _served_shape(self) -> Shape | None:
        """Return the shape that a live model server takes, or that the last one took. Raises RedisError."""
        last = parse_object(self.redis.get(self.shape_key) or b"")
        shape, server = as_shape(last.get("shape")), last.get("server")
        if isinstance(server, str) and self.redis.exists(self.server_key(server)):
            return shape
        # An older model server writes the shape only to its heartbeat. Finding heartbeats scans all keys of Redis, so
        # this is the last resort.
        live = [as_shape(about.get("shape")) for about in self.live_servers().values()]
        return next(filter(None, live), shape)

    def ask(  # noqa: PLR0913 - the fields of a job
        self, image: str, deadline: float, request: str = "", top: int = 0, shape: Shape | None = None,
        *, scores: bool = False,
    ) -> Answer:  # fmt: skip
        """Queue `image` (base64 text) and return its answer by `deadline` (unix seconds).

        `request` is the request id that the client sees, `top` the number of predictions (0: TOP), `shape` the shape
        of the pixels (None: the model's), `scores` whether the answer has the probabilities of all classes too.

        Raises QueueFull, NoModelServer and RedisDown if the job was not accepted, ResultTimeout if it was.
        """
        with closing(
            PendingJob(Job(uuid.uuid4().hex, image, deadline, request, top, shape=shape, scores=scores))
        ) as job:
            del image
            if self.connections.unusable:
                self._refuse_if_unusable()
            with self._in_flight.connection_for(job):
                return self._ask(job)

    def _refuse_if_unusable(self) -> None:
        """Raise RedisDown if this Redis can never be used, since waiting for it would not help."""
        try:
            self.check()
        except UnusableRedis as error:
            self.log_redis_error(error, 60, IMAGES_REFUSED)
            raise RedisDown("The queue is misconfigured, so tell the operator of the service.") from None
        except RedisError:
            pass  # this may be over soon, so try to queue the image

    def _limit_connections(self, limit: int) -> None:
        self._in_flight.limit(limit)
        self.pool.max_connections = limit + SPARE_CONNECTIONS
        self.pool.close_idle(limit)

    def _ask(self, job: PendingJob) -> Answer:
        give_up = min(job.until, time.monotonic() + settings.REDIS_TIMEOUT)
        tried = accepted = False
        error: RedisError | None = None
        pause = pauses()
        while time.monotonic() < (job.until if accepted else give_up):
            try:
                # Redis may have restarted without the job, or sent the answer to a connection that is dead.
                if not (tried and self._known(job)):
                    again, tried = tried, True
                    self._push(job, accepted=accepted)
                    self.count("retried" if again else "queued", 1)
                accepted = True
                job.prepare_to_wait()
                answer = self._poll(job)
                if answer is not None:
                    return answer
                if error:  # Redis works again, so the next error starts with a short pause
                    error, pause = None, pauses()
            except RedisError as problem:
                if isinstance(problem, ResponseError) and not accepted:
                    self._refuse_if_unusable()
                error = problem
                seconds = next(pause)
                self.log_redis_error(problem, seconds)
                time.sleep(min(seconds, job.remaining))
        if not accepted:
            raise RedisDown("The queue can't be reached now, so try again in a few seconds.")
        with suppress(RedisError):  # without a model server nobody else removes expired jobs from the queue
            self._remove(job, from_end=False)
        raise ResultTimeout(self._timeout_message(error))

    def _known(self, job: PendingJob) -> bool:
        """Return whether Redis has the job or its answer."""
        return bool(self.redis.exists(self.accepted_key(job.id), self.result_key(job.id)))

    def _push(self, job: PendingJob, *, accepted: bool) -> None:
        """Queue the job, even in a full queue if it was `accepted` before. Raises QueueFull, NoModelServer."""
        limit = math.inf if accepted else settings.MAX_QUEUE
        try:
            pushed = not (self._full and self.waiting() >= limit) and self._append(job, limit)
        except OutOfMemoryError as error:
            if accepted:
                raise  # then keep retrying
            self.log_redis_error(error, 1, IMAGES_REFUSED)
            raise QueueFull("Redis has no memory for another image, so try again in a few seconds.") from error
        if not pushed:
            if self.live_servers():
                waiting = f"{settings.MAX_QUEUE} images are waiting{self._for_model()} already"
                raise QueueFull(f"{waiting}, so try again in a few seconds.")
            raise NoModelServer(f"The queue{self._for_model()} is full and {self._none_alive()}.")

    def _append(self, job: PendingJob, limit: float) -> bool:
        """Append the job, and withdraw it if the queue is then longer than `limit` and it was not taken yet.

        Return whether the job stays.
        """
        lifetime = b"%d" % max(1, math.ceil(1000 * job.remaining))
        marker = self.accepted_key(job.id).encode()
        push = (b"RPUSH", self.key.encode(), job.read())
        length, _ = transaction(self.pool, push, (b"SET", marker, b"", b"PX", lifetime))
        self._full = length > limit
        return not (self._full and self._remove(job, from_end=True))

    def _remove(self, job: PendingJob, *, from_end: bool) -> bool:
        """Remove the job from the queue, and return whether it was still there."""
        found = bool(self.redis.lrem(self.key, -1 if from_end else 1, cast(str, job.read())))
        if found:
            self.redis.delete(self.accepted_key(job.id))
        return found

    def _poll(self, job: PendingJob) -> Answer | None:
        seconds = min(settings.CLIENT_SLEEP, max(0.01, job.remaining))  # 0 would block forever
        reply = self.redis.blpop([self.result_key(job.id)], seconds)
        return None if reply is None else cast(Answer, json.loads(reply[1]))

    def _timeout_message(self, error: RedisError | None) -> str:
        cause = "the queue can't be reached; try again later"
        with suppress(RedisError):
            if not error:
                alive = self.live_servers()
                busy = f"the model servers{self._for_model()} are busy; try again later"
                cause = busy if alive else self._none_alive()
        return f"No answer came within {settings.REQUEST_TIMEOUT:g} seconds, because {cause}."

    def _for_model(self) -> str:
        """Return the model's name as a part of a message."""
        return f" for {self.model}" if self.model else ""

    def _none_alive(self) -> str:
        return f"no model server{self._for_model()} is alive; try again when one is started"
