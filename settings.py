"""Every knob of the service: its name, default, meaning and unit.

A variable of the same name in the environment wins over a line `NAME=value` in the file `.env` beside this module, and
that over the default. An invalid value stops the program with exit code 2 and one line that names the
variable, the value and what is allowed: a service that starts with a guess is worse than one that does not start.
`warnings` tells what is not wrong enough for that, such as a name that is almost one of ours.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from environs import Env, EnvError
from marshmallow import ValidationError
from marshmallow.validate import OneOf, Range, Regexp

EXIT_BAD_SETTING = 2  # restarting with the same settings is of no use; supervisors are told so

# What of a value is not for the log.
_secrets = {"REDIS_URL": r"(?<=//).*(?=@)|(?<=\?).*", "API_KEYS": r"(?s).+"}

_file = Path(__file__).with_name(".env")
_line = re.compile(r"\s*(#.*|(export\s+)?(?P<name>\w+)\s*=.*)?")
_lines_of: dict[str, list[int]] = {}  # where `.env` has each name


def _stop(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(EXIT_BAD_SETTING)


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Stop the program with the one line that says which setting is wrong and what it may be."""
    shown = re.sub(_secrets[name], "***", str(value)) if name in _secrets else str(value)
    shown = "".join(sign if sign.isprintable() else "?" for sign in shown[:200])
    _stop(f"{name}={shown} is invalid: it must be {allowed}.")


def _read_file() -> None:
    """Take `.env` into the environment; its reader would pass over a line that it does not understand."""
    try:
        lines = _file.read_text(encoding="utf-8").splitlines() if _file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        _stop(f"{_file} can't be read ({error}): it needs lines NAME=value, and this user must be let read it.")
    wrong = next((number for number, line in enumerate(lines, 1) if not _line.fullmatch(line)), None)
    if wrong:  # which may hold a secret, so it is not shown
        _stop(f"{_file}, line {wrong} is invalid: it must be NAME=value, or begin with #.")
    for number, line in enumerate(lines, 1):
        if (found := _line.fullmatch(line)) and found["name"]:
            _lines_of.setdefault(found["name"], []).append(number)
    env.read_env(str(_file), recurse=False)


env = Env()
_read_file()


def _read(read: Callable[..., Any], name: str, default: Any, allowed: str, validate: Any = None) -> Any:
    try:
        return read(name, default, validate=validate)
    except (EnvError, ValidationError):
        return refuse(name, env.str(name), allowed)


def _whole(name: str, default: int, low: int, high: int) -> int:
    value: int = _read(env.int, name, default, f"a whole number from {low} to {high}", Range(low, high))
    return value


def _whole_or_none(name: str, low: int, high: int) -> int | None:
    """Return the number, or None where the variable is empty or not there."""
    return _whole(name, low, low, high) if env.str(name, "") else None


def _seconds(name: str, default: float, low: float, high: float) -> float:
    value: float = _read(env.float, name, default, f"a number of seconds from {low:g} to {high:g}", Range(low, high))
    return value


def _one_of(name: str, default: str, choices: list[str]) -> str:
    value: str = _read(env.str, name, default, "one of " + ", ".join(choices), OneOf(choices))
    return value


def _listed(name: str, all_of_them: str) -> str:
    """Return those of the words that the variable lists, in capitals and separated by commas; the default is all."""
    named = {value.strip().upper() for value in env.str(name, all_of_them).split(",")}
    choices = all_of_them.split(",")
    if not named <= set(choices):
        refuse(name, env.str(name), f"one or more of {all_of_them}, separated by commas")
    return ",".join(choice for choice in choices if choice in named)


def _matching(name: str, default: str, pattern: str, allowed: str) -> str:
    value: str = _read(env.str, name, default, allowed, Regexp(rf"(?:{pattern})\Z", re.ASCII))
    return value


def _is_rate_limit(text: str) -> bool:
    import limits  # noqa: PLC0415 - a megabyte that nobody needs without a limit

    try:
        parsed = limits.parse_many(text)
    except ValueError:
        return False
    return all(each.amount > 0 and each.get_expiry() <= 366 * 86400 for each in parsed)


