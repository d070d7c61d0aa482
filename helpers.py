"""Shared by both programs: images as base64, log format, pauses between attempts, available cores, errors."""

import binascii
import ctypes
import logging
import math
import os
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pybase64

import settings

Pixels = npt.NDArray[np.generic]
Shape = tuple[int, int, int]  # height, width, channels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # options for set_malloc(), from malloc.h
USUAL_SHAPE: Shape = (224, 224, 3)  # used until a setting or the model gives another one
MOST_SIDE = 4096  # pixels: the largest height or width of an image on the queue


def as_shape(value: object) -> Shape | None:
    """Return `value`, parsed from JSON, as an image shape; None if it is not one that the service takes."""
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(type(each) is int for each in value)):
        return None
    height, width, channels = value
    return (height, width, channels) if min(value) >= 1 and max(value) <= MOST_SIDE and channels in (1, 3) else None


def model_name(model: str) -> str:
    """Return the name that `model`, a path or a name in keras.applications, has in URLs, keys and metrics."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).stem)


def default_model() -> str:
    """Return the name of the model that `/predict` asks, as far as the settings say; "" if they name none."""
    listed = settings.models()
    return settings.DEFAULT_MODEL or model_name(listed[0] if listed else settings.given("MODEL"))


def base64_encode_image(a: Pixels) -> str:
    """Return the bytes of array `a`, in C order, as base64 text for JSON."""
    return pybase64.b64encode_as_string(np.ascontiguousarray(a).data)


def base64_decode_image(a: str, dtype: str, shape: tuple[int, ...]) -> Pixels:
    """Return the array of `dtype` and `shape` in the base64 text `a`. It is read-only, since nothing is copied.

    Raises ValueError if `a` is not base64 or has the wrong number of bytes for the shape.
    """
    try:
        data = pybase64.b64decode(a, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"the image is not base64: {error}") from error
    return as_pixels(data, dtype, shape)


def as_pixels(data: bytes, dtype: str, shape: tuple[int, ...]) -> Pixels:
    """Return `data` as an array of `dtype` and `shape`, read-only and not copied. Raises ValueError."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ValueError(f"the image has {len(data)} bytes, but {shape} of {dtype} takes {expected}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def set_malloc(option: int, value: int) -> None:
    """Set an option of malloc, as in mallopt(3). Does nothing if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(option, value)


def megabytes(count: int) -> str:
    """Return a number of bytes for a message: 16 MB for 2**24."""
    return f"{count / 2**20:.3g} MB" if count >= 2**20 else f"{count / 2**10:.3g} kB"


def megapixels(count: int) -> str:
    """Return a number of pixels for a message: 50 megapixels for 50,000,000."""
    return f"{count / 1e6:.3g} megapixels" if count >= 1e5 else f"{count} pixels"


def log_to_stderr(form: str) -> None:
    """Log each event as one line with its time on standard error.

    `form` is "text" or "json"; "json" adds the event's fields. Lines go to file descriptor 2, because mod_wsgi's
    sys.stderr would add a second timestamp and brackets to each, which are not JSON.
    """
    handler = logging.StreamHandler(open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    handler.setFormatter(json_lines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def json_lines() -> logging.Formatter:
    """Return a formatter that writes JSON objects: time (ISO 8601, UTC), level, message, and the event's fields."""
    from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415 - only LOG_FORMAT=json needs it

    names = {"levelname": "level", "exc_info": "traceback"}
    return JsonFormatter("{levelname}{message}", style="{", rename_fields=names, timestamp="time")


def pauses(first: float = 0.1, longest: float = 2.0) -> Iterator[float]:
    """Yield the seconds to wait between attempts, doubling up to `longest`.

    `longest` is short, because a fail-over may end just after a pause begins. Each is shortened at random by up to a
    fifth, so that processes that lost the same Redis do not all retry at once.
    """
    pause = first
    while True:
        yield pause * random.uniform(0.8, 1.0)
        pause = min(pause * 2, longest)


def available_cores() -> int:
    """Return how many cores this process may use, limited by its affinity and its cgroups' quota, rounded up."""
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), quota)))


def cgroup_quota(own: Path, root: Path) -> float:
    """Return the lowest quota, in cores, of the cgroups in the file `own` and their parents; infinite if there is none.

    Cgroups are mounted at `root`. A container finds its own cgroup directly there, whatever its path on the host.
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
    """Return the quota of a cgroup (version 2 or 1) in cores; infinite if it has none."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
            return int(quota) / int(period) if quota.isdecimal() else math.inf  # max, or -1
    return math.inf


class StartupError(Exception):
    """The program can't start; the message is one line that says what to change."""


class ServiceError(Exception):
    """A request failed.

    The message goes to the client: one plain sentence that says what to do. The texts of libraries stay in the log.
    """

    code = "internal_error"

    def __init__(self, message: str, **more: object) -> None:
        """Store `message`, and in `more` the fields that the JSON response has beside `error`."""
        super().__init__(message)
        self.more = more
