"""Every setting, declared once: its name, default, unit, meaning and allowed values.

A variable in the environment wins over a line NAME=value in the file `.env` beside this module, which wins over the
default. An invalid value stops the program with exit code 2 and one line that names the setting, the value and what is
allowed. `warnings()` reports names that look like misspelled settings.

docs/generate_settings.py writes docs/settings.md and .env.example from the declarations below.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from environs import Env, EnvError

EXIT_BAD_SETTING = 2  # supervisors do not restart a program that exits with it: it would only fail again


class Setting(NamedTuple):
    """What docs/settings.md says about a setting."""

    name: str
    default: object
    unit: str
    meaning: str
    allowed: str


sections: dict[str, list[Setting]] = {}  # the settings under each heading of docs/settings.md

_Value = TypeVar("_Value")
_secrets = {"REDIS_URL": r"(?<=//).*(?=@)|(?<=\?).*", "API_KEYS": r"(?s).+"}  # the parts that must not reach the log
_file = Path(__file__).with_name(".env")
_line = re.compile(r"\s*(#.*|(export\s+)?(?P<name>\w+)\s*=.*)?")
_lines_of: dict[str, list[int]] = {}  # the numbers of the lines in `.env` that set each name
env = Env()


def _stop(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(EXIT_BAD_SETTING)


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Stop the program with one line that names the setting, its value and what is allowed."""
    shown = re.sub(_secrets[name], "***", str(value)) if name in _secrets else str(value)
    shown = "".join(char if char.isprintable() else "?" for char in shown[:200])
    _stop(f"{name}={shown} is invalid: it must be {allowed}.")


def _read_file() -> None:
    """Load `.env` into the environment. Stop at an invalid line, which environs would skip silently."""
    try:
        lines = _file.read_text(encoding="utf-8").splitlines() if _file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        _stop(f"{_file} can't be read ({error}): it must be a text file that this user may read.")
    for number, line in enumerate(lines, 1):
        if not (found := _line.fullmatch(line)):  # the line may hold a secret, so it is not shown
            _stop(f"{_file}, line {number} is invalid: it must be NAME=value, or begin with #.")
        if found["name"]:
            _lines_of.setdefault(found["name"], []).append(number)
    env.read_env(str(_file), recurse=False)
    for name in ("KERAS_BACKEND", "KERAS_HOME"):  # Keras reads the environment only, and environs leaves that as it is
        if given(name):
            os.environ[name] = given(name)


def given(name: str) -> str:
    """Return what the environment or `.env` sets the variable `name` to; "" if neither sets it."""
    value: str = env.str(name, "")
    return value


def _read(parse: Callable[..., Any], default: _Value, valid: Callable[[_Value], object], setting: Setting) -> _Value:
    next(reversed(sections.values())).append(setting)
    try:
        value: _Value = parse(setting.name, default)
    except EnvError:
        refuse(setting.name, env.str(setting.name), setting.allowed)
    return value if valid(value) else refuse(setting.name, env.str(setting.name), setting.allowed)


def _integer(name: str, default: int, limits: tuple[int, int], unit: str, meaning: str) -> int:
    low, high = limits
    setting = Setting(name, default, unit, meaning, f"a whole number from {low} to {high}")
    return _read(env.int, default, lambda value: low <= value <= high, setting)


def _optional(name: str, choices: Sequence[int], allowed: str, unit: str, meaning: str) -> int | None:
    """Return the number, or None if the variable is empty or missing."""
    parse = env.int if given(name) else lambda *_: None
    setting = Setting(name, "", unit, meaning, f"{allowed}, or empty")
    return _read(parse, None, lambda value: value is None or value in choices, setting)


def _seconds(name: str, default: float, limits: tuple[float, float], meaning: str, below: float = inf) -> float:
    """Return a number of seconds. If `below` is given, it is REQUEST_TIMEOUT, and the number must be less."""
    low, high = limits
    setting = Setting(name, default, "seconds", meaning, f"a number of seconds from {low:g} to {high:g}")
    value = _read(env.float, min(float(default), below / 2), lambda value: low <= value <= high, setting)
    return value if value < below else refuse(name, f"{value:g}", f"less than REQUEST_TIMEOUT, which is {below:g}")


def _one_of(name: str, default: str, choices: list[str], meaning: str) -> str:
    setting = Setting(name, default, "", meaning, "one of " + ", ".join(choices))
    return _read(env.str, default, lambda value: value in choices, setting)


