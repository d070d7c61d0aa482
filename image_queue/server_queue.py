"""The model server's side of the queue."""

import json
import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import orjson
from redis.exceptions import OutOfMemoryError

import settings
from helpers import USUAL_SHAPE, as_shape, default_model
from image_queue.base import CountJobs, ImageQueue, server_of
from image_queue.errors import HeartbeatExpired
from image_queue.intake import Intake
from image_queue.job import MALFORMED_PREFIX, Answer, Batch, Job, failed, max_job_bytes
from image_queue.models import KNOWN_FOR, list_key, marker_key, own_key, queue_key
from image_queue.slots import claim_slot

log = logging.getLogger(__name__)

# Lua copies its arguments and results, so an image takes Redis 0.2 ms in a script and a tenth of that in a plain
# command. Scripts are only for what plain commands can't do: several steps at once, or writing when out of memory.
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.lua")}
ALL = 1_000_000  # more jobs than any server has taken
# A job that was in flight when a server died may be the cause, so it is computed alone from then on. After the second
# crash it goes to the end of the queue, so that the others of its first batch do not wait for it. It is given up only
# after the third: a server may also be killed from outside twice, which must not cost an innocent image its answer.
MAX_CRASHES = 3
CRASHED = "The model server crashed each time it had this image, so send another one."
TTL_ROUNDING = 0.5  # seconds by which TTL may round down


