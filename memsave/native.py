"""The one switch between the C core and Python: error codes in, exceptions out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memsave._native import ffi, lib
from memsave.errors import MemoryDamaged, MemsaveError

__all__ = ["Runs", "check", "ffi", "hash_bytes", "lib", "new_error"]

ZERO = 0xFFFFFFFF  # MS_ZERO in csrc/core.h: the pack number of a zero page

_RUN_FAULTS = {
    lib.MS_RUN_EMPTY: "run {a} has no pages",
    lib.MS_RUN_ORDER: "run {a} overlaps the one before it or is out of order",
    lib.MS_RUN_OUTSIDE: "run {a} lies outside",
    lib.MS_RUN_PACK: "run {a} names pack {b}, which the table does not have",
    lib.MS_RUN_SPLIT: "runs {a} and the one before it should be one",
    lib.MS_SPAN_COUNT: "its runs hold {a} slots, its header says {b}",
}
_PACK_FAULTS = {
    lib.MS_PACK_CHECKSUM: "slot {b} of pack {name} has another checksum than when it was written",
    lib.MS_PACK_UNUSED: "slot {b} of pack {name} is referred to but not in use",
    lib.MS_PACK_ZERO: "slot {b} of pack {name} holds a zero page, which is never stored",
}


def new_error() -> Any:
    """An ``ms_error *`` for a fallible C function."""
    return ffi.new("ms_error *")


def check(code: int, error: Any, doing: str, packs: Sequence[Path] = ()) -> None:
    """Raise what a C function's result means; ``packs`` are the paths behind pack numbers.

    MemoryError, MemoryDamaged for what a pack file holds, MemsaveError otherwise.
    """
    if code == lib.MS_OK:
        return
    a, b = int(error.a), int(error.b)
    if code == lib.MS_NO_MEMORY:
        raise MemoryError(f"{doing}: no memory for {a} items of {b} bytes")
    if code in _PACK_FAULTS:
        path = packs[a]
        raise MemoryDamaged(_PACK_FAULTS[code].format(b=b, name=path.name), path)
    if code == lib.MS_PACK_READ:
        path = packs[a]
        why = os.strerror(error.err) if error.err else "it ends before that"
        raise MemoryDamaged(f"slot {b} of pack {path.name} cannot be read: {why}", path)
    if code in _RUN_FAULTS:
        raise MemsaveError(f"{doing}: {run_fault(code, error)}")
    if code == lib.MS_REMOTE:
        raise MemsaveError(f"{doing}: memory at {a:#x} of the process cannot be accessed: "
                           f"{os.strerror(error.err)}")
    raise MemsaveError(f"{doing}: {os.strerror(error.err)}")


def run_fault(code: int, error: Any) -> str:
    """What is wrong with stored runs, as the end of a sentence."""
    return _RUN_FAULTS[code].format(a=int(error.a), b=int(error.b))


def hash_bytes(data: bytes | memoryview) -> int:
    """XXH3-64 with seed 0."""
    return int(lib.ms_hash(ffi.from_buffer("uint8_t[]", data), len(data)))


class Runs:
    """A run-length page map in C: ascending runs (page, slot, count, pack); all else is zero."""

    def __init__(self) -> None:
        self.c = lib.ms_runs_new()
        if self.c == ffi.NULL:
            raise MemoryError("no memory for a page map")
        self.c = ffi.gc(self.c, lib.ms_runs_free)

    def __len__(self) -> int:
        return int(self.c.n)

    def __iter__(self) -> Any:
        v = self.c.v
        for i in range(self.c.n):
            run = v[i]
            yield run.page, run.slot, run.count, run.pack

    @property
    def pages(self) -> int:
        """Pages in all runs."""
        return int(lib.ms_runs_pages(self.c))

    def by_pack(self, packs: int) -> list[int]:
        """Pages in runs of each of ``packs`` pack numbers (none of which is ZERO)."""
        found = ffi.new("uint64_t[]", max(packs, 1))
        lib.ms_runs_by_pack(self.c, found)
        return list(found)[:packs]

    def push(self, page: int, slot: int, count: int, pack: int) -> None:
        """Append a run behind all others."""
        error = new_error()
        check(lib.ms_runs_push(self.c, page, slot, count, pack, error), error, "page map")

    def renumbered(self, table: Sequence[int]) -> Runs:
        """A copy in which pack number p is ``table[p]``."""
        out, error = Runs(), new_error()
        numbers = ffi.new("uint32_t[]", list(table))
        check(lib.ms_runs_copy(self.c.v, self.c.n, numbers, out.c, error), error, "page map")
        return out

    def overlaid(self, above: Runs) -> Runs:
        """This map with the runs of ``above`` over it (pack ZERO there makes zero pages)."""
        out, error = Runs(), new_error()
        check(lib.ms_runs_overlay(self.c, above.c, out.c, error), error, "page map")
        return out

    def stretches(self) -> list[tuple[int, int]]:
        """Maximal (first page, count) of pages that are not zero, whatever pack they are in."""
        found: list[tuple[int, int]] = []
        for page, _, count, _ in self:
            if found and found[-1][0] + found[-1][1] == page:
                found[-1] = (found[-1][0], found[-1][1] + count)
            else:
                found.append((page, count))
        return found

    def tobytes(self) -> bytes:
        """As stored: 24 bytes a run."""
        return bytes(ffi.buffer(self.c.v, self.c.n * ffi.sizeof("ms_run"))) if self.c.n else b""


class Segments:
    """Where two maps refer to different things (``ms_segments``)."""

    def __init__(self) -> None:
        self.c = lib.ms_segments_new()
        if self.c == ffi.NULL:
            raise MemoryError("no memory for a comparison of page maps")
        self.c = ffi.gc(self.c, lib.ms_segments_free)

    def add_difference(self, a: Runs, b: Runs, first: int, end: int) -> None:
        """Append where a and b differ in pages [first, end)."""
        error = new_error()
        check(lib.ms_runs_differ(a.c, b.c, first, end, self.c, error), error, "page map")

    @property
    def pages(self) -> int:
        return sum(self.c.v[i].count for i in range(self.c.n))
