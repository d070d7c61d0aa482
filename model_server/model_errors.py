"""Tells whether the model or the machine caused an error of Keras or its backend. Does not import Keras."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import settings
from helpers import StartupError
from model_server.model_file import shown

log = logging.getLogger(__name__)

# Errors that the machine causes. They may be gone at the next start, so a supervisor should try again.
TRANSIENT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR)
DEVICE_ERRORS = ("InternalError", "UnavailableError", "AbortedError", "XlaRuntimeError", "JaxRuntimeError")


@contextmanager
def blame_model(what: str) -> Iterator[None]:
    """Turn an error within the block into a StartupError, "MODEL=... `what`", unless the error is transient."""
    try:
        yield
    except StartupError:
        raise
    except Exception as error:
        if is_transient(error):
            raise
        log.debug(what, exc_info=True)
        raise StartupError(f"MODEL={settings.MODEL} {what} ({gist(error)}).") from error


def is_transient(error: Exception) -> bool:
    """Whether the error may be gone at the next start: memory, disk or a GPU caused it, not the model."""
    disk = isinstance(error, OSError) and error.errno in TRANSIENT
    return out_of_memory(error) or disk or type(error).__name__ in DEVICE_ERRORS or "CUDA" in str(error)


def out_of_memory(error: Exception) -> bool:
    """Whether a backend could not allocate memory. Some have an exception for that, others only a message."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ in ("ResourceExhaustedError", "OutOfMemoryError")
        or "RESOURCE_EXHAUSTED" in text
        or "out of memory" in text.lower()
        or "can't allocate memory" in text
    )


def gist(error: Exception) -> str:
    """Return the most useful line of an exception: Keras and its backends write pages, with colors."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.rpartition("Exception encountered: ")[2].splitlines()]
    telling = [line for line in lines if line and not line.startswith("Exception encountered when")]
    return shown((telling or [type(error).__name__])[0]).rstrip(".:")
