"""What freezes of disks on devices have in common: the order of calls, and suspending several
devices so that whatever happens all of them go on."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from .devmapper import open_driver
from .interface import BlockError, Chain, Freeze, Frozen, Parts, PlainFreeze


class DeviceFreeze(PlainFreeze, ABC):
    """See :class:`blockcow.interface.FreezeTicket`. A subclass is given its backend, makes what it
    needs in ``_prepare`` and says how to go on from there."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.dm = open_driver()
        self.cookie = self.dm.cookie()
        self.frozen = False
        self.held = contextlib.ExitStack()
        """What ``arm`` holds: nothing, unless the subclass enters something."""
        try:
            self._prepare()
        except BaseException as error:
            try:
                self.abort()
            except BlockError as second:  # recover_freeze does the same by name
                error.add_note(f"undoing it did not work yet: {second}")
            raise

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the pause needs, guest running. What it made is undone if it raises."""

    @abstractmethod
    def _freeze(self) -> None:
        """All disks or none, by ioctls only."""

    @abstractmethod
    def _seal(self, part: Freeze, chain: Chain,
              progress: Callable[[int], None] | None) -> Frozen:
        """One disk's layers as they came out."""

    @abstractmethod
    def _undo(self) -> None:
        """Remove what ``_prepare`` made, however far it got."""

    def disarm(self) -> None:
        self.held.close()

    @contextlib.contextmanager
    def suspended(self, devices: Iterable[str], *,
                  failed: Callable[[], None] | None = None) -> Iterator[None]:
        """Devices stand still, with their I/O done, and all go on afterwards; if not all could be
        stopped or something else fails, after ``failed`` was called."""
        stopped: list[str] = []
        try:
            for name in devices:
                stopped.append(name)
                self.dm.suspend(name)
            yield
        except BaseException:
            if failed is not None:
                failed()
            raise
        finally:
            self.dm.resume_all(stopped, self.cookie)

    def freeze(self) -> None:
        if self.frozen:
            raise BlockError("this freeze was done already: prepare another one")
        self._freeze()
        self.frozen = True

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        if not self.frozen:
            raise BlockError("nothing is frozen yet: call freeze() before seal()")
        self.cookie.wait()
        return [self._seal(part, chain, progress) for part, chain in self.parts]

    def abort(self) -> None:
        self.cookie.wait()
        self._undo()