_host = r"([a-z0-9._-]+|\[[0-9a-f:.]+\])"
# An origin as browsers send it, who leave a scheme's own port out: any other would never match.
_origin = (
    rf"(http://{_host}(:(?!80\b)\d+)?|https://{_host}(:(?!443\b)\d+)?|(?!https?:)[a-z][a-z0-9+.-]*://{_host}(:\d+)?)"
)
_key = r"[A-Za-z0-9._~+/=-]{16,}"  # what RFC 6750 lets a bearer token be, and long enough not to be guessed


# Where Redis is. REDIS_URL, if set, wins over the three others: redis://user:password@host:port/db, rediss:// for TLS,
# or unix:///path?db=0.
REDIS_HOST = _matching("REDIS_HOST", "localhost", r"[^\s/@]+", "a host name or an address")
REDIS_PORT = _whole("REDIS_PORT", 6379, 1, 65535)
REDIS_DB = _whole("REDIS_DB", 0, 0, 1_000_000)
REDIS_URL = _matching(
    "REDIS_URL", "", r"|(redis|rediss|unix)://\S+", "a URL that begins with redis://, rediss:// or unix://"
)

# What is put on the queue: pixels and channels (3 is RGB, 1 is grey), and how each value is stored. Empty: what the
# model takes, which the web learns from the model server. The tutorial's float32 takes four times the bytes for the
# same pixels: the model's own preprocessing is the model server's.
IMAGE_WIDTH = _whole_or_none("IMAGE_WIDTH", 1, 4096)
IMAGE_HEIGHT = _whole_or_none("IMAGE_HEIGHT", 1, 4096)
IMAGE_CHANS = _whole_or_none("IMAGE_CHANS", 1, 3)
IMAGE_DTYPE = _one_of("IMAGE_DTYPE", "uint8", ["uint8", "float32"])
# The filter of the resize, by Pillow's names. bicubic is what the tutorial's one-argument `resize` means in today's
# Pillow; in 2018 it meant nearest.
IMAGE_RESAMPLE = _one_of("IMAGE_RESAMPLE", "bicubic", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])

# The Redis list that jobs wait in; also the prefix of every other key.
IMAGE_QUEUE = _matching("IMAGE_QUEUE", "image_queue", r"[\w.-]+", "made of letters, digits, '_', '.' and '-'")
# The most images in one batch.
BATCH_SIZE = _whole("BATCH_SIZE", 32, 1, 1024)
# Seconds: the longest that one poll of the queue blocks. An arrival ends the poll at once, so this costs no latency; it
# bounds how late a stop or a lost connection is noticed.
SERVER_SLEEP = _seconds("SERVER_SLEEP", 0.25, 0.01, 5)
# Seconds from upload to answer; then 504, and the job is never computed. Apache's own limit is 300
# (deploy/apache/000-default.conf): the service must be the one that says what went wrong.
REQUEST_TIMEOUT = _seconds("REQUEST_TIMEOUT", 60, 0.5, 240)
# The same for a poll of a result. Longer than the tutorial's, since each of hundreds of waiting requests polls: at four
# a second, 500 of them would take a third of a core.
CLIENT_SLEEP = _seconds("CLIENT_SLEEP", min(2.0, REQUEST_TIMEOUT / 2), 0.01, 5)
# Seconds that a request which is not yet queued waits for a Redis that does not answer; then 503.
REDIS_TIMEOUT = _seconds("REDIS_TIMEOUT", min(30.0, REQUEST_TIMEOUT / 2), 0.1, 240)
# Jobs that may wait; beyond it 503.
MAX_QUEUE = _whole("MAX_QUEUE", 1000, 1, 1_000_000)
# Bytes of a request's body; beyond it 413.
MAX_UPLOAD_BYTES = _whole("MAX_UPLOAD_BYTES", 16 * 2**20, 1024, 2**30)
# Pixels of an image that have to be decoded; beyond it 413. Phones make 50 or 64 megapixels, and their 200 are baseline
# JPEG, of which as little as a 64th is decoded.
MAX_IMAGE_PIXELS = _whole("MAX_IMAGE_PIXELS", 65_000_000, 1, 1_000_000_000)
# Bytes of memory that all images which are being decoded on this machine may take together. An image waits until it
# fits; one that does not fit alone is 413.
MAX_DECODE_BYTES = _whole("MAX_DECODE_BYTES", 720_000_000, 10_000_000, 10**12)
# The formats that are taken; others are 400.
IMAGE_FORMATS = _listed("IMAGE_FORMATS", "JPEG,PNG,GIF,WEBP,BMP,TIFF,HEIC,AVIF")

