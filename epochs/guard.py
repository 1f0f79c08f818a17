"""``guard``: an epoch, a command, and back to the epoch if the command fails.

The epoch is made first. The command runs here, or in the guest through its agent. If it fails,
takes too long, a check after it fails, or we are told to stop, the machine goes back to the epoch;
else the epoch stays as a way back.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from epochs.errors import Failed, UsageError
from epochs.fixup import Fixup
from epochs.hypervisor import RUNNING
from epochs.qemu.agent import CommandLate

if TYPE_CHECKING:
    from epochs.api import Epoch, Machine

TIMED_OUT, NOT_RUN = 124, 125  # as of timeout(1)
STOPPED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGENT_LIMIT = 30.0  # seconds that the guest's agent may take to answer
GRACE = 10.0  # seconds that a command has to end after it was told to


@dataclass(frozen=True)
class Guarded:
    """``status``: what the caller ends with: the command's exit status, the check's if only that
    failed, 124 after the time limit, 125 if it could not be run, 128 + signal if we were told to
    stop. ``undone``: why the machine is back at the epoch, or None. ``failed``: the epoch of the
    state that was given up, if it was to be kept. ``seconds`` that the rollback took, or None.
    ``fixup``: what the guest was told then, or None."""

    machine: str
    epoch: str
    status: int
    undone: str | None
    failed: str | None = None
    seconds: float | None = None
    fixup: Fixup | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data with the field names of docs/json.md."""
        return asdict(self)


class _Told(BaseException):
    """We were told to stop, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Late(Exception):
    """The time is over."""


class _Signals:
    """SIGINT, SIGTERM and SIGHUP raise _Told while ``heard``; else they wait until somebody asks.
    Those that are ignored stay so, and outside the main thread they are not ours to take."""

    def __init__(self) -> None:
        self.heard = False
        self.got: int | None = None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.got = self.got or number
        if self.heard:
            self.heard = False  # once is enough
            raise _Told(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take them over from whoever has them."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._take) for number in STOPPED_BY
                      if signal.getsignal(number) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """What came meanwhile counts, too."""
        if self.got is not None:
            raise _Told(self.got)
        self.heard = True
        try:
            yield
        finally:
            self.heard = False


def guard(machine: Machine, command: list[str], *, in_guest: bool = False,
          timeout: float | None = None, check: str | None = None, keep_failed: bool = False,
          stdout: int = 1) -> Guarded:
    """Run ``command`` with a way back. ``timeout`` in seconds, for command and check together;
    ``check`` is a line for the shell, run where the command ran; ``stdout``: the descriptor that
    their standard output goes to.

    Raises what ``create`` and ``rollback`` raise; if the latter failed, the machine is as the
    command left it and the message names the epoch.
    """
    _refuse(machine, command, in_guest, timeout)
    signals = _Signals()
    with signals.held():
        running = machine.status()["state"] == RUNNING
        epoch = machine.create(f"before {' '.join(command)}"[:200])
        with machine.needed(epoch):  # nobody prunes it meanwhile
            run = _Run(machine, in_guest, signals, timeout, stdout)
            status, undone = run.all(command, check)
            if undone is None:
                return Guarded(machine.name, epoch.id, status, None)
            return _go_back(machine, epoch, status, undone, keep_failed, running)


def _go_back(machine: Machine, epoch: Epoch, status: int, undone: str, keep: bool,
             running: bool) -> Guarded:
    """Back in any case: a state that cannot be kept, as a guest has died or there is no space, is
    given up."""
    kept: str | None = None
    if keep:
        try:
            kept = machine.create(f"failed: {epoch.message.removeprefix('before ')}").id
        except Exception as error:  # whatever it is, going back is what we are here for
            undone += f" (its state could not be kept: {error})"
    try:
        done = machine.rollback(epoch, keep=False, running=running)
    except Exception as error:
        raise Failed(f"{undone}, and machine '{machine.name}' could not go back to epoch "
                     f"{epoch.id[:12]}: {error}") from error
    return Guarded(machine.name, epoch.id, status, undone, kept, done["seconds"], done["fixup"])


def _refuse(machine: Machine, command: list[str], in_guest: bool, timeout: float | None) -> None:
    """What cannot work, before anything is done."""
    if not command:
        raise UsageError("there is no command to run")
    if timeout is not None and timeout <= 0:
        raise UsageError("the time limit must be more than 0 seconds")
    if in_guest:
        machine.wait_agent(AGENT_LIMIT)
    elif shutil.which(command[0]) is None:
        raise UsageError(f"there is no command '{command[0]}' on this host")


class _Run:
    """The command, and the check after it."""

    def __init__(self, machine: Machine, in_guest: bool, signals: _Signals, limit: float | None,
                 stdout: int) -> None:
        self._machine, self._signals, self._limit = machine, signals, limit
        self._deadline = None if limit is None else time.monotonic() + limit
        self._stdout = stdout
        self._one = self._inside if in_guest else self._here

    def all(self, command: list[str], check: str | None) -> tuple[int, str | None]:
        """The status to end with, and why it is to be undone."""
        try:
            if status := self._one(command):
                return status, f"the command ended with {status}"
            if check is not None and (status := self._one(["sh", "-c", check])):
                return status, f"the check ended with {status}"
        except _Told as told:
            return 128 + told.number, f"{signal.Signals(told.number).name} came"
        except _Late:
            return TIMED_OUT, f"it took more than {self._limit:g} s"
        except Exception as error:  # whatever it is, it is not known to have gone well
            return NOT_RUN, str(error)
        return 0, None

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def _inside(self, command: list[str]) -> int:
        try:
            with self._signals.listening():
                done = self._machine.exec(command, timeout=self._left())
        except CommandLate:
            raise _Late from None
        # Nobody may want to read that any more, which says nothing of the command.
        with contextlib.suppress(BrokenPipeError):
            _write(self._stdout, done.stdout)
            _write(2, done.stderr)
        return done.status

    def _here(self, command: list[str]) -> int:
        """In a process group of its own, so that what it started ends with it; on a terminal in
        ours, so that it may read from there, and hears Ctrl-C itself."""
        shared = sys.stdin is not None and sys.stdin.isatty()
        child = subprocess.Popen(command, process_group=None if shared else 0, stdout=self._stdout,
                                 env={**os.environ, "EPOCHS_MACHINE": self._machine.name})
        try:
            with self._signals.listening():
                status = child.wait(self._left())
        except subprocess.TimeoutExpired:
            _end(child, signal.SIGTERM)
            raise _Late from None
        except _Told as told:
            _end(child, None if shared and told.number == signal.SIGINT else told.number)
            raise
        except BaseException:
            _end(child, signal.SIGTERM)
            raise
        return 128 - status if status < 0 else status


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]


def _end(child: subprocess.Popen[bytes], first: int | None) -> None:
    """Signal it, with what it started; what has not ended after a while is killed. None: it has
    heard already."""
    if child.returncode is not None:
        return  # it had just ended
    own_group = os.getpgid(child.pid) == child.pid

    def send(number: int) -> None:
        # Of one that became another user (sudo) nothing but waiting is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if own_group else os.kill)(child.pid, number)

    # It is not waited for before the end: until then nobody else gets its number.
    ended = os.pidfd_open(child.pid)
    try:
        if first is not None:
            send(first)
        select.select([ended], [], [], GRACE)
        send(signal.SIGKILL)
        child.wait()
    finally:
        os.close(ended)
