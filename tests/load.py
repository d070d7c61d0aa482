"""Load with known answers for test_faults_*.py, and ways to find or freeze a model server in mid-batch."""

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import numpy as np
import requests
from harness import ROOT, Process, wait_until
from PIL import Image
from redis import Redis
from samples import saved
from train_digits import render, split

CLIENTS = 32
TOLERANCE = 1e-4  # probabilities closer than this count as equal
TIMEOUT = 150  # seconds for a request
Record = Callable[[str, object], None]  # pytest's record_property
Post = Callable[..., requests.Response]  # requests.post, or a session's


@dataclass(frozen=True)
class Known:
    """An image, and the answer that plain Keras gives for it."""

    data: bytes
    answer: tuple[tuple[str, float], ...]

    def is_right(self, body: Any, _version: str = "") -> bool:
        """Whether the JSON of a response has the right answer."""
        return same_answer(body, self.answer)


def same_answer(body: Any, answer: tuple[tuple[str, float], ...]) -> bool:
    got = [(each["label"], each["probability"]) for each in body["predictions"]]
    return [label for label, _ in got] == [label for label, _ in answer] and all(
        abs(mine - theirs) < TOLERANCE for (_, mine), (_, theirs) in zip(got, answer, strict=True)
    )


@cache
def known_images(count: int = 320) -> list[Known]:
    """Return images whose answers from the digits model all differ, so that a mixed-up answer is noticed."""
    rng = np.random.default_rng(3)
    model = keras.saving.load_model(ROOT / "models/digits.keras", compile=False)
    labels = (ROOT / "models/digits.labels.txt").read_text().split()
    (digits, _), _ = split()
    images = [render(digit, "raw", rng) for digit in digits[: count + count // 2]]
    pixels = [image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    probabilities = model.predict(np.stack([np.asarray(each, np.float32) for each in pixels]), verbose=0)
    chosen: list[int] = []
    for i, row in enumerate(probabilities):
        if all(np.abs(probabilities[j] - row).max() > 4 * TOLERANCE for j in chosen):
            chosen.append(i)
    assert len(chosen) >= count
    return [
        Known(
            saved(images[i], "PNG"),
            tuple((labels[k], float(probabilities[i][k])) for k in probabilities[i].argsort()[::-1][:5]),
        )
        for i in chosen[:count]
    ]


@dataclass(frozen=True)
class Outcome:
    """The result of a request.

    `code` is empty if the answer is right. Otherwise it is the error's code, "wrong answer", or the client's exception.
    """

    started: float
    seconds: float
    status: int
    code: str
    message: str
    retry_after: bool
    version: str  # of the model, as the header says

    @property
    def right(self) -> bool:
        return self.status == 200 and not self.code


def ask(url: str, image: Known, page: str = "/predict", *, post: Post = requests.post, **options: Any) -> Outcome:
    """Post one image: on a new connection, like curl, or with a session's `post`."""
    started = time.monotonic()
    status, message, retry_after, version = 0, "", False, ""
    try:
        response = post(f"{url}{page}", files={"image": image.data}, **{"timeout": TIMEOUT, **options})
        status, retry_after = response.status_code, "Retry-After" in response.headers
        body, version = response.json(), response.headers.get("X-Model-Version", "")
        if status == 200:
            code = "" if image.is_right(body, version) else "wrong answer"
        else:
            code, message = body["error"]["code"], body["error"]["message"]
    except Exception as error:
        code = repr(error)[:200]
    return Outcome(started, time.monotonic() - started, status, code, message, retry_after, version)


class Load:
    """Clients in a closed loop: each sends its next image when the last one is answered.

    `sessions` of them keep their connection, like most programs, and the others make a new one each time, like curl.
    """

    def __init__(
        self, url: str, images: Sequence[Known] = (), page: str = "/predict", clients: int = CLIENTS, sessions: int = 0
    ) -> None:
        self.url = url
        self.page = page
        self.outcomes: list[Outcome] = []
        self._stopping = threading.Event()
        images = images or known_images()
        self._threads = [
            threading.Thread(target=self._send, args=[images[i::clients], i < sessions], daemon=True)
            for i in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in self._threads)

    def _send(self, images: Sequence[Known], is_session: bool) -> None:
        number = 0
        with requests.Session() as session:
            post = session.post if is_session else requests.post
            while not self._stopping.is_set():
                self.outcomes.append(ask(self.url, images[number % len(images)], self.page, post=post))
                number += 1

    def wait_for(self, more: int, seconds: float = 120) -> None:
        """Wait for this many answers to requests sent from now on; requests in flight now do not count."""
        now = time.monotonic()
        wait_until(lambda: sum(o.started > now for o in self.outcomes) >= more, f"{more} more answers", seconds)

    @property
    def failures(self) -> dict[str, int]:
        """The requests without a correct answer, counted by status and code."""
        return dict(Counter(f"{o.status} {o.code}" for o in self.outcomes if not o.right))

    @property
    def figures(self) -> str:
        """The figures for the table of faults."""
        longest = max(o.seconds for o in self.outcomes)
        return f"{len(self.outcomes)} requests, {sum(self.failures.values())} lost, longest {longest:.1f} s"


def in_flight(redis: Redis, queue: str, server: str = "*") -> int:
    """Return the number of jobs that model servers have taken but not answered yet."""
    return sum(redis.llen(key) for key in redis.keys(f"{queue}:taken:{server}"))


def name_of(server: Process) -> str:
    """Return the name under which a model server last joined the queue."""
    return str(re.findall(r"Joined the queue .* as (\S+)", server.log)[-1])


def freeze_in_mid_batch(pid: int, redis: Redis, queue: str, server: str = "*", least: int = 4) -> int:
    """Freeze a model server while it has at least `least` jobs; return their number."""

    def frozen() -> int:
        os.kill(pid, signal.SIGSTOP)
        jobs = in_flight(redis, queue, server)
        if jobs >= least:
            return jobs
        os.kill(pid, signal.SIGCONT)
        return 0

    jobs: int = wait_until(frozen, f"{pid} has a batch", 60)
    return jobs
