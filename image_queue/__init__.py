"""The whole Redis protocol between the web and the model servers, both sides of it.

Every key begins with IMAGE_QUEUE, here `image_queue`. Values are JSON, never pickle.

key                              type         holds
image_queue                      list         jobs that wait: RPUSH by the web, taken from the head, first in, first out
image_queue:taken:<server>       list         jobs that a model server has taken and not yet answered, in that order
image_queue:server:<server>      string, TTL  heartbeat of a model server: what it serves
image_queue:result:<id>          list, TTL    the one answer to a job; a list, so that the wait for it can block
image_queue:accepted:<id>        string, TTL  the job was pushed and has no answer yet: it is not pushed again
image_queue:shape                string, TTL  {"shape", "server"}: which images the model takes, by the last heartbeat
image_queue:limit:...            string, TTL  how many requests a client has made, by Flask-Limiter (access.py)

A job is      {"id", "image" (base64), "deadline" (unix seconds)}, and where they are not the default "request" (the id
              that the client knows), "top" (predictions wanted), "crashes" (of servers that had it in flight),
              "shape" ([height, width, channels] of the pixels; else they are as the model takes them).
An answer is  {"predictions": [{"label", "probability"}, ...], "held_s" (since the take), "compute_s" and "batch" (the
              images) of its batch} or {"error": {"code", "message"}}.
A <server> is <slot>.<session>: the slot is the same when a model server is started again, the session is new each
time that it joins. A command that was held up on a dead connection and arrives late thus finds the taken list of a
session without a heartbeat, and what it takes is brought back, instead of being mixed into the batch of another.

Nothing is lost because somebody owns a job at each moment. Until its deadline the web does: after each broken
connection and each poll without an answer it asks whether Redis still has the job or its answer, and pushes the job
again if not. (redis-py reconnects silently, so a poll may reach another Redis than the push did.) In the queue it is
Redis'.
While it is computed it is in the taken list of its server, and when that server's heartbeat stops, any other server, or
the same one started again, puts it back at the head of the queue. A job may be computed twice, which is harmless: the
web takes the first answer, and the second expires.

A job that was in flight when a server died may be what killed it, so it is then computed alone. Alone at a second
crash, it goes to the end of the queue, so that those from its first batch do not wait for it, and at a third it is
answered `model_failed`. Two would find it out as surely, but a server may be killed from outside, and again as soon as
it is back: that must not cost an innocent image its answer.

The web asks once a second which images the model takes. One that is queued in another shape, before the web knew or
before another model took the place of the first, is resized by the model server, so that a change of models loses none.

The clocks of the machines need not agree. Redis measures the life of a job: its mark is set in the same transaction as
the push and expires when the web gives up. A model server asks for what is left of it when it takes the job, and counts
on from there. Only a job without a mark, pushed by a tool that sets none, answered already or expired, is judged by its
`deadline` and this machine's clock.
"""

import hashlib
import json
import logging
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from threading import Condition, Lock
from typing import IO, Any, Self, cast

import numpy as np
import orjson
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

import settings
from helpers import USUAL_SHAPE, Pixels, ServiceError, Shape, StartupError, as_shape, pauses
from image_queue.connection import (
    MOST_CONNECTIONS,
    SPARE_CONNECTIONS,
    QueuePool,
    UnusableRedis,
    address_of,
    connect,
    fault_of,
    info_of_primary,
    risks_of,
    share_of_connections,
    unfitness,
)

log = logging.getLogger(__name__)

Answer = dict[str, Any]
CountJobs = Callable[[str, int], None]  # told what happens to how many jobs, by one word

IMAGES_REFUSED = "images are refused"
KILLED = "The model server died each time that it had this image; send another."
MOST_CRASHES = 3  # as the text above says why

# Seconds that an answer outlives its deadline: the web polls until then, and Redis forgets it for us.
RESULT_GRACE = 2
# Seconds that a job lives at most, whatever its mark or its deadline say: far above the longest REQUEST_TIMEOUT.
LONGEST_LIFE = 3600
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ID_IN_RUBBISH = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,64})"')
# Bytes of a job beyond its pixels, generously. A longer entry is rubbish, of which only the beginning is looked at:
# the id may be in it.
ENVELOPE = 1000
BEGINNING = 200
# Of the largest image that a job may have besides the model's own: what the largest of keras.applications takes, so
# that what was queued for one model can be given to another.
LARGEST_SHAPE: Shape = (600, 600, 3)
# Seconds between a web process's looks at which images the model takes, and for how long that is remembered without a
# model server.
LOOK_EVERY = 1.0
SHAPE_TTL = 86400

