"""What the web and the model server share: pixels to text and back, the log's form, waiting, what systemd is told."""

import binascii
import io
import logging
import math
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pybase64

Pixels = npt.NDArray[np.generic]
Shape = tuple[int, int, int]  # height, width, channels

USUAL_SHAPE: Shape = (224, 224, 3)  # where neither a setting nor a model says another
MOST_SIDE = 4096  # pixels
# Batches that a model server computes at the same time: while one waits for the slower of its threads, or for Python to
# begin it, the other computes. With ResNet50 on a CPU that is 5 to 10% faster than one at a time, and a third gains
# nothing.
BATCHES_AT_ONCE = 2


def as_shape(value: object) -> Shape | None:
    """Return `value`, such as JSON gives, as the shape of an image; None where it is none that the service takes."""
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(type(each) is int for each in value)):
        return None
    height, width, channels = value
    return (height, width, channels) if min(value) >= 1 and max(value) <= MOST_SIDE and channels in (1, 3) else None


def base64_encode_image(a: Pixels) -> str:
    """Return the bytes of array `a`, in C order, as base64 text, which JSON can carry."""
    return pybase64.b64encode_as_string(np.ascontiguousarray(a).data)


def base64_decode_image(a: str, dtype: str, shape: tuple[int, ...]) -> Pixels:
    """Return the array of `dtype` and `shape` that base64 text `a` holds (read-only, no copy).

    Raises ValueError when `a` is not base64 or holds another number of bytes than the shape needs.
    """
    try:
        data = pybase64.b64decode(a, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"the image is not base64: {error}") from error
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ValueError(f"the image has {len(data)} bytes, but {shape} of {dtype} takes {expected}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def megabytes(count: int) -> str:
    """Return a number of bytes as a message says it: 16 MB for 2**24."""
    return f"{count / 2**20:.3g} MB" if count >= 2**20 else f"{count / 2**10:.3g} kB"


def megapixels(count: int) -> str:
    """Return a number of pixels as a message says it: 50 megapixels for 50,000,000."""
    return f"{count / 1e6:.3g} megapixels" if count >= 1e5 else f"{count} pixels"


def log_to_stderr(form: str) -> None:
    """One line an event, with its time, on standard error: whoever started the program decides where that goes.

    `form` is text, or json with the event's own fields besides. It is written to the file itself, since mod_wsgi's
    sys.stderr would put a second time, and brackets that no parser of JSON takes, before each line.
    """
    handler = logging.StreamHandler(open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    handler.setFormatter(json_lines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def print_anything() -> None:
    """Let print() show letters that the terminal's encoding lacks as escapes, rather than fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def json_lines() -> logging.Formatter:
    """Return what writes an event as a JSON object: time (ISO 8601, UTC), level, message, and what it has besides."""
    from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415 - for those who asked for it

    names = {"levelname": "level", "exc_info": "traceback"}
    return JsonFormatter("{levelname}{message}", style="{", rename_fields=names, timestamp="time")


def keras_downloads() -> Path:
    """Return the folder where Keras keeps what it downloads, which it finds in this way; to ask it takes seconds."""
    home = os.path.expanduser("~")  # which is left as it is where there is none
    usual = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")  # noqa: S108 - Keras' choice
    base = Path(os.path.expanduser(os.environ.get("KERAS_HOME", usual)))
    there = next(each for each in (base, *base.parents) if each.exists())
    return (base if os.access(there, os.W_OK) else Path("/tmp/.keras")) / "models"  # noqa: S108


def pauses(first: float = 0.1, longest: float = 5.0) -> Iterator[float]:
    """Yield seconds to wait between attempts, doubling up to `longest`.

    Each is shortened by up to a fifth at random, so that many processes that lost the same Redis do not all come back
    at the same instant.
    """
    pause = first
    while True:
        yield pause * random.uniform(0.8, 1.0)
        pause = min(pause * 2, longest)


def available_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its cgroups, rounded up."""
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), quota)))


def cgroup_quota(own: Path, root: Path) -> float:
    """Return the least quota of the cgroups in the file `own` and those above them, in cores; infinite where none is.

    `root` is where they are mounted. A container sees its own cgroup there, whatever path the host knows it by.
    """
    quotas = [math.inf]
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mount = root / controllers if controllers else root
            if controllers and "cpu" not in controllers.split(","):
                continue
            folder = mount / path.strip("/")
            quotas += [quota_of(each) for each in (folder, *folder.parents) if each.is_relative_to(mount)]
            quotas.append(quota_of(root / "cpu"))
    return min(quotas)


def quota_of(folder: Path) -> float:
    """Return the quota that a cgroup has, in cores; infinite where it has none. Of version 2, or of version 1."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
            return int(quota) / int(period) if quota.isdecimal() else math.inf  # max, or -1
    return math.inf


def notify_systemd(state: str) -> None:
    """Say of this program what sd_notify(3) knows, as READY=1; nothing where systemd does not ask for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
        messenger.settimeout(1)  # a systemd that does not listen is no reason to stop
        messenger.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        messenger.send(state.encode())


class StartupError(Exception):
    """The program can't run as it is set up; the message is one line that says what to set."""


class ServiceError(Exception):
    """A request that can't be answered as asked.

    The message goes to the client: one plain sentence that says what to do. What a library said stays in the log.
    """

    code = "internal_error"

    def __init__(self, message: str, **more: object) -> None:
        """Keep `message` and, for programs, `more` fields that stand beside the error in the response."""
        super().__init__(message)
        self.more = more
