"""``guard``: an epoch, a command, and back to the epoch if the command fails.

The epoch is made first. The command runs here, or in the guest through its agent. If it fails, takes
too long, a check after it fails, or we are told to stop, the machine goes back to the epoch; else
the epoch stays as a way back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from epochs.errors import EpochsError, UsageError

if TYPE_CHECKING:
    from epochs.api import Machine

TIMED_OUT = 124  # as of timeout(1)
GRACE = 10.0  # seconds that a command has to end after it was told to


@dataclass(frozen=True)
class Guarded:
    """``status``: what the caller ends with: the command's exit status, the check's if only that
    failed, 124 after the time limit, 128 + signal if we were told to stop. ``undone``: why the
    machine is back at the epoch, or None. ``failed``: the epoch of the state that was given up, if
    it was to be kept. ``seconds`` that the rollback took, or None."""

    machine: str
    epoch: str
    status: int
    undone: str | None
    failed: str | None
    seconds: float | None

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
    """SIGINT and SIGTERM raise _Told while ``heard``; else they wait until somebody asks."""

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
        before = {number: signal.signal(number, self._take)
                  for number in (signal.SIGINT, signal.SIGTERM)}
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
          timeout: float | None = None, check: str | None = None,
          keep_failed: bool = False) -> Guarded:
    """Run ``command`` with a way back. ``timeout`` in seconds, for command and check together;
    ``check`` is a line for the shell, run where the command ran. Only from the main thread.

    Raises what ``create`` and ``rollback`` raise; if the latter failed, the machine is as the
    command left it and the message names the epoch.
    """
    if not command:
        raise UsageError("there is no command to run")
    if timeout is not None and timeout <= 0:
        raise UsageError("the time limit must be more than 0 seconds")
    signals = _Signals()
    with signals.held():
        epoch = machine.create(f"before {' '.join(command)}"[:200])
        deadline = None if timeout is None else time.monotonic() + timeout
        undone: str | None = None
        try:
            with signals.listening():
                status = _run(machine, command, in_guest, deadline)
                if status:
                    undone = f"the command ended with {status}"
                elif check is not None:
                    status = _run(machine, ["sh", "-c", check], in_guest, deadline)
                    if status:
                        undone = f"the check ended with {status}"
        except _Told as told:
            status, undone = 128 + told.number, f"{signal.Signals(told.number).name} came"
        except _Late:
            status, undone = TIMED_OUT, f"it took more than {timeout:g} s"
        except (EpochsError, OSError) as error:
            status, undone = 127 if isinstance(error, FileNotFoundError) else 125, str(error)
        if undone is None:
            return Guarded(machine.name, epoch.id, status, None, None, None)
        try:
            done = machine.rollback(epoch, keep=keep_failed)
        except EpochsError as error:
            error.args = (f"{undone}, and machine '{machine.name}' could not go back to epoch "
                          f"{epoch.id[:12]}: {error}",)
            raise
    return Guarded(machine.name, epoch.id, status, undone, done["kept"], done["seconds"])


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _run(machine: Machine, command: list[str], in_guest: bool, deadline: float | None) -> int:
    return (_run_inside if in_guest else _run_here)(machine, command, deadline)


def _run_inside(machine: Machine, command: list[str], deadline: float | None) -> int:
    from epochs.qemu.agent import CommandLate

    try:
        done = machine.exec(command, timeout=_left(deadline))
    except CommandLate:
        raise _Late from None
    sys.stdout.buffer.write(done.stdout)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(done.stderr)
    sys.stderr.buffer.flush()
    return done.status


def _run_here(machine: Machine, command: list[str], deadline: float | None) -> int:
    """In a process group of its own, so that what it started ends with it; on a terminal in ours, so
    that it may read from there and hears Ctrl-C itself."""
    child = subprocess.Popen(command, process_group=None if sys.stdin.isatty() else 0,
                             env={**os.environ, "EPOCHS_MACHINE": machine.name})
    try:
        status = child.wait(_left(deadline))
    except subprocess.TimeoutExpired:
        _end(child)
        raise _Late from None
    except BaseException:
        _end(child)
        raise
    return 128 - status if status < 0 else status


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, number)
            else:
                child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
            return