# Images in one request; beyond it 413.
MAX_IMAGES = _whole("MAX_IMAGES", 32, 1, 1000)

# Keys of which a client of /predict must send one, as `Authorization: Bearer KEY`. Separated by commas, so that a new
# one can be given out before the old one is taken away. Empty: whoever reaches the service may use it.
API_KEYS = _matching(
    "API_KEYS",
    "",
    rf"|{_key}(,{_key})*",
    "keys of 16 or more letters, digits and -._~+/=, separated by commas, such as `openssl rand -hex 24` makes",
)
# How many requests to /predict a client may make, in the notation of the package `limits`, as 100/minute or
# 10/second;1000/hour. A client is a key, or without API_KEYS an address. Empty: as many as it likes.
RATE_LIMIT = env.str("RATE_LIMIT", "")

# Origins whose pages may call the service from a browser (CORS), or * for all. Empty: the service's own page only.
CORS_ORIGINS = _matching(
    "CORS_ORIGINS",
    "",
    rf"|\*|{_origin}(,{_origin})*",
    "* or origins as browsers send them, such as https://app.example or http://localhost:3000, separated by commas: "
    "lower case, without a path, a / at the end, or :80 and :443",
)

# A name in keras.applications, or the path of a .keras or .h5 file. model_checks.py looks whether it is there. Where it
# is not set or empty, deploy/default_model.py chooses for bin/serve, bin/install and containers.
MODEL = (
    _matching("MODEL", "", r"|[\w-]+|.*[./].*", "a name in keras.applications or the path of a .keras or .h5 file")
    or "ResNet50"
)
# imagenet, random (seeded; for load tests), or the path of a weights file.
MODEL_WEIGHTS = _matching(
    "MODEL_WEIGHTS",
    "imagenet",
    r"imagenet|random|.+\.(h5|hdf5|keras)",
    "imagenet, random, or the path of a .h5 or .keras file",
)
# A file with one class a line. Empty: ImageNet's for keras.applications, else what <model>.json says or
# <model>.labels.txt, beside the model.
LABELS = env.str("LABELS", "")
# What the model computes in: Keras' names. bfloat16 and float16 are faster on what has instructions for them, and right
# to two or three digits; the last layer stays in float32.
DTYPE_POLICY = _one_of("DTYPE_POLICY", "float32", ["float32", "mixed_bfloat16", "mixed_float16"])
# Whether XLA compiles the model, once for each batch size: a longer start, for a GPU that then has less to do.
XLA = _read(env.bool, "XLA", False, "true or false")
# Predictions in an answer. Empty: what <model>.json says, or 5.
TOP = _whole_or_none("TOP", 1, 1000)

# Of a model server: where Prometheus finds its metrics. With --gpu N the port is N more. 0: nowhere.
METRICS_PORT = _whole("METRICS_PORT", 0, 0, 65535)
METRICS_HOST = _matching("METRICS_HOST", "127.0.0.1", r"[^\s/@]+", "an address of this host, or 0.0.0.0 for all")
# How both programs write their logs: text for people, or json for what collects logs, a line an event either way.
LOG_FORMAT = _one_of("LOG_FORMAT", "text", ["text", "json"])

if IMAGE_CHANS == 2:
    refuse("IMAGE_CHANS", IMAGE_CHANS, "3 (RGB) or 1 (grey)")
# Of bin/serve: the port of its Apache, and how many model servers it runs.
PORT = _whole("PORT", 8080, 1, 65535)
MODEL_SERVERS = _whole("MODEL_SERVERS", 1, 1, 64)

if RATE_LIMIT and not _is_rate_limit(RATE_LIMIT):
    refuse("RATE_LIMIT", RATE_LIMIT, "such as 100/minute, 10/second or both as 10/second;100/minute, up to a year")

