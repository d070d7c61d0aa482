"""Gives up root, so that root never parses untrusted input."""

import ctypes
import encodings
import importlib
import logging
import os
import pkgutil
import pwd
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import settings
from helpers import StartupError

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 2, 38  # prctl.h
UNPRIVILEGED = ("www-data", "nobody")
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")  # options of REDIS_URL


def give_up_root() -> None:
    """Become an ordinary user if started as root. Raises StartupError.

    The code, Python itself and the model may be readable only by root, for example under /root. So this first reads all
    files that would be read later.
    """
    if os.geteuid() != 0:
        return
    _read_ahead()
    parent, last_signal = os.getppid(), _signal_at_end_of_parent()
    try:
        user = _unprivileged_user()
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except OSError as error:
        message = f"Root can't become {UNPRIVILEGED[0]} ({error}): start the model server as another user."
        raise StartupError(message) from None
    if prctl := _prctl():
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # programs that this process starts can't become root either
        # The kernel forgets this when the user changes. Without it, a model server would outlive a killed launcher.
        prctl(PR_SET_PDEATHSIG, last_signal, 0, 0, 0)
        if last_signal and os.getppid() != parent:  # the launcher ended while this was not set
            os.kill(os.getpid(), last_signal)
    log.info("Root has become %s", user.pw_name)


def _prctl() -> Any:
    return getattr(ctypes.CDLL(None), "prctl", None)


def _signal_at_end_of_parent() -> int:
    """Return the number of the signal that the kernel sends to this process when its parent ends; 0 if none."""
    number = ctypes.c_int(0)
    if prctl := _prctl():
        prctl(PR_GET_PDEATHSIG, ctypes.byref(number), 0, 0, 0)
    return number.value


def _read_ahead() -> None:
    """Read the files that serving would open later: Python's encodings and the TLS files of REDIS_URL.

    The model is already warmed up, so it needs no more files.
    """
    try:
        raise LookupError
    except LookupError:
        traceback.format_exc()  # imports what the log needs for a traceback
    for module in pkgutil.iter_modules(encodings.__path__, "encodings."):
        with suppress(ImportError):  # some are for Windows
            importlib.import_module(module.name)
    address, _, options = settings.REDIS_URL.partition("?")
    if options:
        pairs = parse_qsl(options, keep_blank_values=True)
        kept = [(name, _in_memory(value) if name in TLS_FILES else value) for name, value in pairs]
        settings.REDIS_URL = f"{address}?{urlencode(kept)}"


def _in_memory(path: str) -> str:
    """Return the path of an in-memory copy of the file at `path`, which only this process can open."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return path  # the Redis client reports it at each attempt, until the file is there
    copy = os.memfd_create(Path(path).name)
    with open(copy, "wb", closefd=False) as file:
        file.write(content)
    return f"/proc/self/fd/{copy}"


def _unprivileged_user() -> pwd.struct_passwd:
    for name in UNPRIVILEGED:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise OSError("there is no such user")