# An image in a script costs Redis 0.2 ms, as Lua copies it, and in a plain command a tenth of that. So scripts are for
# what plain commands can't do: several steps in one, or any at all when Redis is out of memory.
TAKE = """#!lua flags=allow-oom
local jobs = {}
for i = 1, tonumber(ARGV[1]) do
    local job = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
    if not job then break end
    jobs[i] = job
end
return jobs
"""

# What is left of the life of each job, by its mark, in whole seconds: -2 without a mark. TTL and not PTTL, which the
# users of a Redis with rights (docs/operations.md) have not been given.
LIVES = """#!lua flags=no-writes
local lives = {}
for i, mark in ipairs(KEYS) do lives[i] = redis.call('TTL', mark) end
return lives
"""
ROUNDING = 0.5  # seconds that TTL may round down

# A plain SET is refused when Redis is out of memory, and then nobody would be alive to take jobs out of it.
BEAT = """#!lua flags=allow-oom
local beat = redis.call('SET', KEYS[1], unpack(ARGV, 3))
if beat and KEYS[2] then redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2]) end
return beat
"""

# A server whose heartbeat lapsed may have lost its taken list to another one, so the head of the list need not be the
# batch that it answers: its answers stand, but the list is left alone.
ANSWER = """#!lua flags=allow-oom
for i = 3, #KEYS, 2 do
    redis.call('DEL', KEYS[i], KEYS[i + 1])
    redis.call('RPUSH', KEYS[i], ARGV[i - 1])
    redis.call('PEXPIRE', KEYS[i], ARGV[i])
end
local alive = redis.call('EXISTS', KEYS[2])
if alive == 1 then redis.call('LTRIM', KEYS[1], ARGV[1], -1) end
return alive
"""

# Back to where they came from, in order: the last of what was taken goes first.
REQUEUE = """#!lua flags=allow-oom
for i = 1, tonumber(ARGV[1]) do
    if not redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') then break end
end
"""

# Several servers may find the same dead one: whoever comes second finds its list gone. First come the answers, then the
# jobs for the head of the queue, then those for its end.
RECLAIM = """#!lua flags=allow-oom
if redis.call('LLEN', KEYS[2]) ~= tonumber(ARGV[1]) then return 0 end
for i = 3, #KEYS, 2 do
    redis.call('DEL', KEYS[i], KEYS[i + 1])
    redis.call('RPUSH', KEYS[i], ARGV[i])
    redis.call('PEXPIRE', KEYS[i], ARGV[i + 1])
end
local first = #KEYS + 1
local last = first + tonumber(ARGV[2])
for i = last - 1, first, -1 do redis.call('LPUSH', KEYS[1], ARGV[i]) end
for i = last, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('DEL', KEYS[2])
return 1
"""
ALL = 1_000_000  # more than any server has taken


class QueueFull(ServiceError):
    """MAX_QUEUE jobs wait already."""

    status, code = 503, "queue_full"


class RedisDown(ServiceError):
    """Redis did not answer for REDIS_TIMEOUT, so the job could not be queued."""

    status, code = 503, "redis_down"


class NoModelServer(ServiceError):
    """Nothing computes, and no more can be queued."""

    status, code = 503, "no_model_server"


class ResultTimeout(ServiceError):
    """The job was queued, and its deadline passed without an answer."""

    status, code = 504, "timeout"


class HeartbeatExpired(Exception):
    """The heartbeat lapsed, so others may have taken what this server had; it must join again."""


