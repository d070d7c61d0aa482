#!/usr/bin/env python3
"""Ask the service what one image shows, and print its answer, most probable first."""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import requests

KERAS_REST_API_URL = "http://localhost:8080/predict"
IMAGE_PATH = Path(__file__).parent / "images" / "three.png"


class ClientError(Exception):
    """Carries the one sentence that tells the user what to do."""


def full_address(url: str) -> str:
    """Return the address with /predict added where only the host was given."""
    parts = urlsplit(url)
    return url if parts.path.strip("/") else parts._replace(path="/predict").geturl()


def api_key(text: str) -> str:
    """Return the key, without the line's end that a file or a paste may have left."""
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise argparse.ArgumentTypeError("must be letters, digits and signs on one line")
    return key


def post(image: Path, url: str, timeout: float, key: str) -> requests.Response:
    """Send the image as the form field `image`, with the key where the service wants one."""
    try:
        payload = {"image": image.read_bytes()}
    except OSError as error:
        raise ClientError(f"Cannot read {image} ({error.strerror}): give the path of an image.") from error
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # A followed redirect would turn the POST into a GET and hide that the address is wrong.
        return requests.post(full_address(url), files=payload, headers=headers, timeout=timeout, allow_redirects=False)
    except requests.Timeout as error:
        raise ClientError(f"No answer from {url} in {timeout:g} s: try later or raise --timeout.") from error
    except ValueError as error:  # whatever requests finds wrong with an address is one of these
        raise ClientError(f"{url!r} is not an address: give --url as http://host:port.") from error
    except requests.RequestException as error:
        raise ClientError(f"No answer from {url}: start the service there or give its --url.") from error


def predictions(response: requests.Response) -> list[str]:
    """Return the lines to print."""
    try:
        answer = response.json()
        if response.status_code != 200 or answer["success"] is not True:
            raise ClientError(f"{answer['error']['message']} (status {response.status_code})")
        best = enumerate(answer["predictions"], start=1)
        return [f"{rank}. {entry['label']}: {entry['probability']:.4f}" for rank, entry in best]
    except (ValueError, KeyError, TypeError) as error:
        found = f"{response.url} answered with status {response.status_code}, but not as this service does"
        raise ClientError(f"{found}: give the address of the service with --url.") from error


def main() -> int:
    """Return the exit code: 0 for an answer, 1 without one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", type=Path, default=IMAGE_PATH, help="default: %(default)s")
    parser.add_argument("--url", default=KERAS_REST_API_URL, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of silence to bear (%(default)s)")
    key = os.environ.get("API_KEY", "")
    parser.add_argument("--api-key", type=api_key, default=key, help="default: the environment's API_KEY")
    options = parser.parse_args()
    if not 0 < options.timeout <= 86400:
        parser.error("--timeout takes seconds, more than 0 and at most 86400")
    try:
        print(*predictions(post(options.image, options.url, options.timeout, options.api_key)), sep="\n")
    except ClientError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
