"""The model server: takes a batch from Redis, classifies it with Keras, answers, until it is told to stop.

    python run_model_server.py [--model MODEL] [--gpu N]
    python run_model_server.py --check [IMAGE]              whether the model works here, and how fast; needs no Redis

Run as many as there are GPUs, each on one of its own; they share the queue. SIGTERM or Ctrl-C: it takes no more,
answers what it computes, puts back the rest and leaves with exit code 0. Exit code 2: a setting or the model makes no
sense, and one line says why.
"""

import argparse
import ctypes
import encodings
import gc
import importlib
import io
import logging
import os
import pkgutil
import pwd
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np
from PIL import Image
from redis.exceptions import RedisError

import settings
from helpers import (
    BATCHES_AT_ONCE,
    Pixels,
    ServiceError,
    Shape,
    StartupError,
    base64_decode_image,
    log_to_stderr,
    megabytes,
    notify_systemd,
    pauses,
    print_anything,
)  # fmt: skip
from image_queue import Answer, Batch, HeartbeatExpired, ImageQueue, Job, ServerQueue, failed
from model_server import metrics as server_metrics
from model_server import model_checks
from web.image_preparation import TooLarge, open_image, prepare_image

if TYPE_CHECKING:
    from model_server.classifier import Classifier, Probabilities

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_REFUSED = settings.EXIT_BAD_SETTING

# A server whose heartbeat is older than this many of its slowest batches counts as dead. A batch can take several
# times as long as at warm-up when the web prepares images on the same cores.
BATCHES_TO_LIVE = 5
SHORTEST_LIFE = 5.0  # seconds

SAMPLE = Path(__file__).parent / "images/cat.jpg"
CHECK_SECONDS = 3.0  # that --check measures for


class Computed(NamedTuple):
    """A batch, what came out for each of its images that could be decoded, in its order, and the seconds it took."""

    batch: Batch
    results: "list[Probabilities | Exception]"
    seconds: float