def _subset(name: str, choices: str, meaning: str) -> str:
    """Return the choices that the variable lists, in the order of `choices`, which is also the default."""
    setting = Setting(name, choices, "", meaning, f"one or more of {choices}, separated by commas")
    listed = _read(env.str, choices, lambda value: _words(value) <= _words(choices), setting)
    return ",".join(choice for choice in choices.split(",") if choice in _words(listed))


def _words(text: str) -> set[str]:
    return {word.strip().upper() for word in text.split(",")}


def _text(name: str, default: str, pattern: str, allowed: str, meaning: str) -> str:
    matches = re.compile(pattern, re.ASCII).fullmatch
    return _read(env.str, default, matches, Setting(name, default, "", meaning, allowed))


def _is_rate_limit(text: str) -> bool:
    import limits  # noqa: PLC0415 - takes a megabyte of memory, and only RATE_LIMIT needs it

    try:
        parsed = limits.parse_many(text)
    except ValueError:
        return False
    return all(each.amount > 0 and each.get_expiry() <= 366 * 86400 for each in parsed)


_host = r"([a-z0-9._-]+|\[[0-9a-f:.]+\])"
# Browsers omit the default port of http and https, so an origin with that port would never match.
_web_origin = rf"http://{_host}(:(?!80\b)\d+)?|https://{_host}(:(?!443\b)\d+)?"
_origin = rf"({_web_origin}|(?!https?:)[a-z][a-z0-9+.-]*://{_host}(:\d+)?)"
_key = r"[A-Za-z0-9._~+/=-]{16,}"  # the characters of a bearer token (RFC 6750), at least 16 against guessing

_read_file()

# fmt: off
sections["Redis"] = []
REDIS_HOST = _text("REDIS_HOST", "localhost", r"[^\s/@]+", "a host name or an address", "The host that Redis runs on.")
REDIS_PORT = _integer("REDIS_PORT", 6379, (1, 65535), "", "The port of Redis.")
REDIS_DB = _integer("REDIS_DB", 0, (0, 1_000_000), "", "The number of the Redis database.")
REDIS_URL = _text("REDIS_URL", "", r"|(redis|rediss|unix|sentinel|sentinels)://\S+",
    "a URL that begins with redis://, rediss://, unix://, sentinel:// or sentinels://",
    "Replaces the three above: `redis://user:password@host:port/db`, `rediss://` for TLS, `unix:///path?db=0`, or "
    "`sentinel://user:password@host:port,host:port/name/db` for Sentinels and the name of their primary, "
    "`sentinels://` for TLS.")
IMAGE_QUEUE = _text("IMAGE_QUEUE", "image_queue", r"[\w.-]+", "a name of letters, digits, '_', '.' and '-'",
    "The Redis list of waiting jobs, and the prefix of other keys.")

sections["The model"] = []
MODEL = _text("MODEL", "ResNet50", r"|[\w-]+|.*[./].*",
    "a name in keras.applications or the path of a .keras or .h5 file",
    "The model to serve. If it is not set, `bin/serve`, `bin/install` and the containers use the bundled model when "
    "ResNet50's weights are not available.") or "ResNet50"
MODELS = _text("MODELS", "", r"[^,]*(,[^,]+)*",
    "models as in MODEL, separated by commas",
    "Serve several models: `bin/serve` and `bin/install` run a model server for each, and `/predict/NAME` asks one. "
    "Replaces MODEL.")
DEFAULT_MODEL = _text("DEFAULT_MODEL", "", r"[\w.-]*", "the name of a model, such as digits for models/digits.keras",
    "The model that `/predict` asks. Empty: the first of MODELS, otherwise MODEL.")
MODEL_WEIGHTS = _text("MODEL_WEIGHTS", "imagenet", r"imagenet|random|.+\.(h5|hdf5|keras)",
    "imagenet, random, or the path of a .h5 or .keras file",
    "The weights of a model from `keras.applications`. Random weights are for load tests.")
LABELS = _text("LABELS", "", r".*", "the path of a file, or empty",
    "A UTF-8 file with one class per line. Empty: ImageNet's classes for `keras.applications`; for `name.keras` the "
    "labels in `name.json` or in `name.labels.txt`.")
TOP = _optional("TOP", range(1, 1001), "a whole number from 1 to 1000", "predictions",
    "Predictions in an answer. Empty: what `name.json` says, otherwise 5.")
BATCH_SIZE = _integer("BATCH_SIZE", 32, (1, 1024), "images",
    "The most images in one batch. A model server takes fewer if warm-up shows that more are no faster.")
DTYPE_POLICY = _one_of("DTYPE_POLICY", "float32", ["float32", "mixed_bfloat16", "mixed_float16"],
    "The number format that the model computes in. The last layer stays in float32.")
