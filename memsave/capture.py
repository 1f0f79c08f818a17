"""Taking guest memory aside: while the guest runs, and the rest while it stands still."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave.buffers import Buffer
from memsave.errors import MemsaveError
from memsave.image import Image
from memsave.layout import PAGE, Layout
from memsave.native import check, ffi, lib, new_error
from memsave.packs import PackStore
from memsave.tracking import Ranges, Tracker
from memsave.writing import WriteResult, write_image

ENOUGH = 2 * 2**20  # bytes left dirty at which another round of pre-copying does not pay
ROUNDS = 4
HEAD_ROOM = 8 * 2**20  # bytes, at least, for what is dirtied between reserve and seal
IN_MEMORY = 64 * 2**20  # bytes pre-copied to memory; larger rounds go to the spool, if there is one
TWO_THREADS = 4 * 2**20  # bytes from which a second thread pays

Progress = Callable[[int, int], None]


class Copies:
    """Captured pages in page order (``ms_copies``)."""

    def __init__(self) -> None:
        self.c = lib.ms_copies_new()
        if self.c == ffi.NULL:
            raise MemoryError("no memory for captured pages")
        self.c = ffi.gc(self.c, lib.ms_copies_free)

    @property
    def pages(self) -> int:
        """Pages that were copied; those that the kernel gave as its zero page are not."""
        return int(lib.ms_copies_pages(self.c))

    def updated(self, ranges: Ranges, data: Any) -> Copies:
        """These and newer copies, which win where both have a page."""
        out, error = Copies(), new_error()
        check(lib.ms_copies_merge(self.c, ranges.c, data, out.c, error), error, "captured pages")
        return out


class Capture:
    """One capture, in the order precopy (optional), reserve, seal (until untouched), write. A
    context manager.

    MemsaveError from any of them means that this capture is lost, and that the next one of the
    process must not trust the tracking (``trusted=False``).
    """

    def __init__(self, tracker: Tracker, layout: Layout, trusted: bool,
                 spool: Path | None = None) -> None:
        self._tracker, self._layout = tracker, layout
        self._everything = not trusted
        self._spool = spool
        self._copies = Copies()
        self._buffers: list[Buffer] = []
        self._room: Buffer | None = None
        self._found = Ranges()
        self._sealed = self._closed = False
        self.precopied_pages = 0
        """Pages that were copied while the guest ran (each counted once)."""
        self.sealed_pages = 0
        """Pages that were collected in the pause."""

    def precopy(self, *, enough: int = ENOUGH, rounds: int = ROUNDS,
                drained: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        """Copy what is written already, while the guest runs, so that the pause has less to do.

        Ends when fewer than ``enough`` bytes are dirty, after ``rounds``, or when the dirty set
        does not shrink by a quarter. Does nothing without exact tracking.

        A device that writes to guest memory behind the page tables' back must not be in the middle
        of that while pages are protected: direct I/O (O_DIRECT) pins pages when it begins, and data
        that arrives after a page was protected is not seen as written. ``drained`` makes a context
        in which none is; pages are found and protected within it, and copied after it. seal() needs
        no such thing, for in the pause all I/O is drained.
        """
        self._require(sealed=False)
        if not self._tracker.exact:
            return
        self._tracker.shield()
        last = None
        for _ in range(rounds):
            dirty = self._dirty().pages
            if dirty * PAGE <= enough or (last is not None and dirty * 4 > last * 3):
                return
            last = dirty
            ranges = Ranges()
            with drained():
                self._tracker.collect(ranges, everything=self._everything, protect=True)
            self._everything = False
            size = ranges.pages * PAGE
            spool = self._spool if size + sum(b.size for b in self._buffers) > IN_MEMORY else None
            buffer = Buffer(max(size, PAGE), spool)
            self._buffers.append(buffer)
            self._tracker.read(ranges, buffer.data, _threads(size))
            self._copies = self._copies.updated(ranges, buffer.data)
            self.precopied_pages = self._copies.pages

    def _dirty(self) -> Ranges:
        ranges = Ranges()
        self._tracker.collect(ranges, everything=self._everything, protect=False)
        return ranges

    def reserve(self) -> None:
        """Just before the pause: take the memory that seal will need, with head-room."""
        self._require(sealed=False)
        if self._room is not None:
            return
        dirty = self._dirty()
        size = dirty.pages * PAGE
        size += max(size // 4, HEAD_ROOM)
        self._room = Buffer(min(size, self._layout.size))
        self._buffers.append(self._room)
        self._room.prefault()
        self._found.reserve(2 * len(dirty) + 4096)

    def seal(self) -> None:
        """In the pause: collect what was written since, and copy it aside. Nothing else. Done again
        it adds what was written since the last time."""
        if self._closed:
            raise MemsaveError("this capture is closed")
        if self._sealed and self._room is not None:
            self._copies = self._copies.updated(self._found, self._room.data)
            self._found, self._room = Ranges(), None
        self._tracker.collect(self._found, everything=self._everything, protect=True)
        self._everything = self._everything and not self._tracker.exact
        size = self._found.pages * PAGE
        if self._room is None or self._room.size < size:  # more than was foreseen: slow but right
            self._room = Buffer(max(size, PAGE))
            self._buffers.append(self._room)
        self._tracker.read(self._found, self._room.data, _threads(size))
        self._tracker.require_alive()
        self._sealed = True
        self.sealed_pages += self._found.pages

    @property
    def exact(self) -> bool:
        """Whether :meth:`untouched` can tell."""
        return self._tracker.exact

    def untouched(self) -> bool:
        """In the pause: whether nothing was written since :meth:`seal`. A hypervisor's devices may
        write for a paused guest, too: the host's side of a serial port does. Exact tracking only.
        """
        self._require(sealed=True)
        if not self._tracker.exact:
            raise MemsaveError("without exact tracking nobody knows what was written")
        return len(self._dirty()) == 0

    def write(self, base: Image, parent: Image | None, packs: PackStore, pack_id: str, *,
              flat: bool | None = None, progress: Progress | None = None) -> WriteResult:
        """Make the image of what was captured; the guest may run again.

        ``base`` describes the process' memory when tracking began: Image.zero(layout) after a
        cold boot, else the image restored into it or last written from it. Captured pages are
        compared byte for byte with ``base``'s, then with ``parent``'s, and stored in pack
        ``pack_id`` only if both differ. ``flat`` forces (True) or forbids (False) a flat pack;
        None makes one if there is none to map yet, or once the pages of block 0 that differ from
        the nearest one exceed a quarter of all resident pages. ``progress`` is called with
        (pages done, pages of all).

        Raises MemoryDamaged if an old pack cannot be read, MemsaveError if the new one cannot be
        written; nothing of it is left then.
        """
        self._require(sealed=True)
        if self._room is None:
            raise MemsaveError("this capture holds nothing")
        copies = self._copies.updated(self._found, self._room.data)
        return write_image(self._layout, copies.c, base, parent, packs, pack_id, flat, progress)

    def _require(self, *, sealed: bool) -> None:
        if self._closed:
            raise MemsaveError("this capture is closed")
        if self._sealed != sealed:
            raise MemsaveError("this capture is sealed already" if self._sealed else
                               "this capture is not sealed yet")

    def close(self) -> None:
        """Free the copies."""
        self._closed = True
        self._copies = Copies()
        self._room = None
        while self._buffers:
            self._buffers.pop().close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _threads(size: int) -> int:
    return 2 if size >= TWO_THREADS and len(os.sched_getaffinity(0)) > 1 else 1