class ModelServer:
    """One model server at work, a batch at a step().

    The loop takes and decodes batches, BATCHES_AT_ONCE threads compute them, and one hands out the answers in the order
    in which they were taken: what computes waits for neither while there is work.
    """

    def __init__(self, classifier: "Classifier", queue: ServerQueue) -> None:
        self.classifier = classifier
        self.queue = queue
        self.stopping = False
        self._computers = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="compute")
        self._answerer = ThreadPoolExecutor(1, thread_name_prefix="answer")
        self._in_flight: deque[Future[None]] = deque()  # ends when the batch is answered; the oldest first
        self._unsent: deque[Computed] = deque()  # the first is being handed out, or could not be

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler: finish the batch, then leave."""
        self.stopping = True

    def run(self) -> None:
        """Serve until stop() is called, through every loss of Redis."""
        self._join()
        while not self.stopping:
            try:
                self.step()
            except HeartbeatExpired:
                log.warning("The heartbeat lapsed: joining again")
                self._join()
            except RedisError as error:
                self.queue.log_redis_error(error, 0)
                self._join()
        notify_systemd("STOPPING=1")
        self._leave()

    def step(self) -> None:
        """Take a batch and have it computed and answered, or wait SERVER_SLEEP for one.

        Raises HeartbeatExpired and RedisError, also those that the answers to earlier batches met.
        """
        self.queue.beat()
        notify_systemd("WATCHDOG=1")
        self.settle(BATCHES_AT_ONCE)
        batch = self._take(self.classifier.batch_size, settings.SERVER_SLEEP)
        if not batch.entries:
            self.settle()  # there may be a suspect, which is taken when nothing else is in flight
            return
        if len(self._in_flight) == BATCHES_AT_ONCE:
            self.settle(BATCHES_AT_ONCE - 1)
            batch += self._take(self.classifier.batch_size - len(batch.jobs))  # what came meanwhile
            self.queue.count("expired", batch.drop_expired())
        if self.stopping:
            return  # what was taken goes back
        computing = self._computers.submit(self._classify, batch)
        self._in_flight.append(self._answerer.submit(self._answer, batch, computing))
        if batch.suspect:
            self.settle()

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many batches are in flight. Raises what their answers met: HeartbeatExpired, RedisError."""
        while self._in_flight and (len(self._in_flight) > most or self._in_flight[0].done()):
            self._in_flight.popleft().result()

    def _take(self, most: int, wait: float = 0) -> Batch:
        batch = self.queue.take(most, wait, ahead=bool(self._in_flight))
        batch.images = [self._decode(job) for job in batch.jobs]
        return batch

    def _decode(self, job: Job) -> Pixels | None:
        try:
            pixels = base64_decode_image(job.image, settings.IMAGE_DTYPE, job.shape or self.classifier.shape)
        except ValueError as error:
            log.error("The image of request %s can't be decoded: %s", job.request or job.id, error)
            return None
        return fitted(pixels, self.classifier.shape)

    def _classify(self, batch: Batch) -> Computed:
        images = [image for image in batch.images if image is not None]
        if not images:
            return Computed(batch, [], 0.0)
        stacked = np.stack(images)
        names = [job.request for job in batch.jobs]
        log.info("* Batch size: %s of requests %s", stacked.shape, " ".join(names), extra={"requests": names})
        server_metrics.BATCHES.observe(len(stacked))
        begun = time.monotonic()
        results = self.classifier.classify(stacked)
        seconds = time.monotonic() - begun
        server_metrics.COMPUTE.observe(seconds)
        return Computed(batch, results, seconds)

    def _answer(self, batch: Batch, computing: Future[Computed]) -> None:
        self._unsent.append(computing.result())
        if len(self._unsent) == 1:  # else it is not the first in the taken list
            self._send_oldest(batch.entries)

    def _send_oldest(self, entries: int) -> None:
        """Hand out the answers to the batch that has waited longest, and take so many `entries` off the taken list."""
        batch, results, seconds = self._unsent[0]
        each = iter(results)
        pairs = zip(batch.jobs, batch.images, strict=True)
        spent = {"compute_s": seconds, "batch": len(results)}
        answers = [UNREADABLE if image is None else self._answer_to(job, next(each), spent) for job, image in pairs]
        try:
            self.queue.answer(batch.jobs, answers, entries)
        except HeartbeatExpired:  # they were handed out all the same
            self._sent(answers)
            raise
        self._sent(answers)

    def _sent(self, answers: list[Answer]) -> None:
        self._unsent.popleft()
        for answer in answers:
            outcome = "unreadable" if answer is UNREADABLE else "model_failed" if answer is BROKEN else "classified"
            server_metrics.OUTCOMES.labels(outcome).inc()

    def _answer_to(self, job: Job, result: "Probabilities | Exception", spent: Answer) -> Answer:
        if isinstance(result, Exception):
            log.error("The image of request %s broke the model", job.request, exc_info=result)
            return BROKEN
        decoded = self.classifier.decode(result, job.top)
        predictions = [{"label": label, "probability": probability} for label, probability in decoded]
        return {"predictions": predictions, "held_s": time.monotonic() - job.taken, **spent}

    def _join(self) -> None:
        """Hand out what could not be handed out, then be alive with nothing in flight; wait for Redis if need be."""
        while self._in_flight:
            self._in_flight.popleft().exception()  # wait for it; what could not be handed out is sent late
        for pause in pauses():
            if self.stopping:
                return
            notify_systemd("WATCHDOG=1")  # to start again would not bring Redis back
            try:
                self._send_late()
                self.queue.join()
                log.info("* Joined the queue %s as %s", self.queue.key, self.queue.name)
                notify_systemd("READY=1")
                return
            except RedisError as error:
                self.queue.log_redis_error(error, pause)
                self._sleep(pause)

    def _send_late(self) -> None:
        """Hand out answers that outlived the connection, or the Redis, that their jobs came through."""
        while self._unsent:
            jobs = self._unsent[0].batch.jobs
            with suppress(HeartbeatExpired):  # which it was, and is about to join again
                self._send_oldest(entries=0)  # which are in no taken list of ours any more
            log.info("Answered %d images late", len(jobs))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.05)  # short, because a signal handler only sets a flag

    def _leave(self) -> None:
        self._computers.shutdown()
        self._answerer.shutdown()
        try:
            self._send_late()
            self.queue.leave()
        except RedisError as error:
            self.queue.log_redis_error(error, 0, "what was taken goes back when the heartbeat lapses")


UNREADABLE = failed(
    "The image did not arrive as it was sent: IMAGE_* must be the same for the web and the model server."
)
BROKEN = failed("The model could not classify this image; try another.")