@dataclass
class Job:
    """One image on its way.

    `image` is base64 text, `deadline` unix seconds, `request` the id that the client knows, `top` how many predictions
    are wanted (0: as many as TOP says), `crashes` how many servers it saw die, `shape` what the pixels have (None: what
    the model takes), `taken` time.monotonic() of the parsing, `life` the seconds that somebody waited for the answer
    from then on (None: Redis had no mark of the job).
    """

    id: str
    image: str
    deadline: float
    request: str = ""
    top: int = 0
    crashes: int = 0
    shape: Shape | None = None
    taken: float = field(default_factory=time.monotonic, compare=False)
    life: float | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, raw: bytes | str) -> "Job":
        """Return the job that `raw` holds. Raises ValueError when there is no id to answer to.

        Where there is one and the rest is wrong, the job has no image, so that it is answered with an error in its
        turn like any image that can't be decoded.
        """
        try:
            fields = orjson.loads(raw)
            if not ID.fullmatch(fields["id"]):
                raise ValueError("bad id")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            beginning = raw[:BEGINNING] if isinstance(raw, bytes) else raw[:BEGINNING].encode()
            found = ID_IN_RUBBISH.search(beginning)
            if not found:
                raise ValueError(f"not a job with an id ({type(error).__name__})") from error
            fields = {"id": found[1].decode()}
        image, deadline, request = fields.get("image"), fields.get("deadline"), fields.get("request", "")
        top, crashes = fields.get("top", 0), fields.get("crashes", 0)
        timed = isinstance(deadline, int | float)
        counted = _is_count(top) and _is_count(crashes)
        shape = as_shape(fields.get("shape"))
        shaped = shape or "shape" not in fields  # the web was older
        if isinstance(image, str) and isinstance(request, str) and counted and timed and shaped:
            return cls(fields["id"], image, deadline, request, top, crashes, shape)
        return cls(fields["id"], "", time.time() + RESULT_GRACE)

    def dump(self) -> bytes:
        """Return the JSON that goes onto the queue."""
        given = {"request": self.request, "top": self.top, "crashes": self.crashes, "shape": self.shape}
        more = {name: value for name, value in given.items() if value}
        return orjson.dumps({"id": self.id, "deadline": self.deadline, **more, "image": self.image})

    @property
    def remaining(self) -> float:
        """Seconds for which somebody still waits for the answer; 0 or less when nobody does any more."""
        if self.life is None:
            return min(self.deadline - time.time(), LONGEST_LIFE)
        return min(self.taken + self.life - time.monotonic(), LONGEST_LIFE)

    @property
    def expired(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.remaining <= 0


class KeptJob:
    """What goes onto the queue for a job, kept to be pushed again if need be.

    Hundreds wait for their answers at once: once pushed, in a file without a name and not in the memory of the process.
    """

    def __init__(self, job: Job) -> None:
        self._content = job.dump()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def put_away(self) -> None:
        """Move it from the memory to the file; where the disk is full it stays in the memory."""
        if self._file:
            return
        with suppress(OSError):
            file = TemporaryFile(buffering=0)  # noqa: SIM115 - __exit__ closes it
            if file.write(self._content) == len(self._content):
                self._file, self._content = file, b""

    def read(self) -> bytes:
        """Return it, wherever it is."""
        if not self._file:
            return self._content
        self._file.seek(0)
        return self._file.read()


@dataclass
class Batch:
    """What was taken together.

    `entries` is its length in the taken list, where expired jobs and rubbish count too; `images` are those of the
    `jobs`, decoded, or None where that failed.
    """

    jobs: list[Job] = field(default_factory=list)
    entries: int = 0
    images: list[Pixels | None] = field(default_factory=list)

    def __iadd__(self, later: "Batch") -> "Batch":
        self.jobs += later.jobs
        self.entries += later.entries
        self.images += later.images
        return self

    def drop_expired(self) -> int:
        """Forget the jobs that nobody waits for any more, and say how many; their entries stay until the answer."""
        before = len(self.jobs)
        kept = [pair for pair in zip(self.jobs, self.images, strict=True) if not pair[0].expired]
        self.jobs = [job for job, _ in kept]
        self.images = [image for _, image in kept]
        return before - len(kept)

    @property
    def suspect(self) -> bool:
        """Whether this is a job that was in flight when a server died: it is computed alone."""
        return any(job.crashes for job in self.jobs)


class ImageQueue:
    """What both sides need: the keys, the connection, and who is alive."""

    def __init__(self, count: CountJobs = lambda event, times: None) -> None:
        """Connect when first needed. `count` is told of jobs for metrics.

        The web's are queued and retried (pushed again); a model server's taken, expired, recovered from a server that
        died, given_up (they killed too many) and dropped (rubbish).
        """
        self.count = count
        self.redis = connect()
        self.key = settings.IMAGE_QUEUE
        self.unfit = False  # this and the next are what check() found last
        self.risks: list[str] = []  # each in words that follow the name of the Redis
        self._complained: dict[str, float] = {}
        self._complaining = Lock()

    def taken_key(self, server: str) -> str:
        """Name of the list of jobs that `server` has taken."""
        return f"{self.key}:taken:{server}"

    def server_key(self, server: str) -> str:
        """Name of the heartbeat of `server`."""
        return f"{self.key}:server:{server}"

    def result_key(self, job_id: str) -> str:
        """Name of the list that the answer to a job goes to."""
        return f"{self.key}:result:{job_id}"

    def accepted_key(self, job_id: str) -> str:
        """Name of the mark that a job was pushed."""
        return f"{self.key}:accepted:{job_id}"

    @property
    def shape_key(self) -> str:
        """Name of what the last heartbeat said of the images that the model takes."""
        return f"{self.key}:shape"

    @property
    def address(self) -> str:
        """Where Redis is, for people: never with the password."""
        return address_of(self.redis)

    @property
    def pool(self) -> QueuePool:
        """The connections of this process."""
        return cast(QueuePool, self.redis.connection_pool)

    def live_servers(self) -> dict[str, dict[str, Any]]:
        """Return what each live model server says of itself, by its name. Raises RedisError."""
        keys = sorted(self.redis.scan_iter(self.server_key("*"), count=1000))
        beats = self.redis.mget(keys) if keys else []
        return {_last_part(key): _about(beat) for key, beat in zip(keys, beats, strict=True) if beat}

    def waiting(self) -> int:
        """Return the number of jobs that wait. Raises RedisError."""
        return self.redis.llen(self.key)

    def check(self) -> None:
        """Find out whether this Redis can be used, and into `risks` what of it may still cost requests.

        Raises UnusableRedis when the service can never work with it, NotPrimary while it is a replica, and RedisError when
        it does not answer or refuses a write.
        """
        info = info_of_primary(self.redis)
        fault = unfitness(info)
        self.unfit = bool(fault)
        if fault:
            raise UnusableRedis(self.address, fault)
        self._share_connections(share_of_connections(info))
        self.redis.delete(f"{self.key}:never")  # changes nothing, and is refused where other writes would be
        self.risks = risks_of(info)

    def warn(self) -> None:
        """Log what check() found that may cost requests, once in each process."""
        for risk in self.risks:
            _warn_once(f"Redis at {self.address} {risk}.")

    def _share_connections(self, share: int) -> None:
        """Learn how many images of this process may wait for answers at once."""

    def log_redis_error(self, error: Exception, pause: float, then: str = "") -> None:
        """Log what is wrong with Redis: one line per attempt, and one for all threads that attempt at once.

        `then` says what follows where that is not another attempt after `pause` seconds.
        """
        with self._complaining:
            if time.monotonic() < self._complained.get(then, 0.0) + pause / 2:
                return
            self._complained[then] = time.monotonic()
        then = then or "trying again" + (f" in {pause:.1f} s" if pause else "")
        reason = "" if isinstance(error, UnusableRedis) else f" ({_reason(error)})"
        log.warning("Redis at %s %s%s; %s", self.address, fault_of(error), reason, then)


class WebQueue(ImageQueue):
    """The web's side: hand in an image, get its answer."""

    def __init__(self, count: CountJobs = lambda event, times: None) -> None:
        super().__init__(count)
        self._full = False  # when last an image was pushed
        self._shape = USUAL_SHAPE  # which images the model takes, as far as we know
        self._next_look = 0.0  # time.monotonic() from which it is to be looked up again
        self._looking = Lock()
        self._most = MOST_CONNECTIONS  # images that may wait for answers at once, each on a connection of its own
        self._asking = 0  # images that do
        self._one_less = Condition()

    def shape(self) -> Shape:
        """Return which images are wanted, (height, width, channels): as IMAGE_* say, or else as the model takes them.

        Whoever comes first LOOK_EVERY after the last look asks Redis. Others go on with what was known, or wait as long
        for him where that is older than twice LOOK_EVERY, as it is after a quiet time. Without Redis nothing changes.
        """
        late = time.monotonic() - self._next_look
        if late >= 0 and not settings.image_is_set():
            self._look(LOOK_EVERY if late > LOOK_EVERY else 0.0)
        return settings.image_shape(self._shape)

    def _look(self, patience: float) -> None:
        if not self._looking.acquire(timeout=patience):
            return
        try:
            if time.monotonic() >= self._next_look:
                with suppress(RedisError):
                    self._shape = self._served_shape() or self._shape
                self._next_look = time.monotonic() + LOOK_EVERY
        finally:
            self._looking.release()

    def _served_shape(self) -> Shape | None:
        """Return the shape that a live model server takes, or else that the last one took. Raises RedisError."""
        last = _about(self.redis.get(self.shape_key) or b"")
        shape, server = as_shape(last.get("shape")), last.get("server")
        if isinstance(server, str) and self.redis.exists(self.server_key(server)):
            return shape
        # It may be one that is yet to be upgraded. To look at them all each time would go over every key of the Redis.
        live = [as_shape(about.get("shape")) for about in self.live_servers().values()]
        return next(filter(None, live), shape)

    def ask(self, image: str, deadline: float, request: str = "", top: int = 0, shape: Shape | None = None) -> Answer:
        """Queue `image` (base64 text) and return its answer, at the latest at `deadline` (unix seconds).

        `request` is the id that the client knows, `top` the number of predictions that it wants (0: as many as TOP),
        `shape` what the pixels have (None: what the model takes).

        Raises QueueFull, NoModelServer and RedisDown when the job was not accepted, ResultTimeout when it was.
        """
        until = time.monotonic() + deadline - time.time()  # a clock that is set meanwhile changes nothing
        job_id = uuid.uuid4().hex
        with KeptJob(Job(job_id, image, deadline, request, top, shape=shape)) as job:
            del image
            if self.unfit:
                self._refuse_unfit()
            with self._connection_for(job, until):
                return self._ask(job_id, job, until)

    def _refuse_unfit(self) -> None:
        """Raise RedisDown if Redis can't be used at all, and has not been replaced: to wait would be of no use."""
        try:
            self.check()
        except UnusableRedis as error:
            self.log_redis_error(error, 60, IMAGES_REFUSED)
            raise RedisDown("The queue can't be used as it is set up, so tell the operator of the service.") from None
        except RedisError:
            pass  # it may be back soon

    @contextmanager
    def _connection_for(self, job: KeptJob, until: float) -> Iterator[None]:
        """Wait until another image may use a connection, at most REDIS_TIMEOUT. Raises QueueFull."""
        patience = min(until - time.monotonic(), settings.REDIS_TIMEOUT)
        with self._one_less:
            if self._asking >= self._most:
                job.put_away()
            if not self._one_less.wait_for(lambda: self._asking < self._most, patience):
                raise QueueFull("Redis has no connection free for another image, so try again in a few seconds.")
            self._asking += 1
        try:
            yield
        finally:
            with self._one_less:
                self._asking -= 1
                self._one_less.notify()

    def _share_connections(self, share: int) -> None:
        with self._one_less:
            self._most = share
            self._one_less.notify_all()
        self.pool.max_connections = share + SPARE_CONNECTIONS
        self.pool.close_idle(share)

    def _ask(self, job_id: str, job: KeptJob, until: float) -> Answer:
        give_up = min(until, time.monotonic() + settings.REDIS_TIMEOUT)
        tried = accepted = False
        error: RedisError | None = None
        pause = pauses()
        while time.monotonic() < (until if accepted else give_up):
            try:
                # What was pushed may be in a Redis that is no more, and its answer may have gone to a dead connection.
                if not (tried and self._known(job_id)):
                    again, tried = tried, True
                    self._push(job_id, job.read(), until, unlimited=accepted)
                    self.count("retried" if again else "queued", 1)
                accepted = True
                job.put_away()
                answer = self._poll(job_id, until)
                if answer is not None:
                    return answer
                if error:  # it is over, and the next one has pauses of its own
                    error, pause = None, pauses()
            except RedisError as problem:
                if isinstance(problem, ResponseError) and not accepted:
                    self._refuse_unfit()
                error = problem
                seconds = next(pause)
                self.log_redis_error(problem, seconds)
                time.sleep(min(seconds, max(0.0, until - time.monotonic())))
        if not accepted:
            raise RedisDown("The queue can't be reached now, so try again in a few seconds.")
        with suppress(RedisError):  # to make room: without a model server nobody else drops what has expired
            self._remove(job_id, job.read(), from_end=False)
        raise ResultTimeout(self._why_late(error))

    def _known(self, job_id: str) -> bool:
        """Whether Redis has the job or its answer."""
        return bool(self.redis.exists(self.accepted_key(job_id), self.result_key(job_id)))

    def _push(self, job_id: str, job: bytes, until: float, *, unlimited: bool) -> None:
        most = math.inf if unlimited else settings.MAX_QUEUE
        try:
            room = not (self._full and self.waiting() >= most) and self._append(job_id, job, until, most)
        except OutOfMemoryError as error:
            if unlimited:
                raise  # was promised an answer, so it goes on trying
            self.log_redis_error(error, 1, IMAGES_REFUSED)
            raise QueueFull("Redis has no memory for another image, so try again in a few seconds.") from error
        if not room:
            if self.live_servers():
                raise QueueFull(f"{settings.MAX_QUEUE} images wait already, so try again in a few seconds.")
            raise NoModelServer("The queue is full and no model server is alive, so try again when one is started.")

    def _append(self, job_id: str, job: bytes, until: float, most: float) -> bool:
        """Append the job and return True; False when it turned out to be more than `most`, and was not yet taken."""
        ttl = max(1, math.ceil((until - time.monotonic()) * 1000))
        with self.redis.pipeline(transaction=True) as together:
            together.rpush(self.key, job)
            together.set(self.accepted_key(job_id), "", px=ttl)
            length, _ = together.execute()
        self._full = length > most
        return not (self._full and self._remove(job_id, job, from_end=True))

    def _remove(self, job_id: str, job: bytes, *, from_end: bool) -> bool:
        """Take the job out of the queue again; return whether it was still there."""
        found = bool(self.redis.lrem(self.key, -1 if from_end else 1, cast(str, job)))
        if found:
            self.redis.delete(self.accepted_key(job_id))
        return found

    def _poll(self, job_id: str, until: float) -> Answer | None:
        # Not 0, which would block for ever.
        seconds = min(settings.CLIENT_SLEEP, max(0.01, until - time.monotonic()))
        reply = self.redis.blpop([self.result_key(job_id)], seconds)
        return None if reply is None else cast(Answer, json.loads(reply[1]))

    def _why_late(self, error: RedisError | None) -> str:
        waited = f"No answer came within {settings.REQUEST_TIMEOUT:g} seconds"
        try:
            alive = error is None and bool(self.live_servers())
        except RedisError as problem:
            error = problem
        if error:
            return f"{waited}, because the queue can't be reached; try again later."
        if not alive:
            return f"{waited}, because no model server is alive; try again when one is started."
        return f"{waited}, because the model servers are busy; try again later."


class ServerQueue(ImageQueue):
    """A model server's side: join, take batches, answer them, leave.

    Not for several threads, but for take(), which one other thread may call while a batch is computed.
    """

    def __init__(self, about: dict[str, Any], ttl: float, count: CountJobs = lambda event, times: None) -> None:
        """Claim a name. `about` is what the heartbeat says of the server, `ttl` seconds its life without a beat."""
        super().__init__(count)
        self.about = about
        self.ttl = ttl
        self._held, self.slot = claim_slot(self.key)
        self._begin_session()
        self._take = self.redis.register_script(TAKE)
        self._lives = self.redis.register_script(LIVES)
        self._beat = self.redis.register_script(BEAT)
        self._answer = self.redis.register_script(ANSWER)
        self._return = self.redis.register_script(REQUEUE)
        self._reclaim = self.redis.register_script(RECLAIM)
        self._next_beat = 0.0
        self._shape = as_shape(about.get("shape"))
        self._longest_job = longest_job(self._shape or USUAL_SHAPE)

    def join(self) -> None:
        """Put back what this process had taken, and what one that died in its place had; then be alive.

        Raises RedisError, and StartupError when this Redis can't be used or another model is served on this queue: half of
        the answers would be wrong.
        """
        self.check()
        self.warn()
        self._refuse_other_models()
        self.leave()
        self._begin_session()
        for dead in self.redis.scan_iter(self.server_key(f"{self.slot}.*"), count=1000):
            self.redis.delete(dead)
        self.reclaim()
        self._renew()

    def leave(self) -> None:
        """Put back what was taken and not computed, and be gone at once. Raises RedisError."""
        self._requeue(ALL)
        self.redis.delete(self.heartbeat)

    def beat(self) -> None:
        """Renew the heartbeat when a fifth of its life is over, and bring back the jobs of servers that died.

        Raises HeartbeatExpired when the heartbeat had lapsed, RedisError.
        """
        if time.monotonic() < self._next_beat:
            return
        self._renew("XX")
        self.reclaim()

    def reclaim(self) -> None:
        """Put the jobs of every server without a heartbeat back at the head of the queue. Raises RedisError."""
        for key in self.redis.scan_iter(self.taken_key("*"), count=1000, _type="list"):
            server = _last_part(key)
            if server != self.name and not self.redis.exists(self.server_key(server)):
                self._reclaim_from(server)

    def take(self, most: int, wait: float = 0, *, ahead: bool = False) -> Batch:
        """Move up to `most` jobs from the queue to the taken list and return them. Raises RedisError.

        Blocks up to `wait` seconds for the first job, and not at all for more. Expired jobs and rubbish are dropped.
        Suspects come alone, and never when taking `ahead`, that is while another batch is computed: if that one killed
        the server, they would be blamed.
        """
        raw = self._move(most, wait)
        parsed = self._jobs(raw)
        keep = self._before_suspect(parsed, ahead=ahead)
        if keep < len(raw):
            self._requeue(len(raw) - keep)
        jobs = [job for job in parsed[:keep] if job]
        wanted = [job for job in jobs if not job.expired]
        self.count("taken", len(wanted))
        self.count("expired", len(jobs) - len(wanted))
        return Batch(wanted, keep)

    def answer(self, jobs: list[Job], answers: Iterable[Answer], entries: int) -> None:
        """Hand out the `answers` to `jobs`, one each in the same order, and forget the batch, in one transaction.

        The batch is the first `entries` of the taken list. Raises ValueError when there are more or fewer answers than
        jobs, HeartbeatExpired when the heartbeat had lapsed (the answers were handed out all the same), RedisError.
        """
        keys, args = [self.taken, self.heartbeat], [str(entries)]
        for job, answer in zip(jobs, answers, strict=True):
            keys += [self.result_key(job.id), self.accepted_key(job.id)]
            args += [json.dumps(answer, allow_nan=False), str(_ttl(job))]
        if not self._answer(keys, args):
            raise HeartbeatExpired

    def _refuse_other_models(self) -> None:
        mine = (self.about["model"], self.about["weights"])
        for name, about in self.live_servers().items():
            theirs = (about.get("model"), about.get("weights"))
            if name.rpartition(".")[0] != self.slot and theirs != mine:
                raise StartupError(
                    f"Model server {name} serves {theirs[0]} ({theirs[1]}) on the queue {self.key}: stop it, or set "
                    f"IMAGE_QUEUE to another name for {mine[0]} ({mine[1]})."
                )

    def _move(self, most: int, wait: float) -> list[bytes]:
        with self.redis.pipeline(transaction=False) as together:
            if wait:
                together.blmove(self.key, self.taken, cast(int, wait), "LEFT", "RIGHT")
            together.llen(self.key)
            *first, waiting = together.execute(raise_on_error=False)
            if isinstance(waiting, RedisError):
                raise waiting
            for _ in range(min(most - len(first), waiting)):
                together.lmove(self.key, self.taken, "LEFT", "RIGHT")
            replies = first + together.execute(raise_on_error=False)
        moved = [reply for reply in replies if isinstance(reply, bytes)]
        refused = [reply for reply in replies if isinstance(reply, RedisError)]
        if moved or not refused:
            return moved
        if isinstance(refused[0], OutOfMemoryError):  # it refuses every write, though moving needs no memory
            return list(self._take([self.key, self.taken], [most]))
        raise refused[0]

    def _before_suspect(self, parsed: list[Job | None], *, ahead: bool) -> int:
        """Return how many of the entries may be computed together."""
        first = next((i for i, job in enumerate(parsed) if job and job.crashes and not job.expired), None)
        if first is None:
            return len(parsed)
        return first or (0 if ahead else 1)

    def _requeue(self, count: int) -> None:
        self._return([self.key, self.taken], [count])

    def _reclaim_from(self, dead: str) -> None:
        """Mark what `dead` had in flight and put it back, but answer what was in flight at a crash before."""
        taken = self.taken_key(dead)
        entries = self.redis.lrange(taken, 0, -1)
        jobs = [job for job in self._jobs(entries) if job and not job.expired]
        jobs = [replace(job, crashes=job.crashes + 1) for job in jobs]
        killers = [job for job in jobs if job.crashes >= MOST_CRASHES]
        first = [job.dump() for job in jobs if job.crashes == 1]
        last = [job.dump() for job in jobs if 1 < job.crashes < MOST_CRASHES]
        answers = [part for job in killers for part in (json.dumps(failed(KILLED)), _ttl(job))]
        keys = [self.key, taken]
        for job in killers:
            keys += [self.result_key(job.id), self.accepted_key(job.id)]
        if entries and self._reclaim(keys, [len(entries), len(first), *answers, *first, *last]):
            back = len(first) + len(last)
            self.count("recovered", back)
            self.count("given_up", len(killers))
            log.warning("%s died: %d images go back to the queue, %d are given up", dead, back, len(killers))

    def _begin_session(self) -> None:
        self.name = f"{self.slot}.{uuid.uuid4().hex[:8]}"
        self.taken = self.taken_key(self.name)
        self.heartbeat = self.server_key(self.name)

    def _renew(self, *condition: str) -> None:
        """Write the heartbeat; with the condition "XX" only over one that is there. Raises HeartbeatExpired, RedisError."""
        keys = [self.heartbeat, self.shape_key] if self._shape else [self.heartbeat]
        shape = json.dumps({"shape": self._shape, "server": self.name})
        beat = [json.dumps(self.about), "PX", str(int(self.ttl * 1000)), *condition]
        if not self._beat(keys, [shape, str(SHAPE_TTL), *beat]):
            raise HeartbeatExpired
        self._next_beat = time.monotonic() + self.ttl / 5

    def _jobs(self, entries: Sequence[bytes | str]) -> list[Job | None]:
        """Return the jobs, each with what is left of its life; None for rubbish. Raises RedisError."""
        parsed = [self._parse(entry) for entry in entries]
        jobs = [job for job in parsed if job]
        lives = self._lives([self.accepted_key(job.id) for job in jobs]) if jobs else []
        for job, seconds in zip(jobs, lives, strict=True):
            job.life = seconds + ROUNDING if seconds >= 0 else None
        return parsed

    def _parse(self, raw: bytes | str) -> Job | None:
        try:
            return Job.parse(raw if len(raw) <= self._longest_job else raw[:BEGINNING])
        except ValueError as error:
            log.error("dropped %d bytes from the queue: %s", len(raw), error)
            self.count("dropped", 1)
            return None


def failed(message: str) -> Answer:
    """Return the answer to a job that the model could not compute."""
    return {"error": {"code": "model_failed", "message": message}}


def longest_job(own: Shape) -> int:
    """Return the bytes that a job may have: an image as base64, `own` or the largest other one, and what is around."""
    pixels = max(math.prod(own), math.prod(LARGEST_SHAPE))
    return ENVELOPE + 4 * -(-pixels * np.dtype(settings.IMAGE_DTYPE).itemsize // 3)


def claim_slot(key: str) -> tuple[socket.socket, str]:
    """Return a slot for this model server that no live one has, and the socket that holds it.

    The slot is the same when a server is started again after a crash, so that it finds the jobs that it had taken
    without waiting for its heartbeat to lapse. Its name has the host's, a mark of this boot and network namespace, and
    the lowest number that is free: a socket bound in Linux' abstract namespace, which the kernel frees however the
    process ends, and which leaves no file.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    namespace = os.stat("/proc/self/ns/net").st_ino
    mark = hashlib.sha256(f"{boot}{namespace}".encode()).hexdigest()[:6]
    for number in range(1000):
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0keras-rest-api/{_redis_mark()}/{key}/{number}")
        except OSError:
            held.close()
            continue
        return held, f"{re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname())}-{mark}-{number}"
    raise StartupError("1000 model servers of this queue run on this host: no name is left.")


def _redis_mark() -> str:
    where = settings.REDIS_URL or f"{settings.REDIS_HOST}:{settings.REDIS_PORT}/{settings.REDIS_DB}"
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def _about(beat: bytes | str) -> dict[str, Any]:
    """Return what a heartbeat says; nothing where somebody wrote rubbish there."""
    try:
        about = json.loads(beat)
    except (ValueError, RecursionError):
        about = None
    return about if isinstance(about, dict) else {}


def _last_part(key: bytes) -> str:
    return key.decode("utf-8", "replace").rpartition(":")[2]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _ttl(job: Job) -> int:
    return int(1000 * (max(0.0, job.remaining) + RESULT_GRACE))


@cache
def _warn_once(line: str) -> None:
    """Log the warning, unless this process has."""
    log.warning("%s", line)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".").splitlines()[0]
