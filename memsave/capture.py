"""Taking a guest's memory: candidates are copied aside, compared with the parent, and stored.

The copying in :meth:`Capture.seal` is all that happens while the guest stands still. With exact
tracking, :meth:`Capture.precopy` copies beforehand what is dirty then, and seal only what was
written since. Copies go to a :class:`~memsave.shadow.Shadow`, page n at its own place, so that a
page that was copied twice is simply overwritten.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave import native
from memsave.errors import MemsaveError
from memsave.files import sync_directory
from memsave.image import SLOT_MASK, Image, as_runs
from memsave.layout import PAGE, Layout
from memsave.packs import SLOT_BITS, PackStore, Table, reference
from memsave.shadow import SPOOL_ABOVE, Shadow
from memsave.tracking import Runs, Tracker

ROUNDS = 4  # of pre-copy at most
FEW = 256  # pages; a round that finds no more than these is the last
FLAT_SHARE = 4  # a new flat pack once 1/4 of resident memory differs from the nearest one
STRIDE = 4096  # pages hashed and written at a time


@dataclass(frozen=True)
class WriteResult:
    """What a capture stored. Counts are pages: ``new_pages`` written anew, ``changed_pages`` that
    differ from the base (new, zero or the parent's), ``zero_pages`` that became zero."""

    image: Image
    pack_id: str | None
    new_pages: int
    changed_pages: int
    zero_pages: int
    bytes_written: int
    flat: bool


class GuestMemory:
    """The memory of a running hypervisor process. Context manager."""

    def __init__(self, pid: int, layout: Layout, addresses: Mapping[str, int], *,
                 method: str = "auto") -> None:
        """``addresses``: host virtual address of each block in process ``pid``. Raises MemsaveError
        if this user may not read that process' memory."""
        self.pid, self.layout = pid, layout
        self._places = [(addresses[block.name], block.pages) for block in layout.blocks]
        self.tracker = Tracker(pid, [(a, pages * PAGE) for a, pages in self._places], method)

    @property
    def method(self) -> str:
        """How written pages are found; see :mod:`memsave.tracking`."""
        return self.tracker.method

    def capture(self, trusted: bool, spool: Path | None = None) -> Capture:
        """Begin a capture. ``trusted``: every page written since the last *successful* capture is
        known to the tracking; otherwise all private pages are candidates. ``spool``: a directory
        for captures too large for memory."""
        return Capture(self, trusted, spool)

    def find(self, *, written: bool, protect: bool) -> list[Runs]:
        """Private pages of each block, numbered within it."""
        return [self.tracker.private(address, pages, written=written, protect=protect)
                for address, pages in self._places]

    def read(self, block: int, runs: Any, count: int, to: Any) -> int:
        """Copy runs of a block to ``to`` (page n at n * 4096); returns bytes."""
        return native.checked(native.lib.ms_read(self.pid, self._places[block][0], runs, count, to),
                              f"reading the memory of process {self.pid}")

    def patch(self, image: Image, packs: PackStore, over: Image) -> int:
        """Make a paused, fresh process hold ``image``; see :func:`memsave.restore.patch`."""
        from memsave.restore import patch

        return patch(self, image, packs, over)

    def place(self, block: int) -> int:
        """Host address of a block in the process."""
        return self._places[block][0]

    def close(self) -> None:
        self.tracker.close()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class Capture:
    """One capture: (precopy), reserve, seal, write. Context manager."""

    def __init__(self, guest: GuestMemory, trusted: bool, spool: Path | None) -> None:
        self._guest = guest
        self._exact = guest.method == "userfaultfd"
        self._trusted = trusted and self._exact
        self._first = True
        self._pages: set[tuple[int, int]] = set()  # runs in global page numbers, may overlap
        self.precopied_pages = 0
        self.sealed_pages = 0
        pages = guest.layout.pages
        large = spool is not None and self._expected() * PAGE > SPOOL_ABOVE
        self._shadow = Shadow(pages, spool if large else None)

    def _expected(self) -> int:
        found = self._guest.find(written=self._trusted, protect=False)
        return sum(count for runs in found for _, count in runs)

    def _collect(self) -> int:
        """Find candidates, protect them again, copy them aside; returns pages copied."""
        written = self._trusted or not self._first
        found = self._guest.find(written=written, protect=True)
        self._first = False
        copied, at = 0, 0
        for index, (block, runs) in enumerate(zip(self._guest.layout.blocks, found, strict=True)):
            if runs:
                c_runs = native.ffi.new("ms_run[]", runs)
                copied += self._guest.read(index, c_runs, len(runs), self._shadow.address(at))
                self._pages.update((at + first, count) for first, count in runs)
            at += block.pages
        return copied // PAGE

    def precopy(self) -> None:
        """With the guest running: copy what is dirty, while that pays. Only with exact tracking."""
        if not self._exact:
            return
        last = None
        for _ in range(ROUNDS):
            copied = self._collect()
            self.precopied_pages += copied
            if copied <= FEW or (last is not None and copied * 2 > last):
                return
            last = copied

    def reserve(self) -> None:
        """Just before the pause. Nothing is left to reserve: what seal will copy was mostly copied
        by precopy, to the same place; and without exact tracking nobody knows what it will be."""

    def seal(self) -> None:
        """With the guest paused: copy the rest."""
        self.sealed_pages = self._collect()

    def write(self, base: Image, parent: Image | None, packs: PackStore, pack_id: str, *,
              flat: bool | None = None,
              progress: Callable[[int, int], None] | None = None) -> WriteResult:
        """Compare and store, with the guest running again; everything is durable on return.

        ``base`` describes the memory when the tracking began; ``parent`` is looked at too before a
        page is stored. ``flat`` None decides by the rule of docs/memory-image.md. Raises OSError
        (a full disk), MemoryDamaged if a page that has to be stored anew was damaged.
        """
        if base.layout != self._guest.layout:
            raise MemsaveError("the base image has another memory layout than the guest")
        ids = list(dict.fromkeys([*base.pack_ids, *(parent.pack_ids if parent else ()), pack_id]))
        own = ids.index(pack_id)
        table = packs.table(ids[:own])
        refs = base.refs(ids)
        numbers, kinds, parent_refs = self._classify(refs, parent, ids, table)
        fresh, zeros, changed = array("Q"), 0, 0
        for number, kind in zip(numbers, kinds, strict=True):
            if kind == native.lib.MS_SAME:
                continue
            changed += 1
            if kind == native.lib.MS_NEW:
                fresh.append(number)
            elif kind == native.lib.MS_ZERO:
                refs[number] = 0
                zeros += 1
            elif parent_refs is not None:
                refs[number] = parent_refs[number]
        for slot, number in enumerate(fresh):
            refs[number] = reference(own, slot)
        nearest = base.flat if base.flat is not None else parent.flat if parent else None
        if flat is None:
            flat = self._flat_is_due(refs, ids, nearest, table)
        if flat:
            written = self._write_flat(refs, own, fresh, table, packs, pack_id, progress)
            image = Image.from_refs(base.layout, ids, pack_id, refs)
            return WriteResult(image, pack_id, len(fresh), changed, zeros, written, True)
        written = 0
        if fresh:
            written = self._write_delta(fresh, packs, pack_id, progress)
        image = Image.from_refs(base.layout, ids, nearest, refs)
        return WriteResult(image, pack_id if fresh else None, len(fresh), changed, zeros, written,
                           False)

    def _classify(self, refs: array[int], parent: Image | None, ids: Sequence[str], table: Table
                  ) -> tuple[array[int], bytearray, array[int] | None]:
        numbers = array("Q", chain.from_iterable(
            range(first, first + count) for first, count in _united(self._pages)))
        kinds = bytearray(len(numbers))
        above = parent.refs(ids) if parent is not None else None
        native.checked(native.lib.ms_classify(
            self._shadow.address(0), native.u64(numbers), len(numbers), native.u64(refs),
            native.u64(above) if above is not None else native.ffi.NULL, table.c, len(table),
            native.ffi.from_buffer("uint8_t[]", kinds)), "comparing pages with the parent")
        return numbers, kinds, above

    def _flat_is_due(self, refs: array[int], ids: Sequence[str], nearest: str | None,
                     table: Table) -> bool:
        """Whether starting from the nearest flat pack would mean patching too many pages."""
        if nearest is None:
            return True
        flat = ids.index(nearest)
        main = self._guest.layout.blocks[0].pages
        view = native.numbers(main)
        native.lib.ms_expand(native.u64(array("Q", [main])),
                             native.u64(array("Q", [reference(flat, 0)])), 1, native.u64(view))
        elsewhere = native.lib.ms_differ(native.u64(refs), native.u64(view), main,
                                         native.u64(native.numbers(main)))
        zeros = refs[:main].count(0)
        # Pages to be patched: those with content elsewhere, or those that the flat pack holds and
        # that were replaced or zeroed since; the two overlap, and the larger one decides.
        patched = max(elsewhere - zeros, table.packs[flat].used - (main - elsewhere))
        return bool(patched * FLAT_SHARE > len(refs) - refs.count(0))

    # -- files ---------------------------------------------------------------------------------
    def _write_delta(self, fresh: array[int], packs: PackStore, pack_id: str,
                     progress: Callable[[int, int], None] | None) -> int:
        checksums = native.numbers(len(fresh))
        done = 0
        with _PackFile(packs, pack_id) as file:
            for first, count in as_runs(fresh):
                for at in range(first, first + count, STRIDE):
                    part = min(STRIDE, first + count - at)
                    native.lib.ms_hash(self._shadow.address(at), part,
                                       native.u64(checksums) + done)
                    file.append(self._shadow.page_bytes(at, part))
                    done += part
                    if progress:
                        progress(done, len(fresh))
        packs.write_index(pack_id, flat=False, slots=len(fresh), runs=[(0, len(fresh))],
                          checksums=checksums)
        sync_directory(packs.directory)
        return done * PAGE

    def _write_flat(self, refs: array[int], own: int, fresh: array[int], table: Table,
                    packs: PackStore, pack_id: str,
                    progress: Callable[[int, int], None] | None) -> int:
        """All resident pages at their own slots; ``refs`` is changed to say so."""
        for number in fresh:
            refs[number] = reference(own, number)
        resident = array("Q", (number for number, ref in enumerate(refs) if ref))
        kept = array("Q", (refs[n] for n in resident if (refs[n] >> SLOT_BITS) - 1 != own))
        table.verify(kept)  # what is stored again under a fresh checksum must be sound
        checksums = native.numbers(len(resident))
        runs = as_runs(resident)
        done = 0
        with _PackFile(packs, pack_id) as file:
            file.size(len(refs) * PAGE)
            for first, count in runs:
                for at, part, source in self._sources(refs, own, table, first, count):
                    native.lib.ms_hash(native.ffi.from_buffer("uint8_t[]", source), part,
                                       native.u64(checksums) + done)
                    file.put(at * PAGE, source)
                    source.release()
                    done += part
                    if progress:
                        progress(done, len(resident))
        for number in resident:
            refs[number] = reference(own, number)
        packs.write_index(pack_id, flat=True, slots=len(refs), runs=runs, checksums=checksums)
        sync_directory(packs.directory)
        return done * PAGE

    def _sources(self, refs: array[int], own: int, table: Table, first: int,
                 count: int) -> list[tuple[int, int, memoryview]]:
        """Where the pages of a run are now: (first page, pages, their bytes)."""
        found = []
        at, end = first, first + count
        while at < end:
            stop = at + 1
            while (stop < end and stop - at < STRIDE and refs[stop] == refs[at] + (stop - at)):
                stop += 1
            index, slot = (refs[at] >> SLOT_BITS) - 1, refs[at] & SLOT_MASK
            pages = (self._shadow.page_bytes(at, stop - at) if index == own
                     else table.packs[index].page_bytes(slot, stop - at))
            found.append((at, stop - at, pages))
            at = stop
        return found

    def close(self) -> None:
        """Give the copies back."""
        self._shadow.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _united(runs: set[tuple[int, int]]) -> Runs:
    """Overlapping runs as sorted disjoint ones."""
    found: list[list[int]] = []
    for first, count in sorted(runs):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], first + count)
        else:
            found.append([first, first + count])
    return [(first, end - first) for first, end in found]


class _PackFile:
    """ID.pack in the making: a temporary, fsynced and renamed at the end of the block."""

    def __init__(self, packs: PackStore, pack_id: str) -> None:
        self._final = packs.pack_path(pack_id)
        self._temporary = self._final.with_name(self._final.name + ".tmp")
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
                           0o600)

    def size(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def append(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._fd, data):]

    def put(self, at: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written

    def __enter__(self) -> _PackFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if kind is None:
            self._temporary.rename(self._final)