class ServerQueue(ImageQueue):
    """Joins the queue as a model server, takes batches, answers them and leaves.

    Only one thread may use it, except that a second one may call take() while a batch is computed.
    """

    def __init__(self, about: dict[str, Any], ttl: float, count: CountJobs = lambda event, times: None) -> None:
        """Claim a slot. `about` is the content of the heartbeat, `ttl` the seconds until it expires.

        Raises StartupError if no model may have this name.
        """
        super().__init__(count, queue_key(about["model"]))
        self.about = about
        self.ttl = ttl
        self._slot_socket, self.slot = claim_slot(self.key)
        self._begin_session()
        self._scripts = {name: self.redis.register_script(text) for name, text in SCRIPTS.items()}
        self._next_beat = 0.0
        self._shape = as_shape(about.get("shape"))
        self._max_job_bytes = max_job_bytes(self._shape or USUAL_SHAPE)
        self._intake = Intake(self.pool, self._max_job_bytes)

    def join(self) -> None:
        """Requeue the jobs that earlier sessions of this slot took but did not answer, and begin a new session.

        Raises RedisError, UnusableRedis.
        """
        self.check()
        self.warn()
        self._share_queue()
        self.leave()
        self._begin_session()
        for dead in self.redis.scan_iter(self.server_key(f"{self.slot}.*"), count=1000):
            self.redis.delete(dead)
        self.reclaim()
        self._renew()

    def leave(self) -> None:
        """Requeue the jobs that were taken but not answered, and delete the heartbeat. Raises RedisError."""
        self._requeue(ALL)
        self.redis.delete(self.heartbeat)

    def beat(self) -> None:
        """Renew the heartbeat if a fifth of its TTL has passed, and reclaim the jobs of dead servers.

        Raises HeartbeatExpired if it had expired already, RedisError.
        """
        if time.monotonic() < self._next_beat:
            return
        self._renew("XX")
        self.reclaim()

    def reclaim(self) -> None:
        """Requeue the jobs of every server without a heartbeat. Raises RedisError."""
        for key in self.redis.scan_iter(self.taken_key("*"), count=1000, _type="list"):
            server = server_of(key)
            if server != self.name and not self.redis.exists(self.server_key(server)):
                self._reclaim_from(server)

    def take(
        self, most: int, wait: float = 0, *, ahead: bool = False, place: Callable[[Job], int | None] = lambda job: None
    ) -> Batch:
        """Move up to `most` jobs from the queue to the taken list and return them. Raises RedisError.

        Blocks up to `wait` seconds for the first job only. Drops expired and malformed jobs. A suspect is returned
        alone. `ahead` means that another batch is being computed; then a suspect stays in the queue, because it would
        be blamed if that batch killed the server.

        `place` puts the pixels of a job into the array of the batch, and returns the row. It is called for each job as
        soon as it arrives, which is faster than to collect the jobs first.
        """
        parsed: list[Job | None] = []
        rows: list[int | None] = []
        with closing(self._move(most, wait)) as entries:
            for entry in entries:
                job = self._parse(entry)
                parsed.append(job)
                rows.append(place(job) if job else None)
        self._read_ttls([job for job in parsed if job])
        kept = self._length_of_batch(parsed, ahead=ahead)
        if kept < len(parsed):
            self._requeue(len(parsed) - kept)
        jobs = [(job, row) for job, row in zip(parsed[:kept], rows, strict=False) if job]
        live = [(job, row) for job, row in jobs if not job.expired]
        self.count("taken", len(live))
        self.count("expired", len(jobs) - len(live))
        return Batch([job for job, _ in live], kept, [row for _, row in live])

    def answer(self, jobs: list[Job], answers: Iterable[Answer], entries: int) -> None:
        """Publish the answer to each of `jobs`, and remove the first `entries` of the taken list, atomically.

        Raises ValueError if the numbers of answers and jobs differ, HeartbeatExpired if the heartbeat has expired (the
        answers are published even then), RedisError.
        """
        keys, args = self._to_publish(jobs, answers)
        if not self._scripts["answer"]([self.taken, self.heartbeat, *keys], [entries, *args]):
            raise HeartbeatExpired

    def _share_queue(self) -> None:
        """Move to a queue of our own if another model is served on the default queue, unless we are the default model.

        While the default model is replaced by another one, both are on its queue.
        """
        if self.key != settings.IMAGE_QUEUE:
            return
        live = {name: about.get("model") for name, about in self.live_servers().items()}
        others = {name: model for name, model in live.items() if name.rpartition(".")[0] != self.slot}
        other = next((name for name, model in others.items() if model != self.about["model"]), None)
        if other is None:
            return
        if default_model():
            log.warning("%s serves %s on the queue of the default model too", other, others[other])
            return
        self._slot_socket.close()
        self.key = own_key(self.about["model"])
        self._slot_socket, self.slot = claim_slot(self.key)
        log.info("%s serves %s, which is the default model", other, others[other])

    def _move(self, most: int, wait: float) -> Generator[memoryview]:
        """Move up to `most` entries from the queue to the taken list; yield each, valid until the next one."""
        try:
            yield from self._intake.move(self.key, self.taken, most, wait)
        except OutOfMemoryError:  # Redis rejects all plain writes then, but not this script
            entries: list[bytes] = self._scripts["take"]([self.key, self.taken], [most])
            for entry in entries:
                yield memoryview(entry)

    def _length_of_batch(self, parsed: list[Job | None], *, ahead: bool) -> int:
        """Return how many of the first entries may be computed together: all before a suspect, or one suspect."""
        first = next((i for i, job in enumerate(parsed) if job and job.crashes and not job.expired), None)
        if first is None:
            return len(parsed)
        return first or (0 if ahead else 1)

    def _requeue(self, count: int) -> None:
        self._scripts["requeue"]([self.key, self.taken], [count])

    def _reclaim_from(self, dead: str) -> None:
        """Requeue the jobs of the server `dead`, but give up those that were in flight at MAX_CRASHES crashes."""
        taken = self.taken_key(dead)
        entries = cast(list[bytes], self.redis.lrange(taken, 0, -1))
        parsed = [job for job in map(self._parse, entries) if job]
        self._read_ttls(parsed)
        jobs = [replace(job, crashes=job.crashes + 1) for job in parsed if not job.expired]
        given_up = [job for job in jobs if job.crashes >= MAX_CRASHES]
        head = [job.dump() for job in jobs if job.crashes == 1]
        end = [job.dump() for job in jobs if 1 < job.crashes < MAX_CRASHES]
        keys, answers = self._to_publish(given_up, [failed(CRASHED)] * len(given_up))
        args = [len(entries), len(head), *answers, *head, *end]
        if entries and self._scripts["reclaim"]([self.key, taken, *keys], args):
            requeued = len(head) + len(end)
            self.count("recovered", requeued)
            self.count("given_up", len(given_up))
            log.warning("%s died: %d images were requeued, %d were given up", dead, requeued, len(given_up))

    def _to_publish(self, jobs: list[Job], answers: Iterable[Answer]) -> tuple[list[str], list[bytes | int]]:
        """Return the KEYS and ARGV with which a script publishes the answers."""
        keys: list[str] = []
        args: list[bytes | int] = []
        for job, answer in zip(jobs, answers, strict=True):
            keys += [self.result_key(job.id), self.accepted_key(job.id)]
            args += [orjson.dumps(answer), job.answer_ttl]
        return keys, args

    def _begin_session(self) -> None:
        self.name = f"{self.slot}.{uuid.uuid4().hex[:8]}"
        self.taken = self.taken_key(self.name)
        self.heartbeat = self.server_key(self.name)

    def _renew(self, *options: str) -> None:
        """Write the heartbeat, with the option "XX" only if it has not expired. Raises HeartbeatExpired, RedisError."""
        model = self.about["model"]
        keys = [self.heartbeat, list_key(), marker_key(model), *([self.shape_key] if self._shape else [])]
        shape = json.dumps({"shape": self._shape, "server": self.name})
        entry = json.dumps({**self.about, "queue": self.key, "server": self.name})
        beat: list[str | int] = [json.dumps(self.about), "PX", int(1000 * self.ttl), *options]
        args: list[str | int] = [marker_key(""), model, entry, shape, KNOWN_FOR, *beat]
        if not self._scripts["beat"](keys, args):
            raise HeartbeatExpired
        self._next_beat = time.monotonic() + self.ttl / 5

    def _read_ttls(self, jobs: list[Job]) -> None:
        """Set the `ttl` of each of `jobs`. Raises RedisError."""
        ttls = self._scripts["ttls"]([self.accepted_key(job.id) for job in jobs]) if jobs else []
        for job, ttl in zip(jobs, ttls, strict=True):
            job.ttl = ttl + TTL_ROUNDING if ttl >= 0 else None

    def _parse(self, entry: bytes | memoryview) -> Job | None:
        try:
            return Job.parse(entry if len(entry) <= self._max_job_bytes else bytes(entry[:MALFORMED_PREFIX]))
        except ValueError as error:
            log.error("dropped %d bytes from the queue: %s", len(entry), error)
            self.count("dropped", 1)
            return None
