"""Runs one model server, and replaces it without losing a request.

    python -m model_server.launcher [OPTION...]    the options of run_model_server.py
    python -m model_server.launcher --instance I   I is a GPU's number, NAME or NAME:GPU, as in model-server@I

On SIGHUP, or when model_server.reload asks, it starts another model server with the same options, which reads the
model's file and .env again. Once that one takes jobs, the old one is told to stop: it answers its batches and ends. If
the new one fails, the old one stays.

SIGTERM and SIGINT stop the model server. When it ends, the launcher ends with its exit code, and a supervisor
starts both again.
This process must stay small, so it imports no Keras.
"""

import argparse
import logging
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import settings
from helpers import log_to_stderr, model_name
from model_server.reload_requests import CREDENTIALS, ReloadRequests
from model_server.systemd import READY, REPLACES, STATUS, STOPPING, WATCHDOG, notify_systemd

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).resolve().parents[1] / "run_model_server.py"
LOAD_LIMIT = 20 * 60  # seconds until a new model server takes jobs; TimeoutStartSec of the systemd unit is longer
LEAVE_LIMIT = 60  # seconds for a model server that was told to stop, as in supervisord.conf and the systemd unit
# The kernel sends this signal to the model server if the launcher is killed.
END_WITH_LAUNCHER = ["setpriv", "--pdeathsig", "TERM"]


class Server:
    """A model server that this launcher has started."""

    def __init__(self, options: list[str], notify_socket: str, replaces: int = 0) -> None:
        """Start it. `replaces` is the pid of the one that it is to replace."""
        # What this process has changed in os.environ since its start may be from .env, which a new server reads itself.
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
        environment = dict(each.split(b"=", 1) for each in given if b"=" in each)
        environment |= {b"NOTIFY_SOCKET": notify_socket.encode(), REPLACES.encode(): b"%d" % replaces}
        command = [*END_WITH_LAUNCHER, sys.executable, str(PROGRAM), *options]
        self.process = subprocess.Popen(command, env=environment)  # noqa: S603 - the options are the operator's
        self.started = time.monotonic()
        self.kill_at = float("inf")
        self.ready = False
        self.status = ""  # what it last reported, such as why it can't start

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    @property
    def how_it_ended(self) -> str:
        """How the process ended, as the rest of a sentence."""
        code = self.process.returncode
        if code == settings.EXIT_BAD_SETTING and self.status:
            return f"says: {self.status}"
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def stop(self) -> None:
        """Tell it to answer its batches and end. It is killed after LEAVE_LIMIT."""
        self.process.terminate()
        self.kill_at = time.monotonic() + LEAVE_LIMIT


