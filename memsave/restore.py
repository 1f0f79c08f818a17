"""Making a fresh process' memory equal to an image."""

from __future__ import annotations

from pathlib import Path

from memsave.errors import MemsaveError
from memsave.image import Image, renumber
from memsave.layout import PAGE, Layout
from memsave.native import Runs, Segments, check, ffi, lib, new_error
from memsave.packs import PackStore, PackTable
from memsave.tracking import Ranges, Tracker


def patch(tracker: Tracker, layout: Layout, image: Image, packs: PackStore, over: Image) -> int:
    """See :meth:`memsave.GuestMemory.patch`."""
    for name, one in (("image", image), ("image mapped", over)):
        if one.layout != layout:
            raise MemsaveError(f"the {name} has another memory layout than the process")
    ids = sorted(image.packs | over.packs)
    table = packs.table(ids)
    wanted = renumber(image.runs, image.pack_ids, ids)
    held = in_use(renumber(over.runs, over.pack_ids, ids), table)
    segments, error = Segments(), new_error()
    first = layout.blocks[0].pages
    segments.add_difference(wanted, held, 0, first)
    for number, block in enumerate(layout.blocks[1:], start=1):
        # Whatever a fresh hypervisor put there (ROM contents) goes, so every page counts. Memory
        # that nobody touched reads as zero, if it is anonymous.
        if _anonymous(tracker, number):
            live = tracker.populated(number)
        else:
            live = Ranges()
            live.push(first, block.pages)
        check(lib.ms_runs_over_live(wanted.c, live.c, first, first + block.pages, segments.c,
                                    error), error, "page map")
        first += block.pages
    written = ffi.new("uint64_t *")
    table.check(lib.ms_patch(tracker.c, table.c, segments.c.v, segments.c.n, written, error),
                error, f"patching process {tracker.pid}")
    tracker.require_alive()
    return int(written[0])


def in_use(runs: Runs, table: PackTable) -> Runs:
    """Runs without references to holes, which read as zero."""
    out, error = Runs(), new_error()
    check(lib.ms_runs_in_use(table.c, runs.c, out.c, error), error, "page map")
    return out


def _anonymous(tracker: Tracker, number: int) -> bool:
    """Whether a block lies in anonymous memory, by /proc/PID/maps (inode 0)."""
    block = tracker.c.blocks[number]
    at, end = int(block.address), int(block.address + block.pages * PAGE)
    for line in Path(f"/proc/{tracker.pid}/maps").read_text().splitlines():
        area, _, _, _, inode = line.split()[:5]
        low, high = (int(part, 16) for part in area.split("-"))
        if low <= at < high:
            if inode != "0":
                return False
            at = high
        if at >= end:
            return True
    return False
