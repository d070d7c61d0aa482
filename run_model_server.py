"""The model server: takes batches of images from Redis, classifies them with Keras, and answers them until stopped.

    python run_model_server.py [--model MODEL] [--gpu N]    serve MODEL: the default model, or another one beside it
    python run_model_server.py --check [IMAGE]              show that the model works here, and how fast; needs no Redis

Run one for each GPU; those of the same model share its queue. On SIGTERM or Ctrl-C it takes no more images, answers
those being computed, requeues the rest, and exits with code 0. Exit code 2: a setting or the model is invalid; one line
says why.
"""

import argparse
import io
import logging
import os
import signal
import sys
from pathlib import Path

from PIL import Image
from redis.exceptions import RedisError

import settings
from helpers import StartupError, default_model, log_to_stderr, megabytes, model_name
from image_queue import ImageQueue, ServerQueue
from model_server import metrics, model_checks
from model_server.batching import BATCHES_AT_ONCE
from model_server.check import check
from model_server.health import health
from model_server.loop import ModelServer
from model_server.privileges import give_up_root
from model_server.startup import load_model
from model_server.systemd import STATUS, notify_systemd
from web.image_preparation import TooLarge, open_image, prepare_image

log = logging.getLogger(__name__)

EXIT_STOPPED = 0
EXIT_INVALID = settings.EXIT_BAD_SETTING

# A heartbeat lasts this many times as long as the slowest batch. While the web prepares images on the same cores, a
# batch can take several times as long as at warm-up.
BATCHES_PER_HEARTBEAT = 5
SHORTEST_HEARTBEAT = 5.0  # seconds

SAMPLE = Path(__file__).parent / "images/cat.jpg"


def classify_process() -> None:
    """Load the model, then classify images from the queue until stopped. Raises StartupError."""
    model = load_model()
    give_up_root()
    log.info("* Model loaded")
    slowest = max(BATCHES_AT_ONCE * model.slowest, settings.SERVER_SLEEP)
    heartbeat = max(SHORTEST_HEARTBEAT, BATCHES_PER_HEARTBEAT * slowest)
    health.limit = max(health.limit, 2 * heartbeat)
    metrics.ABOUT.info({name: str(model.about[name]) for name in ("model", "weights")})
    server = ModelServer(model, ServerQueue(model.about, heartbeat, metrics.count_jobs))
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    server.run()


def choose_model(given: str | None) -> None:
    """Set MODEL to the model `given`, which may also be the name of one of MODELS. Without it, to their default.

    IMAGE_* and LABELS are the default model's, so another model does without them.
    """
    listed = {model_name(each): each for each in settings.models()}
    chosen = listed.get(given, given) if given else listed.get(default_model(), next(iter(listed.values()), None))
    settings.MODEL = chosen or settings.MODEL
    if default_model() not in ("", model_name(settings.MODEL)):
        settings.LABELS = ""
        settings.IMAGE_WIDTH = settings.IMAGE_HEIGHT = settings.IMAGE_CHANS = None


def pin_gpu(number: int) -> None:
    """Let the model see only GPU `number`, counted from 0 among those in CUDA_VISIBLE_DEVICES, or all if it is not set.

    Numbers beyond the last GPU wrap around, so that several servers can share one. Without a GPU nothing changes.
    Must be called before Keras is imported.
    """
    installed = [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(installed)).split(",")
    if visible != [""]:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def check_redis() -> None:
    """Log if Redis is down, without waiting: the server waits for it after loading the model. Raises StartupError."""
    queue = ImageQueue()
    try:
        queue.check()
        queue.warn()
    except RedisError as error:
        queue.log_redis_error(error, 0)


def open_file(path: Path) -> Image.Image:
    """Return the image at `path`, not yet decoded. Raises ServiceError, as POST /predict would, and OSError."""
    with path.open("rb") as file:
        data = file.read(settings.MAX_UPLOAD_BYTES + 1)
    if len(data) > settings.MAX_UPLOAD_BYTES:
        raise TooLarge(f"The file has more than {megabytes(settings.MAX_UPLOAD_BYTES)}, so send a smaller one.")
    return open_image(io.BytesIO(data))


def options() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description="Classify the images on the queue. Its settings are in settings.py.")
    known = (
        "a name in keras.applications, the path of a .keras or .h5 file, or the name of one of MODELS "
        "(default: DEFAULT_MODEL or the first of MODELS, otherwise MODEL)"
    )
    parser.add_argument("--model", help=known)
    parser.add_argument("--gpu", type=int, metavar="N", help="compute only on this GPU; the first is 0")
    checking = "load the model, classify this image (default: a photo of a cat), print how fast the model is, and exit"
    parser.add_argument("--check", type=Path, nargs="?", const=SAMPLE, metavar="IMAGE", help=checking)
    return parser.parse_args()


def main() -> int:
    """Run one model server; return its exit code."""
    arguments = options()
    log_to_stderr(settings.LOG_FORMAT)
    for line in settings.warnings():
        log.warning(line)
    choose_model(arguments.model)
    if arguments.gpu is not None:
        pin_gpu(arguments.gpu)
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing to finish while the model loads
        # Not sys.exit(): during the import of a C library, its SystemExit would turn into another exception.
        signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))
    try:
        model_checks.check()
        if arguments.check:
            check(arguments.check, open_file, prepare_image)
        else:
            metrics.serve_metrics(arguments.gpu or 0)
            check_redis()
            classify_process()
    except StartupError as error:
        log.error("%s", error)
        notify_systemd(f"{STATUS}{error}")
        return EXIT_INVALID
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
