"""The model to serve if MODEL is not set: ResNet50 if its ImageNet weights are available, otherwise the bundled model.

bin/serve and bin/install call choose(). A container runs this program, which becomes the launcher of the model server:

    default_model.py [OPTION...]    the options of run_model_server.py

run_model_server.py itself never falls back to another model.
"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

APP_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(APP_ROOT))

import settings  # noqa: E402
from model_server import model_file  # noqa: E402
from model_server.downloads import keras_downloads  # noqa: E402

BUNDLED_MODEL = "models/efficientnet_lite0.keras"
# What Keras downloads for ResNet50, with the MD5 sums that Keras checks. A killed download leaves a partial file.
RESNET50_FILES = {
    "resnet50_weights_tf_dim_ordering_tf_kernels.h5": "2cb95161c43110f7111970584f804107",
    "imagenet_class_index.json": "c2c37ea517e94d9795004a39431a14cb",
}
WEIGHTS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/" + next(iter(RESNET50_FILES))
PROBE_LIMIT = 5  # seconds for all addresses of the host together: there may be many, and none may answer
PROBE = [sys.executable, "-c", "import sys; from model_server.downloads import ask; ask(sys.argv[1])"]
FETCH = [sys.executable, "-c", "from model_server.downloads import fetch; fetch()"]
FETCH_LIMIT = 600  # seconds for 100 MB; nobody should wait longer for the service


def choose() -> str:
    """Return the value for MODEL. Print which model it is and, for the bundled one, why.

    Takes at most PROBE_LIMIT plus FETCH_LIMIT.
    """
    if settings.MODEL_WEIGHTS != "imagenet":
        return settings.MODEL
    recognizes = model_file.read((APP_ROOT / BUNDLED_MODEL).with_suffix(".json")).description
    reason = "" if cached() else probe() or fetch()
    if not reason:
        print(f"* Serving {settings.MODEL}, which recognizes {recognizes}", flush=True)
        return settings.MODEL
    print(
        f"* Serving the bundled model EfficientNet-Lite0, which recognizes {recognizes}. ResNet50's weights can't be "
        f"downloaded ({reason}) and are not complete in {keras_downloads()}. To serve ResNet50, put "
        f'{" and ".join(RESNET50_FILES)} there, as docs/models.md says under "ResNet50 with ImageNet weights".',
        flush=True,
    )
    return BUNDLED_MODEL


def cached() -> bool:
    """Whether Keras has every file of ResNet50, complete."""
    return all(md5(keras_downloads() / name) == digest for name, digest in RESNET50_FILES.items())


def md5(path: Path) -> str:
    """Return the MD5 sum of a file in hexadecimal; an empty string if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def probe() -> str:
    """Return why the weights can't be downloaded; an empty string if they can.

    A process of its own asks: looking up a host name has no time limit, and a thread that is still within OpenSSL
    crashes a process that a signal ends.
    """
    return failure([*PROBE, WEIGHTS_URL], PROBE_LIMIT, "no answer within {:g} seconds")


def fetch() -> str:
    """Let Keras download the files of ResNet50. Return why that failed, or an empty string."""
    print("* Downloading ResNet50's ImageNet weights (100 MB)", flush=True)
    return failure(FETCH, FETCH_LIMIT, "not complete after {:g} seconds", progress=sys.stdout.isatty())


def failure(program: list[str], seconds: float, too_slow: str, progress: bool = False) -> str:
    """Run a program. Return the last line of its errors, or `too_slow` after so many seconds; "" if it succeeds."""
    try:
        ended = subprocess.run(
            program, cwd=APP_ROOT, stdout=None if progress else subprocess.DEVNULL, stderr=subprocess.PIPE,
            errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return too_slow.format(seconds)
    if ended.returncode == 0:
        return ""
    return one_line((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])


def one_line(text: str) -> str:
    """Return a line of an error as part of a sentence: without control characters."""
    return "".join(char for char in text[:200] if char.isprintable()).rstrip(".")


def main() -> None:
    """Choose a model if neither MODEL nor MODELS is set, then become the launcher of the model server."""
    # The first process of a container ignores a signal unless it has a handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.chdir(APP_ROOT)
    if not (settings.given("MODEL") or settings.models()):
        os.environ["MODEL"] = choose()
    launcher = [sys.executable, "-m", "model_server.launcher", *sys.argv[1:]]
    os.execv(sys.executable, launcher)  # noqa: S606 - needs no shell


if __name__ == "__main__":
    main()
