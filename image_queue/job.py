"""The format of jobs and answers, and the batch that a model server takes."""

import math
import re
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pybase64

import settings
from helpers import Shape, as_shape

Answer = dict[str, Any]

# Seconds that an answer outlives its deadline. The web polls until the deadline; then Redis deletes the answer.
RESULT_GRACE = 2
# The longest lifetime of a job in seconds, whatever its deadline: far above the highest REQUEST_TIMEOUT.
MAX_LIFETIME = 3600
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ID_IN_MALFORMED = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,64})"')
MALFORMED_PREFIX = 200  # bytes of a malformed or oversized entry that are searched for an id
MAX_ENVELOPE = 1000  # bytes of a job besides its image, more than it ever has
IMAGE_LAST = b',"image":"'  # what dump() writes before the image, which comes last
# A job queued for one model may be taken by the next one, so a job may be as large as the largest input in
# keras.applications, even if the current model takes less.
LARGEST_SHAPE: Shape = (600, 600, 3)


@dataclass
class Job:
    """One image to classify.

    `image` is base64 text, or bytes if it was decoded already, `deadline` unix seconds, `request` the request id that
    the client sees, `top` the number of predictions (0: TOP), `crashes` how many servers died with this job in flight,
    `shape` the shape of the pixels (None: the model's), and `scores` whether the answer has the probabilities of all
    classes too. `taken` is the time.monotonic() at which it was parsed, and
    `ttl` how many more seconds the web would wait for the answer then (None: Redis had no accepted marker).
    """

    id: str
    image: str | bytes
    deadline: float
    request: str = ""
    top: int = 0
    crashes: int = 0
    shape: Shape | None = None
    scores: bool = False
    taken: float = field(default_factory=time.monotonic, compare=False)
    ttl: float | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, raw: bytes | memoryview) -> "Job":
        """Return the job in `raw`. Raises ValueError if it has no id, since then nobody can be answered.

        A job that has an id but is otherwise invalid gets an empty image. So it is answered with an error, like any
        image that can't be decoded. The image in a memoryview that dump() wrote is decoded; all others stay text.
        """
        try:
            fields: Any = (isinstance(raw, memoryview) and _split(raw)) or orjson.loads(raw)
            if not ID.fullmatch(fields["id"]):
                raise ValueError("bad id")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            found = ID_IN_MALFORMED.search(raw[:MALFORMED_PREFIX])
            if not found:
                raise ValueError(f"not a job with an id ({type(error).__name__})") from error
            fields = {"id": found[1].decode()}
        image, deadline, request = fields.get("image"), fields.get("deadline"), fields.get("request", "")
        top, crashes, shape = fields.get("top", 0), fields.get("crashes", 0), as_shape(fields.get("shape"))
        scores = fields.get("scores", False)
        texts_valid = isinstance(image, str | bytes) and isinstance(request, str)
        numbers_valid = isinstance(deadline, int | float) and _is_count(top) and _is_count(crashes)
        others_valid = isinstance(scores, bool) and (shape or "shape" not in fields)  # older web servers send no shape
        if texts_valid and numbers_valid and others_valid:
            return cls(fields["id"], image, deadline, request, top, crashes, shape, scores)
        return cls(fields["id"], "", time.time() + RESULT_GRACE)

    def dump(self) -> bytes:
        """Return the job as JSON, without the fields that have their default."""
        optional = {"request": self.request, "top": self.top, "crashes": self.crashes, "shape": self.shape,
                    "scores": self.scores}  # fmt: skip
        given = {name: value for name, value in optional.items() if value}
        return orjson.dumps({"id": self.id, "deadline": self.deadline, **given, "image": self.image})

    @property
    def remaining(self) -> float:
        """How many more seconds the web waits for the answer; 0 or less if it has given up."""
        by_redis = None if self.ttl is None else self.taken + self.ttl - time.monotonic()
        return min(self.deadline - time.time() if by_redis is None else by_redis, MAX_LIFETIME)

    @property
    def expired(self) -> bool:
        """Whether the web has given up waiting for the answer."""
        return self.remaining <= 0

    @property
    def answer_ttl(self) -> int:
        """Milliseconds for which Redis keeps the answer."""
        return int(1000 * (max(0.0, self.remaining) + RESULT_GRACE))


def _split(raw: memoryview) -> dict[str, Any] | None:
    """Return the fields of a job as dump() writes it, with its image decoded; None if `raw` has another form.

    To find and decode the image without parsing the JSON around it takes a third of the time.
    """
    head = bytes(raw[:MAX_ENVELOPE])
    end = head.find(IMAGE_LAST)
    if end < 0 or raw[-2:].tobytes() != b'"}':
        return None
    try:
        fields: dict[str, Any] = orjson.loads(head[:end] + b"}")
        # Base64 contains neither quotes nor backslashes, so if this succeeds, the image is the whole rest of the job.
        fields["image"] = pybase64.b64decode(raw[end + len(IMAGE_LAST) : -2], validate=True)
    except ValueError:
        return None
    return fields


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def max_job_bytes(own: Shape) -> int:
    """Return the most bytes that a job may have for a model of the shape `own`."""
    pixels = max(math.prod(own), math.prod(LARGEST_SHAPE))
    return MAX_ENVELOPE + 4 * -(-pixels * np.dtype(settings.IMAGE_DTYPE).itemsize // 3)


@dataclass
class Batch:
    """Jobs that were taken together.

    `entries` is how many entries of the taken list the batch occupies, expired and malformed ones included. `rows` has
    the row of each job's pixels in the array of the batch, or None if its image could not be decoded.
    """

    jobs: list[Job] = field(default_factory=list)
    entries: int = 0
    rows: list[int | None] = field(default_factory=list)

    def __iadd__(self, later: "Batch") -> "Batch":
        self.jobs += later.jobs
        self.entries += later.entries
        self.rows += later.rows
        return self

    def drop_expired(self) -> int:
        """Remove the expired jobs and return their number. Their entries stay in the taken list until the answer."""
        before = len(self.jobs)
        kept = [pair for pair in zip(self.jobs, self.rows, strict=True) if not pair[0].expired]
        self.jobs = [job for job, _ in kept]
        self.rows = [row for _, row in kept]
        return before - len(kept)

    @property
    def suspect(self) -> bool:
        """Whether a job of this batch was in flight when a server died; such a job is computed alone."""
        return any(job.crashes for job in self.jobs)


def failed(message: str) -> Answer:
    """Return the answer to a job that the model could not compute."""
    return {"error": {"code": "model_failed", "message": message}}
