"""Which model is served where MODEL is not set: ResNet50 if its ImageNet weights can be had, else the bundled model.

bin/serve and bin/install ask choose(). A container runs this program, which becomes the model server:

    default_model.py [OPTION...]    the options are run_model_server.py's

run_model_server.py by itself never falls back to another model.
"""

import hashlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))

import settings  # noqa: E402
from model_server import model_file  # noqa: E402
from model_server.downloads import keras_downloads  # noqa: E402

BUNDLED_MODEL = "models/efficientnet_lite0.keras"
# The files that Keras fetches for ResNet50, with the MD5 sums that it compares: a killed download leaves a part behind.
RESNET50_FILES = {
    "resnet50_weights_tf_dim_ordering_tf_kernels.h5": "2cb95161c43110f7111970584f804107",
    "imagenet_class_index.json": "c2c37ea517e94d9795004a39431a14cb",
}
WEIGHTS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/" + next(iter(RESNET50_FILES))
PROBE_LIMIT = 5  # seconds in all for the first answer; a host name may have a dozen addresses that swallow packets
FETCH = [sys.executable, "-c", "from model_server.downloads import fetch; fetch()"]
FETCH_LIMIT = 600  # seconds for 100 MB; a slower network keeps nobody waiting for the service


def choose() -> str:
    """Return MODEL for a service whose MODEL is not set; print which it is, and why where it is the bundled model.

    Takes PROBE_LIMIT and FETCH_LIMIT at most.
    """
    if settings.MODEL_WEIGHTS != "imagenet":
        return settings.MODEL
    recognises = model_file.read((APP_ROOT / BUNDLED_MODEL).with_suffix(".json")).description
    reason = "" if cached() else in_time(probe, PROBE_LIMIT) or fetch()
    if not reason:
        print(f"* Serving {settings.MODEL}, which recognises {recognises}", flush=True)
        return settings.MODEL
    print(
        f"* Serving the bundled model EfficientNet-Lite0, which recognises {recognises}. ResNet50's weights can't be "
        f"fetched ({reason}) and are not complete in {keras_downloads()}. To serve ResNet50, put "
        f'{" and ".join(RESNET50_FILES)} there, as docs/models.md says under "ResNet50 with ImageNet weights".',
        flush=True,
    )
    return BUNDLED_MODEL


def cached() -> bool:
    """Whether Keras has all that ResNet50 needs, whole."""
    return all(md5(keras_downloads() / name) == digest for name, digest in RESNET50_FILES.items())


def md5(path: Path) -> str:
    """Return the MD5 sum of a file, in hexadecimal; nothing where it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def in_time(ask: Callable[[], str], seconds: float) -> str:
    """Return what `ask` returns, or that it took longer: looking up a host name has no limit of its own."""
    answers: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=lambda: answers.put(ask()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return f"no answer within {seconds:g} seconds"


def probe() -> str:
    """Return why the weights can't be fetched; nothing where they are there for us."""
    try:
        with urllib.request.urlopen(urllib.request.Request(WEIGHTS_URL, method="HEAD"), timeout=PROBE_LIMIT):
            return ""
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: the address of a proxy is wrong
        return one_line(error.reason if type(error) is urllib.error.URLError else error)


def fetch() -> str:
    """Let Keras fetch what ResNet50 needs; return why that failed, or nothing."""
    print("* Fetching ResNet50's ImageNet weights (100 MB)", flush=True)
    progress = None if sys.stdout.isatty() else subprocess.DEVNULL
    try:
        ended = subprocess.run(
            FETCH, cwd=APP_ROOT, stdout=progress, stderr=subprocess.PIPE, errors="replace", timeout=FETCH_LIMIT,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not complete after {FETCH_LIMIT:g} seconds"
    if ended.returncode == 0:
        return ""
    return one_line((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])


def one_line(said: object) -> str:
    """Return what an error says for the middle of a line, without what changes a terminal."""
    text = " ".join(str(said).split()) or type(said).__name__
    return "".join(sign for sign in text[:200] if sign.isprintable()).rstrip(".")


def main() -> None:
    """Become the model server, of the model that is chosen where MODEL is not set or empty."""
    # The first process of a container ignores signals that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.chdir(APP_ROOT)
    if not os.environ.get("MODEL"):
        os.environ["MODEL"] = choose()
    os.execv(sys.executable, [sys.executable, "run_model_server.py", *sys.argv[1:]])  # noqa: S606 - it needs none


if __name__ == "__main__":
    main()
