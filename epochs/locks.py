"""Locks between commands: one writer per machine, and the store shared or whole.

flock(2) locks vanish with the process that held them, however it ended. Order: machine locks by
name, then the store's, so that no two commands wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from epochs.errors import Busy, Refused, UsageError

WAIT_LIMIT = 60.0  # seconds that a second command waits for the first; $EPOCHS_WAIT overrides


def wait_limit() -> float:
    """Seconds to wait for a lock."""
    text = os.environ.get("EPOCHS_WAIT", str(WAIT_LIMIT))
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UsageError(f"$EPOCHS_WAIT is '{text}'; it must be a number of seconds") from None


@contextmanager
def hold(path: Path, what: str, *, shared: bool = False,
         notice: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path``; waits up to :func:`wait_limit`, telling ``notice`` so.

    Raises Busy, naming ``what`` and the pid that holds it, when the limit is over.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(f"{what} cannot be locked ({path}: {error.strerror})") from error
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        limit = wait_limit()
        if notice:
            notice(f"waiting for another command that works on {what} (up to {limit:.0f} s)")
        _wait(fd, mode, limit, what)
    try:
        yield
    finally:
        os.close(fd)


def _wait(fd: int, mode: int, limit: float, what: str) -> None:
    """flock with a time limit. It has none of its own, so a thread blocks in it; if the caller
    gave up meanwhile, the thread closes the descriptor, and the lock with it."""
    turn = threading.Lock()
    got = threading.Event()
    abandoned = False

    def block() -> None:
        fcntl.flock(fd, mode)
        with turn:
            if abandoned:
                os.close(fd)
            else:
                got.set()

    threading.Thread(target=block, name="epochs-lock", daemon=True).start()
    try:
        got.wait(limit)
    finally:
        with turn:
            abandoned = not got.is_set()
    if abandoned:
        raise Busy(f"another command has been working on {what} for more than {limit:.0f} s; "
                   "try again when it is done")


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """Hold the lock file if it is free; yields whether it was."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