PR_SET_NO_NEW_PRIVS = 38  # prctl.h
UNPRIVILEGED = ("www-data", "nobody")
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")  # of REDIS_URL


def give_up_root() -> None:
    """Become an ordinary user where root started us. Raises StartupError.

    Root never parses what strangers sent. The code, Python itself and the model may be readable by root alone, as under
    /root, so everything that is read later is read before.
    """
    if os.geteuid() != 0:
        return
    _read_ahead()
    try:
        user = _unprivileged_user()
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except OSError as error:
        raise StartupError(
            f"Root can't become {UNPRIVILEGED[0]} ({error}): start the model server as another user."
        ) from None
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # nor may a program that it starts
    if prctl:
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    log.info("Root has become %s", user.pw_name)


def _read_ahead() -> None:
    """Read what would be read while serving: the model is warmed up, and has what it needs.

    Python imports encodings when they are first named, and Redis' client reads its TLS files at each connection.
    """
    try:
        raise LookupError
    except LookupError:
        traceback.format_exc()  # as the log does
    for module in pkgutil.iter_modules(encodings.__path__, "encodings."):
        with suppress(ImportError):  # some are for Windows
            importlib.import_module(module.name)
    address, _, options = settings.REDIS_URL.partition("?")
    if options:
        pairs = parse_qsl(options, keep_blank_values=True)
        kept = [(name, _in_memory(value) if name in TLS_FILES else value) for name, value in pairs]
        settings.REDIS_URL = f"{address}?{urlencode(kept)}"


def _in_memory(path: str) -> str:
    """Return the path of a copy in memory of the file at `path`, which this process alone can open."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return path  # Redis' client says so at each attempt, until it is there
    copy = os.memfd_create(Path(path).name)
    with open(copy, "wb", closefd=False) as file:
        file.write(content)
    return f"/proc/self/fd/{copy}"


def _unprivileged_user() -> pwd.struct_passwd:
    for name in UNPRIVILEGED:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise OSError("there is no such user")


def loaded_model() -> "Classifier":
    """Return the model, warmed up. Raises StartupError."""
    with garbage_left():
        # Here, because it takes seconds, and a wrong setting or no Redis should be told at once.
        from model_server import classifier  # noqa: PLC0415

        gc.freeze()  # what was imported stays, so the collection at the end can skip it
        log.info("* Loading model...")
        model = classifier.load()
        model.warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # TensorFlow leaves several copies of the weights behind when it compiles
    return model


@contextmanager
def garbage_left() -> Iterator[None]:
    """Collect no garbage within the block but once at its end, and never look again at what is alive then.

    A start makes hundreds of thousands of objects that stay. To search them over and over takes a fifth of its time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def classify_process() -> None:
    """Load the model, then classify what comes until told to stop. Raises StartupError."""
    model = loaded_model()
    give_up_root()
    log.info("* Model loaded")
    life = max(SHORTEST_LIFE, BATCHES_TO_LIVE * max(BATCHES_AT_ONCE * model.slowest, settings.SERVER_SLEEP))
    server_metrics.ABOUT.info({name: str(model.about[name]) for name in ("model", "weights")})
    server = ModelServer(model, ServerQueue(model.about, life, server_metrics.count_jobs))
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    server.run()


def check(path: Path) -> None:
    """Load the model, say what POST /predict says of the image at `path`, and how fast it is. Raises StartupError."""
    with said_of(path):
        image = opened(path)
    model = loaded_model()
    height, width, channels = model.shape
    with said_of(path):
        pixels = prepare_image(image, (width, height), channels)
    [result] = model.classify(pixels[np.newaxis])
    if isinstance(result, Exception):
        raise StartupError(f"The model can't classify {path} ({result}).")
    print(f"{settings.MODEL}: {described(model)}")
    print(f"{path}: " + ", ".join(f"{label} {probability:.4f}" for label, probability in model.decode(result)))
    speed = images_per_second(model, np.stack([pixels] * model.batch_size))
    print(f"{settings.MODEL}: {speed:.1f} images/s in batches of {model.batch_size}, {BATCHES_AT_ONCE} at once")


