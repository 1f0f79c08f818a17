"""Making a fresh process' memory equal to an image."""

from __future__ import annotations

from memsave.errors import MemsaveError
from memsave.image import Image, renumber
from memsave.layout import Layout
from memsave.native import Runs, Segments, check, ffi, lib, new_error
from memsave.packs import PackStore, PackTable
from memsave.tracking import Tracker


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
        # Whatever a fresh hypervisor put there (ROM contents) goes, so every page counts that is
        # there; anonymous memory that nobody touched reads as zero.
        live = tracker.populated(number)
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
