"""Keras' downloads: where they are kept, a timeout for them, and why one failed. Only fetch() imports Keras."""

import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import settings
from helpers import StartupError
from model_server.keras_import import import_keras
from model_server.model_file import first_line

DOWNLOAD_TIMEOUT = 30  # seconds without receiving a byte; Keras itself sets no limit
# Errors of a download that Keras passes on. It turns those of urllib into messages that name the URL.
CUT_OFF = (TimeoutError, ConnectionError, http.client.HTTPException)


def keras_downloads() -> Path:
    """Return Keras' folder for downloads, computed as Keras does: importing Keras to ask takes seconds."""
    home = os.path.expanduser("~")  # stays "~" where there is no home
    default = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")  # noqa: S108 - Keras' choice
    base = Path(os.path.expanduser(os.environ.get("KERAS_HOME", default)))
    existing = next(each for each in (base, *base.parents) if each.exists())
    return (base if os.access(existing, os.W_OK) else Path("/tmp/.keras")) / "models"  # noqa: S108


def ask(url: str) -> None:
    """Ask for the headers of a file. If there is no answer that says it exists, exit with the reason."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()  # noqa: S310 - default_model's https
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the address of the proxy is invalid
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise SystemExit(" ".join(str(reason).split()) or type(reason).__name__) from None


def fetch() -> None:
    """Download the files of MODEL and its weights that Keras has not cached. If that fails, exit with the reason."""
    try:
        import_keras()
        from model_server import applications  # noqa: PLC0415 - imports Keras

        applications.load()
    except Exception as error:
        raise SystemExit(why_not_fetched(error.__cause__ or error)) from None


def download(call: Callable[[], Any]) -> Any:
    """Return call(), which may make Keras download files, with a timeout for stalls. Raises StartupError."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return call()
    except Exception as error:
        url = next((word.rstrip(":") for word in str(error).split() if word.startswith(("https:", "http:"))), "")
        if not (url or isinstance(error, CUT_OFF) or "corrupted file" in str(error)):
            raise
        raise StartupError(
            f"{url or f'A file for MODEL={settings.MODEL}'} can't be downloaded ({why_not_fetched(error)}): get it on "
            f"a machine with internet and put it in {keras_downloads()}/, or set "
            "MODEL=models/efficientnet_lite0.keras, which needs no download."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def why_not_fetched(error: BaseException) -> str:
    """Return only the reason: Keras puts the address and " -- " before it."""
    return first_line(error).rpartition(" -- ")[2]
