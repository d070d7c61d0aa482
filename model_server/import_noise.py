"""Filters what TensorFlow prints to standard error at each import, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Printed before TensorFlow reads TF_CPP_MIN_LOG_LEVEL, so no setting silences it: messages below the level of an error,
# that a library is registered twice, and on a machine without a GPU that there is none.
NOISE = [
    "^[IW][0-9]{4} ",
    "^WARNING: All log messages before absl::InitializeLog",
    "Unable to register cu[A-Z]+ factory",
]
if not Path("/dev/nvidiactl").exists():
    NOISE.append("failed call to cuInit")
FILTER = ["grep", "--text", "--line-buffered", "--invert-match", "--extended-regexp", "|".join(NOISE)]
FILTER_LIMIT = 5  # seconds to wait for its end: a program started meanwhile may hold the pipe open


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep lines that match NOISE off standard error, also those written by C code.

    A separate process filters them, so that the last words of a library that aborts still get through.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    # In a session of its own, so that Ctrl-C does not reach it.
    grep = subprocess.Popen(FILTER, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True)  # noqa: S603
    assert grep.stdin
    os.dup2(grep.stdin.fileno(), 2)
    grep.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # closes the pipe, which ends grep
        os.close(stderr)
        with suppress(subprocess.TimeoutExpired):
            grep.wait(FILTER_LIMIT)