for _name in ("REDIS_TIMEOUT", "CLIENT_SLEEP"):
    if globals()[_name] >= REQUEST_TIMEOUT:
        refuse(_name, f"{globals()[_name]:g}", f"less than REQUEST_TIMEOUT, which is {REQUEST_TIMEOUT:g}")


def image_shape(own: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the (height, width, channels) that IMAGE_* ask for; where they are empty, those of `own`."""
    height, width, channels = own
    return IMAGE_HEIGHT or height, IMAGE_WIDTH or width, IMAGE_CHANS or channels


def image_is_set() -> bool:
    """Whether IMAGE_* say all of that, so that the model need not be asked."""
    return bool(IMAGE_HEIGHT and IMAGE_WIDTH and IMAGE_CHANS)


# Names that are none of ours

# What others call what we have, where the letters alone would not tell.
_synonyms = {
    **dict.fromkeys(["API_TOKEN", "API_TOKENS", "AUTH_TOKEN", "AUTH_TOKENS", "BEARER_TOKEN"], "API_KEYS"),
    **dict.fromkeys(["REDIS_PASSWORD", "REDIS_PASS", "REDIS_AUTH", "REDIS_USER", "REDIS_USERNAME"], "REDIS_URL"),
    **dict.fromkeys(["REDIS_TLS", "REDIS_SSL", "REDIS_URI"], "REDIS_URL"),
    **dict.fromkeys(["MAX_UPLOAD_SIZE", "MAX_FILE_SIZE", "MAX_CONTENT_LENGTH", "MAX_BODY_SIZE"], "MAX_UPLOAD_BYTES"),
    **dict.fromkeys(["MAX_PIXELS", "MAX_IMAGE_SIZE"], "MAX_IMAGE_PIXELS"),
    **dict.fromkeys(["MODEL_PATH", "MODEL_FILE", "MODEL_NAME"], "MODEL"),
    **dict.fromkeys(["RATE_LIMITING", "THROTTLE"], "RATE_LIMIT"),
    "TIMEOUT": "REQUEST_TIMEOUT",
    "WEIGHTS": "MODEL_WEIGHTS",
}
# What Keras, its backends, Python and compose.yaml read themselves, however much it looks like ours.
_of_others = re.compile(
    r"(KERAS|TF|TENSORFLOW|TORCH|PYTORCH|JAX|XLA|CUDA|NVIDIA|NCCL|OMP|MKL|PYTHON\w*|PIP|COMPOSE|DOCKER|APACHE)_\w+"
    r"|OWN_MODELS|WEB_PROCESSES|WEB_THREADS"
)
_ours = [name for name in globals() if name.isupper() and not name.startswith("_") and name != "EXIT_BAD_SETTING"]


def _letters(name: str) -> str:
    return name.upper().replace("_", "")


def _meant(name: str) -> str | None:
    """Return the setting that a name in `.env` is probably meant to be; None for one of ours, and for any other."""
    if name in _ours or _of_others.fullmatch(name):
        return None
    by_letters = {_letters(each): each for each in _ours}
    # One letter more or less makes another word of a short one, such as MODE.
    close = difflib.get_close_matches(_letters(name), by_letters, 1, cutoff=0.8 if len(name) > 5 else 0.9)
    return _synonyms.get(name.upper()) or (by_letters[close[0]] if close else None)


def _misspelt(name: str) -> str | None:
    """Return the setting that a variable of the environment is, but for case and underscores: others' names live there.

    API_KEY is the one that simple_request.py reads, and `port`, say, may be anybody's.
    """
    same = next((each for each in _ours if _letters(each) == _letters(name)), None)
    return same if same != name and "_" in (same or "") else None


def warnings() -> list[str]:
    """Return what is odd about the names in `.env` and in the environment, a line each and without their values."""
    found = [
        f"{_file} has {name} in lines {' and '.join(map(str, lines))}: the last one counts."
        for name, lines in _lines_of.items()
        if len(lines) > 1
    ]
    places = [(str(_file), _meant, _lines_of), ("the environment", _misspelt, os.environ.keys() - _lines_of.keys())]
    for place, guess, names in places:
        for name in names:
            if (meant := guess(name)) and not env.str(meant, ""):
                found.append(f"{place} has {name}, which is no setting and changes nothing: did you mean {meant}?")
    return found