class Launcher:
    """A launcher at work; each step() waits for one thing to happen and acts on it."""

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.stopping = False  # set by SIGTERM and SIGINT
        self.wanted = False  # another replacement, set by SIGHUP and model_server.reload
        self.exit_code: int | None = None
        self._told_to_stop = False
        self._selector = selectors.DefaultSelector()
        self._notified = self._watched(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._notified.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notified.bind("")  # the kernel chooses an address
        self._requests = ReloadRequests()
        self._watched(self._requests.socket)
        self._woken = self._handle_signals()
        self.current = self._start()
        self.new: Server | None = None  # loads its model
        self.old: Server | None = None  # answers its last batches

    def _watched(self, made: socket.socket) -> socket.socket:
        made.setblocking(False)
        self._selector.register(made, selectors.EVENT_READ)
        return made

    def _handle_signals(self) -> socket.socket:
        """Set the signal handlers. Return a socket that gets a byte for each signal, to end the wait in step()."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
        return self._watched(woken)

    def _on_stop(self, *_: object) -> None:
        self.stopping = True

    def _on_hangup(self, *_: object) -> None:
        self.wanted = True

    def run(self) -> int:
        """Run until the model server has ended; return its exit code."""
        while self.exit_code is None:
            self.step()
        self._requests.end(f"The model server {self.current.how_it_ended}.")
        return self.exit_code

    def step(self) -> None:
        """Wait for a signal, the message or end of a model server, a client, or a time limit; then act on it."""
        self._selector.select(self._patience())
        with suppress(BlockingIOError):
            self._woken.recv(1000)
        if self._requests.accept():
            self.wanted = True
        ended = [each for each in self._servers() if each.ended]
        self._read_messages()  # after the line above, to read all that those have sent before they ended
        self._kill_late()
        if self.stopping:
            self._stop()
        elif self.current in ended:
            self.exit_code = self._exit_code()
        else:
            self._go_on_replacing(ended)

    def _servers(self) -> list[Server]:
        return [each for each in (self.current, self.new, self.old) if each]

    def _patience(self) -> float | None:
        """Return the seconds until the next time limit; None if there is none."""
        seconds = min(each.kill_at for each in self._servers()) - time.monotonic()
        return None if seconds == float("inf") else max(0.0, seconds)

    def _start(self, replaces: int = 0) -> Server:
        return Server(self.options, self._notified.getsockname().decode().replace("\0", "@", 1), replaces)

    def _kill_late(self) -> None:
        for each in self._servers():
            if time.monotonic() >= each.kill_at:
                each.process.kill()  # its jobs are requeued
                each.kill_at = float("inf")

    def _stop(self) -> None:
        if not self._told_to_stop:
            self._told_to_stop = True
            notify_systemd(STOPPING)
            for each in self._servers():
                each.stop()
        if all(each.ended for each in self._servers()):
            self.exit_code = self._exit_code()

    def _exit_code(self) -> int:
        code = self.current.process.returncode
        if code >= 0:
            return code
        if self.stopping and -code in (signal.SIGTERM, signal.SIGINT):  # it had no handler yet
            return 0
        log.error("The model server %s", self.current.how_it_ended)
        return 128 - code

    def _go_on_replacing(self, ended: list[Server]) -> None:
        if self.new in ended:
            self._fail()
        elif self.new and self.new.ready:
            self.old, self.current, self.new = self.current, self.new, None
            self._requests.tell("The new model server takes jobs, and the old one answers its last batches.")
            self.old.stop()
        elif self.old in ended:
            self._succeed()
        if self.wanted and self.current.ready and not (self.new or self.old):
            self.wanted = False
            self.new = self._start(self.current.process.pid)
            self.new.kill_at = self.new.started + LOAD_LIMIT
            log.info("* Replacing the model server")
            self._requests.begin()
            self._requests.tell("Loading another model server.")

    def _fail(self) -> None:
        assert self.new
        limit = f"did not take jobs within {LOAD_LIMIT:g} seconds"
        late = time.monotonic() >= self.new.started + LOAD_LIMIT
        reason = f"the new one {limit if late else self.new.how_it_ended}"
        self.new = None
        log.error("The model server was not replaced, and the old one goes on: %s", reason)
        self._requests.tell(f"The old model server goes on: {reason.rstrip('.')}.", False)

    def _succeed(self) -> None:
        took = time.monotonic() - self.current.started
        self.old = None
        log.info("* Replaced the model server in %.1f s", took)
        self._requests.tell(f"Replaced in {took:.1f} s.", True)

    def _read_messages(self) -> None:
        """Read what the model servers report. Pass on to systemd what it should know of the current one."""
        with suppress(BlockingIOError):
            while True:
                text, about, _, _ = self._notified.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
                sender = CREDENTIALS.unpack(about[0][2][: CREDENTIALS.size])[0] if about else 0
                for each in self._servers():
                    if each.process.pid == sender:  # others may send to this socket too
                        self._handle(each, text.decode(errors="replace"))

    def _handle(self, server: Server, report: str) -> None:
        state = "".join(each for each in report if each.isprintable())  # one field: a second line could set another
        if state == READY:
            server.ready = True
            if server is self.new:
                server.kill_at = float("inf")
        elif state.startswith(STATUS):
            server.status = state.removeprefix(STATUS)
        if server is self.current and (state in (READY, WATCHDOG) or state.startswith(STATUS)):
            notify_systemd(state)


def options_of(instance: str) -> list[str]:
    """Return the options for the unit model-server@`instance`. Models that name no GPU are spread over the GPUs."""
    name, _, gpu = instance.partition(":")
    if name.isdecimal():
        return ["--gpu", name]
    names = [model_name(each) for each in settings.models()]
    return ["--model", name, "--gpu", gpu or str(names.index(name) if name in names else 0)]


def main() -> int:
    """Run the launcher; return the exit code of its model server."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--instance")
    own, options = parser.parse_known_args()
    log_to_stderr(settings.LOG_FORMAT)
    return Launcher((options_of(own.instance) if own.instance else []) + options).run()


if __name__ == "__main__":
    sys.exit(main())