XLA = _read(env.bool, False, lambda value: True, Setting("XLA", "false", "",
    "Whether XLA compiles a TensorFlow model, once for each batch size. The start takes longer, and the GPU has less "
    "work. JAX always uses XLA, PyTorch never does.", "true or false"))

sections["Time limits and the queue"] = []
# Apache gives up after 300 seconds. The service must give up first, because its error says why.
REQUEST_TIMEOUT = _seconds("REQUEST_TIMEOUT", 60, (0.5, 240),
    "From the end of the upload to the answer. After that the client gets 504, and the image is dropped.")
REDIS_TIMEOUT = _seconds("REDIS_TIMEOUT", 30, (0.1, 240),
    "How long the web tries to queue an image while Redis does not answer. After that, 503. If it is not set, at most "
    "half of REQUEST_TIMEOUT.", REQUEST_TIMEOUT)
MAX_QUEUE = _integer("MAX_QUEUE", 1000, (1, 1_000_000), "images", "The most images in the queue. Beyond that, 503.")
SERVER_SLEEP = _seconds("SERVER_SLEEP", 0.25, (0.01, 5),
    "The longest time that a model server blocks on an empty queue. A new job wakes it at once, so this adds no "
    "latency. It only limits how late the server notices a stop.")
# Longer than the tutorial's 0.25: with 500 waiting requests, four polls a second for each would take a third of a core.
CLIENT_SLEEP = _seconds("CLIENT_SLEEP", 2, (0.01, 5),
    "The longest time that the web blocks on a result before it checks that Redis still has the job. If it is not set, "
    "at most half of REQUEST_TIMEOUT.", REQUEST_TIMEOUT)

sections["Uploads"] = []
MAX_UPLOAD_BYTES = _integer("MAX_UPLOAD_BYTES", 16 * 2**20, (1024, 2**30), "bytes",
    "The largest request (16 MB), after decompression. Beyond that, 413. In production set it in Apache's site too, "
    "which refuses requests larger than ten times its own value.")
MAX_IMAGES = _integer("MAX_IMAGES", 32, (1, 1000), "images", "Images in one request. Beyond that, 413.")
MAX_IMAGE_PIXELS = _integer("MAX_IMAGE_PIXELS", 65_000_000, (1, 1_000_000_000), "pixels",
    "The most pixels to decode for one image. Beyond that, 413. A baseline JPEG is decoded at a smaller scale, so it "
    "may have four times as many: enough for a phone's 200 megapixels.")
MAX_DECODE_BYTES = _integer("MAX_DECODE_BYTES", 720_000_000, (10_000_000, 10**12), "bytes",
    "Memory for all images that are decoded at once, and for large JSON under `/v2`, in all web processes. An image "
    "takes 4 to 14 bytes per pixel and waits until it fits. One that needs more than all of it gets 413.")
IMAGE_FORMATS = _subset("IMAGE_FORMATS", "JPEG,PNG,GIF,WEBP,BMP,TIFF,HEIC,AVIF", "Accepted formats. Others get 400.")

sections["Images on their way to the model"] = []
IMAGE_WIDTH = _optional("IMAGE_WIDTH", range(1, 4097), "a whole number from 1 to 4096", "pixels",
    "The width of the images on the queue. Empty: the model's input width, which the web learns from the model server.")
IMAGE_HEIGHT = _optional("IMAGE_HEIGHT", range(1, 4097), "a whole number from 1 to 4096", "pixels",
    "The height of the images on the queue. Empty: the model's.")
IMAGE_CHANS = _optional("IMAGE_CHANS", [1, 3], "3 (RGB) or 1 (gray)", "channels",
    "The channels of the images on the queue. Empty: the model's.")
IMAGE_DTYPE = _one_of("IMAGE_DTYPE", "uint8", ["uint8", "float32"],
    "The type of a pixel on the queue. Its values are 0 to 255 either way. float32 takes four times the bytes.")
IMAGE_RESAMPLE = _one_of("IMAGE_RESAMPLE", "bicubic", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"],
    "The resize filter, by Pillow's name. bicubic is Pillow's default; in 2018 it was nearest. A large JPEG is first "
    "decoded at a half, a quarter or an eighth of its size, but at least 1.3 times the model's input.")

sections["Access"] = []
API_KEYS = _text("API_KEYS", "", rf"|{_key}(,{_key})*",
    "keys of 16 or more letters, digits and -._~+/=, separated by commas; `openssl rand -hex 24` makes one",
    "A client that sends images must send one of these keys as `Authorization: Bearer KEY`. Empty: no key is needed. "
    "With two keys, you can hand out a new one before you withdraw the old one.")