@contextmanager
def said_of(path: Path) -> Iterator[None]:
    """Turn what the service would answer to the image at `path`, or that it can't be read, into a StartupError."""
    try:
        yield
    except ServiceError as error:
        raise StartupError(f"{path} can't be read as an image: {error}") from None
    except OSError as error:
        raise StartupError(f"{path} can't be read as an image ({error.strerror or error}).") from None


def opened(path: Path) -> Image.Image:
    """Return the image at `path`, not yet decoded. Raises ServiceError, as POST /predict would, and OSError."""
    with path.open("rb") as file:
        data = file.read(settings.MAX_UPLOAD_BYTES + 1)
    if len(data) > settings.MAX_UPLOAD_BYTES:
        raise TooLarge(f"The file has more than {megabytes(settings.MAX_UPLOAD_BYTES)}, so send it smaller.")
    return open_image(io.BytesIO(data))


def described(model: "Classifier") -> str:
    """Return what was found of a model, in a line."""
    facts = model.facts
    height, width, channels = facts.shape
    colours = "RGB" if channels == 3 else "grey"
    found = f"input {width}x{height} {colours}, preprocessing {facts.preprocessing}, {len(facts.labels)} labels"
    if model.of_second:
        found += f", its one output taken as the probability of {facts.labels[1]}"
    return f"{found}, {facts.description}" if facts.description else found


def fitted(pixels: Pixels, shape: Shape) -> Pixels:
    """Return `pixels`, 0..255 in any shape, in this one: they were queued for another model, or before the web knew."""
    if pixels.shape == shape:
        return pixels
    height, width, channels = shape
    levels = np.nan_to_num(pixels).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0]).convert(
        "RGB" if channels == 3 else "L"
    )
    small = image.resize((width, height), Image.Resampling[settings.IMAGE_RESAMPLE.upper()])
    return np.asarray(small, dtype=settings.IMAGE_DTYPE).reshape(shape)


def images_per_second(model: "Classifier", batch: Pixels) -> float:
    """Return how many images `model` computes in a second, as many batches at once as there are of this server."""
    begun = time.monotonic()

    def compute(_: int) -> int:
        done = 0
        while time.monotonic() < begun + CHECK_SECONDS:
            model.classify(batch)
            done += 1
        return done

    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        batches = sum(pool.map(compute, range(BATCHES_AT_ONCE)))
    return batches * len(batch) / (time.monotonic() - begun)


def pin_gpu(number: int) -> None:
    """Let the model see one GPU alone, the first being 0, of those that CUDA_VISIBLE_DEVICES names or of all.

    Where there are fewer they are counted round, so that several servers share one. Without any nothing changes. To be
    called before the model's library is imported.
    """
    everything = [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(everything)).split(",")
    if visible != [""]:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def look_for_redis() -> None:
    """Say at once when Redis is not there; the wait for it comes when the model is loaded. Raises StartupError."""
    queue = ImageQueue()
    try:
        queue.check()
        queue.warn()
    except RedisError as error:
        queue.log_redis_error(error, 0)


def main() -> int:
    """Run one model server; return its exit code."""
    parser = argparse.ArgumentParser(description="Classify the images on the queue. Its settings are in settings.py.")
    parser.add_argument(
        "--model", help="a name in keras.applications or the path of a .keras or .h5 file (default: MODEL)"
    )
    parser.add_argument("--gpu", type=int, metavar="N", help="compute on this GPU alone, the first being 0")
    told = "load the model, classify this image (default: a photo of a cat), say how fast it is, and leave"
    parser.add_argument("--check", type=Path, nargs="?", const=SAMPLE, metavar="IMAGE", help=told)
    arguments = parser.parse_args()
    log_to_stderr(settings.LOG_FORMAT)
    for line in settings.warnings():
        log.warning(line)
    print_anything()
    if arguments.model:
        settings.MODEL = arguments.model
    if arguments.gpu is not None:
        pin_gpu(arguments.gpu)
    for number in (signal.SIGTERM, signal.SIGINT):  # while loading there is nothing to finish
        # Not sys.exit: raised within a C library that is being imported, it becomes another exception.
        signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))
    try:
        model_checks.check()
        if arguments.check:
            check(arguments.check)
            return EXIT_STOPPED
        server_metrics.serve_metrics(arguments.gpu or 0)
        look_for_redis()
        classify_process()
    except StartupError as error:
        log.error("%s", error)
        return EXIT_REFUSED
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
