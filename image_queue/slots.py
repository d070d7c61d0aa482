"""Slots of the model servers on a host: names that stay the same when a server restarts."""

import hashlib
import os
import re
import socket
from pathlib import Path

import settings
from helpers import StartupError


def claim_slot(key: str) -> tuple[socket.socket, str]:
    """Return a slot of the queue `key` that no live model server holds, and the socket that holds it.

    A server that restarts after a crash gets the same slot again. So it can requeue the jobs that it had taken without
    waiting for its old heartbeat to expire. The name consists of the host name, a hash of the boot and the network
    namespace, and the lowest free number. Binding a socket in Linux's abstract namespace claims a number: the kernel
    frees it however the process ends, and no file is left behind.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    namespace = os.stat("/proc/self/ns/net").st_ino
    machine = f"{re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname())}-{_hash(f'{boot}{namespace}', 6)}"
    redis = _hash(settings.REDIS_URL or f"{settings.REDIS_HOST}:{settings.REDIS_PORT}/{settings.REDIS_DB}", 12)
    for number in range(1000):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0keras-rest-api/{redis}/{key}/{number}")
        except OSError:
            claim.close()
            continue
        return claim, f"{machine}-{number}"
    raise StartupError("1000 model servers of this queue run on this host already, so no slot is free.")


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