RATE_LIMIT = _read(env.str, "", lambda value: not value or _is_rate_limit(value), Setting("RATE_LIMIT", "", "",
    "How often one client may send images. A client is a key, or an IP address if API_KEYS is empty. Empty: no "
    "limit.", "one or more rates, such as 100/minute or 10/second;100/minute, over periods up to a year"))
CORS_ORIGINS = _text("CORS_ORIGINS", "", rf"|\*|{_origin}(,{_origin})*",
    "* or origins as browsers send them, such as https://app.example or http://localhost:3000, separated by commas: "
    "in lower case, without a path, a / at the end, or the default ports :80 and :443",
    "The origins of the web pages that may call the service. Empty: only the service's own page. In production set it "
    "in Apache's site too.")

sections["Metrics and logs"] = []
METRICS_PORT = _integer("METRICS_PORT", 0, (0, 65535), "",
    "The port of a model server's Prometheus metrics and its `/livez` and `/readyz`. `--gpu N` adds N to it. 0: "
    "none.")
METRICS_HOST = _text("METRICS_HOST", "127.0.0.1", r"[^\s/@]+", "an address of this host, or 0.0.0.0 for all of them",
    "The address that serves them.")
LOG_FORMAT = _one_of("LOG_FORMAT", "text", ["text", "json"], "How both programs write their logs, one line per event.")

sections["bin/serve only"] = []
PORT = _integer("PORT", 8080, (1, 65535), "", "The port that Apache listens on.")
MODEL_SERVERS = _integer("MODEL_SERVERS", 1, (1, 64), "", "How many model servers to run for each model.")
# fmt: on


def models() -> list[str]:
    """Return the models of MODELS, in order; an empty list if it is not set."""
    return [each.strip() for each in MODELS.split(",") if each.strip()]


def image_shape(default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (height, width, channels) from IMAGE_*; a setting that is empty takes its value from `default`."""
    height, width, channels = default
    return IMAGE_HEIGHT or height, IMAGE_WIDTH or width, IMAGE_CHANS or channels


def image_is_set() -> bool:
    """Whether IMAGE_* set the whole shape, so that the model's is not needed."""
    return bool(IMAGE_HEIGHT and IMAGE_WIDTH and IMAGE_CHANS)


# Other programs' names for these settings, where the spelling is too different to guess from.
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
# Variables of Keras, its backends, Python, compose.yaml and other programs: never reported as misspelled.
_foreign = re.compile(
    r"(KERAS|TF|TENSORFLOW|TORCH|PYTORCH|JAX|XLA|CUDA|NVIDIA|NCCL|OMP|MKL|PYTHON\w*|PIP|COMPOSE|DOCKER|APACHE)_\w+"
    r"|OWN_MODELS|WEB_PROCESSES|WEB_THREADS"
)
_names = {setting.name.replace("_", ""): setting.name for section in sections.values() for setting in section}


def _meant_in_file(name: str) -> str | None:
    """Return the setting that a name in `.env` was probably meant to be."""
    if name in _names.values() or _foreign.fullmatch(name):
        return None
    letters = name.upper().replace("_", "")
    # A short name that is one letter off is often another word, such as MODE.
    close = difflib.get_close_matches(letters, _names, 1, cutoff=0.8 if len(name) > 5 else 0.9)
    return _synonyms.get(name.upper()) or (_names[close[0]] if close else None)


def _meant_in_environment(name: str) -> str | None:
    """Return the setting with an underscore whose name differs from `name` only in case or underscores.

    Looser guesses would report variables of other programs, such as a client's API_KEY or `port`.
    """
    meant = _names.get(name.upper().replace("_", ""))
    return meant if meant and meant != name and "_" in meant else None


def warnings() -> list[str]:
    """Return one line for each suspicious name in `.env` and in the environment, without its value."""
    repeated = {name: " and ".join(map(str, lines)) for name, lines in _lines_of.items() if len(lines) > 1}
    guesses: list[tuple[object, str, str | None]] = [(_file, name, _meant_in_file(name)) for name in _lines_of]
    others = os.environ.keys() - _lines_of.keys()
    guesses += [("the environment", name, _meant_in_environment(name)) for name in others]
    return [f"{_file} has {name} in lines {lines}: the last one counts." for name, lines in repeated.items()] + [
        f"{place} has {name}, which is not a setting and has no effect: did you mean {meant}?"
        for place, name, meant in guesses
        if meant and not given(meant)
    ]
