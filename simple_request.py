#!/usr/bin/env python3
"""Send images to the service and print its predictions, most probable first.

    simple_request.py photo.jpg
    simple_request.py photo.jpg more.png a/folder --json
    simple_request.py three.png --model digits
    cat photo.jpg | simple_request.py -

Exit code: 0 if all images were answered, 1 if some were not, 2 for bad arguments.
"""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.util import Retry

KERAS_REST_API_URL = "http://localhost:8080/predict"
IMAGE_PATH = Path(__file__).parent / "images" / "cat.jpg"
STDIN = Path("-")
# Files with these suffixes are the images in a folder.
SUFFIXES = {f".{end}" for end in ["jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "heic", "heif", "avif"]}
LONGEST_WAIT = 60  # seconds; a longer Retry-After is cut to this


class Output(io.FileIO):
    """Standard output or error that ignores a closed pipe, as after `| head -1`."""

    reader_left = False

    def write(self, data: Any) -> int:
        """Write `data`, or drop it if the pipe is closed."""
        try:
            return super().write(data)
        except BrokenPipeError:
            self.reader_left = True
            return len(data)


def ignore_closed_pipes() -> None:
    """Replace standard output and error by an Output."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream:  # None if the shell has closed it
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            unbuffered = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, None, stream.isatty(), unbuffered)
            setattr(sys, name, text)


def output_is_read() -> bool:
    """Return False once the reader of standard output has closed its pipe."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not (isinstance(raw, Output) and raw.reader_left)


class ClientError(Exception):
    """The message is one sentence that tells the user what to do."""


def full_address(url: str, model: str | None) -> str:
    """Return the URL, with the path /predict if it has none, followed by the name of the model if one is given."""
    parts = urlsplit(url)
    path = parts.path if parts.path.strip("/") else "/predict"
    return parts._replace(path=f"{path.rstrip('/')}/{model}" if model else path).geturl()


def model_name(text: str) -> str:
    """Return the name of a model."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise argparse.ArgumentTypeError("must be the name of a model: letters, digits, '_', '.' and '-'")
    return text


def api_key(text: str) -> str:
    """Return the key without whitespace around it, such as the newline of a file."""
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise argparse.ArgumentTypeError("must be letters, digits and symbols on one line")
    return key


class Unreachable(ClientError):
    """The service can't be reached, so the remaining images would fail too."""


class RetryWhenTold(Retry):
    """Retries only if the answer has a Retry-After header."""

    RETRY_AFTER_STATUS_CODES = frozenset({429, 503})

    def sleep_for_retry(self, response: BaseHTTPResponse) -> bool:
        """Tell the user how long the service asks to wait, and wait."""
        seconds = self.get_retry_after(response)
        if seconds is not None:
            print(f"The service asks to wait {seconds:.0f} s before another try.", file=sys.stderr, flush=True)
        return super().sleep_for_retry(response)


def session_with_retries(retries: int, key: str) -> requests.Session:
    """Return a session that retries as the service asks, and sends the key unless it is empty."""
    session = requests.Session()
    retry = RetryWhenTold(
        retries, connect=0, read=False, redirect=False, other=False, allowed_methods=None, raise_on_status=False,
        retry_after_max=LONGEST_WAIT,
    )  # fmt: skip
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def images(sources: list[Path]) -> Iterator[Path]:
    """Yield the given files (- for standard input) and the images in the given folders."""
    for source in sources:
        if source.is_dir():
            yield from folder(source)
        else:
            yield source


def folder(path: Path) -> list[Path]:
    """Return the images in a folder, sorted by name."""
    try:
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ClientError(f"Cannot read {path} ({error.strerror}): give the path of an image.") from error
    if not found:
        raise ClientError(f"Cannot read {path} (this folder has no images): give the path of an image.")
    return found


def read(image: Path) -> bytes:
    """Return the bytes of an image."""
    try:
        return sys.stdin.buffer.read() if image == STDIN else image.read_bytes()
    except OSError as error:
        raise ClientError(f"Cannot read {image} ({error.strerror}): give the path of an image.") from error


def post(session: requests.Session, image: bytes, url: str, model: str | None, timeout: float) -> requests.Response:
    """Send the image as the form field `image` to the model, or to the default model."""
    try:
        # Following a redirect would turn the POST into a GET and hide that the URL is wrong.
        return session.post(full_address(url, model), files={"image": image}, timeout=timeout, allow_redirects=False)
    except requests.Timeout as error:
        raise Unreachable(f"No answer from {url} in {timeout:g} s: try later or raise --timeout.") from error
    except ValueError as error:  # every exception of requests about an invalid URL is a ValueError
        raise Unreachable(f"{url!r} is not an address: give --url as http://host:port.") from error
    except requests.RequestException as error:
        raise Unreachable(f"No answer from {url}: start the service there or give its --url.") from error


def predictions(response: requests.Response) -> list[dict[str, Any]]:
    """Return the predictions in the answer. Raises ClientError if it has none."""
    try:
        answer = response.json()
        if response.status_code != 200 or answer["success"] is not True:
            raise ClientError(f"{answer['error']['message']} (status {response.status_code})")
        return [
            {"label": str(each["label"]), "probability": float(each["probability"])} for each in answer["predictions"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{response.url} answered with status {response.status_code}, but not as this service does"
        raise ClientError(f"{problem}: give the address of the service with --url.") from error


def show(image: Path, found: list[dict[str, Any]], *, as_json: bool, named: bool) -> None:
    """Print the predictions for an image."""
    if as_json:
        print(json.dumps({"image": str(image), "predictions": found}), flush=True)
        return
    lines = [str(image)] if named else []
    lines += [f"{rank}. {each['label']}: {each['probability']:.4f}" for rank, each in enumerate(found, start=1)]
    print(*lines, sep="\n", flush=True)


def print_error(error: ClientError) -> None:
    """Print the message on one line, even if it has several."""
    print(" ".join(str(error).split()), file=sys.stderr, flush=True)


def ask_all(options: argparse.Namespace) -> bool:
    """Classify the images one by one and print the predictions; return whether all were answered."""
    named = len(options.image) > 1 or options.image[0].is_dir()
    answered = True
    with session_with_retries(options.retries, options.api_key) as session:
        for image in images(options.image):
            try:
                found = predictions(post(session, read(image), options.url, options.model, options.timeout))
                show(image, found, as_json=options.json, named=named)
            except Unreachable:
                raise
            except ClientError as error:
                print_error(ClientError(f"{image}: {error}") if named else error)
                answered = False
            if not output_is_read():
                break
    return answered


def main() -> int:
    """Return the exit code: 0 if every image was answered, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="*", type=Path, default=[IMAGE_PATH],
                        help=f"files, folders of images, or - for standard input (default: {IMAGE_PATH})")  # fmt: skip
    parser.add_argument("--url", default=KERAS_REST_API_URL, help="default: %(default)s")
    parser.add_argument("--model", type=model_name, metavar="NAME", help="default: the service's default model")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of silence before giving up (%(default)s)")
    parser.add_argument("--retries", type=int, default=3,
                        help="most retries after an answer with Retry-After (%(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
    key = os.environ.get("API_KEY", "")
    parser.add_argument("--api-key", type=api_key, default=key, help="default: the environment variable API_KEY")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack characters of a label
    if not 0 < options.timeout <= 86400:
        parser.error("--timeout takes seconds, more than 0 and at most 86400")
    if not 0 <= options.retries <= 1000:
        parser.error("--retries takes a number from 0 to 1000")
    try:
        return 0 if ask_all(options) else 1
    except ClientError as error:
        print_error(error)
        return 1


if __name__ == "__main__":
    ignore_closed_pipes()
    sys.exit(main())
