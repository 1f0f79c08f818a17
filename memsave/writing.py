"""From captured pages to an image: classify, choose a kind of pack, store, map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memsave import folding
from memsave.errors import MemsaveError
from memsave.image import Image, renumber
from memsave.layout import PAGE, Layout
from memsave.native import Runs, Segments, check, ffi, lib, new_error
from memsave.packs import PackStore, PackTable, PackWriter

CHUNK = 16384  # pages between two calls of progress
SPARE = 64 * 2**20  # bytes that flat packs and folding leave free

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WriteResult:
    """``image`` and, unless nothing had to be stored, the new pack's id.

    Pages: ``changed_pages`` differ from the base, of those ``zero_pages`` became zero and
    ``new_pages`` had to be stored. ``folded_pages`` were copied from packs that the image needs no
    longer. ``bytes_written``: what the new pack takes on disk.
    """

    image: Image
    pack_id: str | None
    new_pages: int
    changed_pages: int
    zero_pages: int
    folded_pages: int
    bytes_written: int
    flat: bool


class Classified:
    """What every copy is in terms of the base and the parent, whose runs share one numbering."""

    def __init__(self, copies: Any, base: Runs, parent: Runs | None, table: PackTable,
                 progress: Progress | None) -> None:
        self.copies, self.n = copies.v, int(copies.n)
        n = max(self.n, 1)
        self.kinds = ffi.new("uint8_t[]", n)
        self.hashes = ffi.new("uint64_t[]", n)
        base_slots, base_packs = _lookup(base, self.copies, self.n)
        self.parent_slots, self.parent_packs = ffi.NULL, ffi.NULL
        if parent is not None:
            self.parent_slots, self.parent_packs = _lookup(parent, self.copies, self.n)
        error = new_error()
        for at in range(0, self.n, CHUNK):
            part = min(CHUNK, self.n - at)
            table.check(lib.ms_classify(
                table.c, self.copies + at, part, base_slots + at, base_packs + at,
                self.parent_slots + at if parent is not None else ffi.NULL,
                self.parent_packs + at if parent is not None else ffi.NULL,
                self.kinds + at, self.hashes + at, error), error, "comparing pages")
            if progress is not None:
                progress(at + part, self.n)
        counts = ffi.new("uint64_t[4]")
        lib.ms_count_kinds(self.kinds, self.n, counts)
        self.new, self.zero = int(counts[lib.MS_NEW]), int(counts[lib.MS_NOW_ZERO])
        self.changed = self.n - int(counts[lib.MS_SAME_AS_BASE])

    def updates(self, new_pack: int, *, flat: bool) -> Runs:
        """Runs to lay over the base; new pages get slots in pack number ``new_pack``."""
        out, error, slot = Runs(), new_error(), ffi.new("uint64_t *")
        check(lib.ms_apply(self.copies, self.kinds, self.parent_slots, self.parent_packs, self.n,
                           new_pack, int(flat), slot, out.c, error), error, "page map")
        return out

    def store(self, fd: int, *, flat: bool, doing: str = "writing pages") -> None:
        """Write the new pages to a pack's file."""
        error, slot = new_error(), ffi.new("uint64_t *")
        check(lib.ms_write_new(fd, self.copies, self.kinds, self.n, int(flat), slot, error), error,
              doing)

    def new_hashes(self) -> Any:
        """Checksums of the new pages in page order (``uint64_t[]``)."""
        out = ffi.new("uint64_t[]", max(self.new, 1))
        lib.ms_new_hashes(self.kinds, self.hashes, self.n, out)
        return out


def _lookup(runs: Runs, copies: Any, n: int) -> tuple[Any, Any]:
    slots, packs = ffi.new("uint64_t[]", max(n, 1)), ffi.new("uint32_t[]", max(n, 1))
    lib.ms_runs_lookup(runs.c, copies, n, slots, packs)
    return slots, packs


def write_image(layout: Layout, copies: Any, base: Image, parent: Image | None, packs: PackStore,
                pack_id: str, flat: bool | None, progress: Progress | None) -> WriteResult:
    """See :meth:`memsave.capture.Capture.write`. ``copies`` is an ``ms_copies *``."""
    for name, image in (("base", base), ("parent", parent)):
        if image is not None and image.layout != layout:
            raise MemsaveError(f"the {name} image has another memory layout than the process")
    above = parent.packs if parent is not None else frozenset()
    ids = sorted(base.packs | above)
    if pack_id in ids:
        raise MemsaveError(f"pack {pack_id} exists already and packs are never changed")
    table = packs.table(ids)
    new_pack = len(ids)
    base_runs = renumber(base.runs, base.pack_ids, ids)
    parent_runs = renumber(parent.runs, parent.pack_ids, ids) if parent is not None else None
    found = Classified(copies, base_runs, parent_runs, table, progress)
    runs = base_runs.overlaid(found.updates(new_pack, flat=False))
    nearest = base.flat or (parent.flat if parent is not None else None)
    if flat is None:
        flat = nearest is None or (_far(layout, runs, ids.index(nearest), table)
                                   and _fits(packs, runs.pages))
    written, folded = 0, 0
    if flat:
        runs = base_runs.overlaid(found.updates(new_pack, flat=True))
        with PackWriter(packs, pack_id) as writer:
            runs, written = _write_flat(layout, writer, runs, found, table, new_pack)
        nearest = pack_id
    else:
        folds = _folds(runs, ids, nearest, found.new)
        if not _fits(packs, found.new + sum(folds.values())):
            folds = {}
        if found.new or folds:
            with PackWriter(packs, pack_id) as writer:
                runs, folded, written = _write_delta(writer, runs, found, table, folds, new_pack)
    image = Image(layout, [*ids, pack_id], runs, nearest)
    return WriteResult(image, pack_id if flat or found.new or folded else None, found.new,
                       found.changed, found.zero, folded, written, flat)


def _fits(packs: PackStore, pages: int) -> bool:
    """Whether there is room for what could be left for later, with something to spare. A store
    that is nearly full is no reason to refuse an epoch that fits into it."""
    try:
        return packs.room() > pages * PAGE + SPARE
    except OSError as error:
        raise MemsaveError(f"{packs.directory}: {error.strerror}") from error


def _folds(runs: Runs, ids: list[str], nearest: str | None, new: int) -> dict[int, int]:
    """Pack numbers to fold into the new pack, with the pages that each holds of the image."""
    live = {number: pages for number, pages in enumerate(runs.by_pack(len(ids) + 1)[:-1])
            if pages and ids[number] != nearest}
    return {number: live[number] for number in folding.plan(live, new)}


def _far(layout: Layout, runs: Runs, flat: int, table: PackTable) -> bool:
    """Whether block 0 is so far from a flat pack that patching costs more than a new one."""
    end = layout.blocks[0].pages
    differing = Segments()
    differing.add_difference(runs, mapped(end, flat, table), 0, end)
    return differing.pages * 4 > runs.pages


def mapped(pages: int, flat: int, table: PackTable) -> Runs:
    """What ``pages`` pages mapped from flat pack number ``flat`` hold: its slots in use."""
    view, out, error = Runs(), Runs(), new_error()
    view.push(0, 0, pages, flat)
    check(lib.ms_runs_in_use(table.c, view.c, out.c, error), error, "page map")
    return out


def _write_delta(writer: PackWriter, runs: Runs, found: Classified, table: PackTable,
                 folds: dict[int, int], new_pack: int) -> tuple[Runs, int, int]:
    """Store the new pages, behind them those of the folded packs, each checked on the way.
    Returns the image's runs, the pages folded, and the bytes written."""
    found.store(writer.fd, flat=False, doing=writer.doing)
    folded = sum(folds.values())
    slots = found.new + folded
    sums = ffi.new("uint64_t[]", slots)
    ffi.memmove(sums, found.new_hashes(), found.new * 8)
    if folds:
        marks, out, error = ffi.new("uint8_t[]", new_pack + 1), Runs(), new_error()
        for number in folds:
            marks[number] = 1
        table.check(lib.ms_fold(table.c, runs.c, marks, new_pack, writer.fd, found.new,
                                sums + found.new, out.c, error), error, writer.doing)
        runs = out
    written = writer.finish(flat=False, slots=slots, spans=[(0, slots)],
                            checksums=bytes(ffi.buffer(sums)))
    return runs, folded, written


def _write_flat(layout: Layout, writer: PackWriter, runs: Runs, found: Classified,
                table: PackTable, new_pack: int) -> tuple[Runs, int]:
    """Store all resident pages at slot = page; pages from old packs are checked on the way."""
    found.store(writer.fd, flat=True, doing=writer.doing)
    resident = runs.pages
    sums = ffi.new("uint64_t[]", max(resident, 1))
    fresh = found.new_hashes()
    error = new_error()
    at = taken = 0
    for i in range(len(runs)):
        run = runs.c.v + i
        count = run.count
        if run.pack == new_pack:
            ffi.memmove(sums + at, fresh + taken, count * 8)
            taken += count
        else:
            table.check(lib.ms_restore_run(table.c, run, writer.fd, sums + at, error), error,
                        writer.doing)
        at += count
    spans = runs.stretches()
    flat_runs = Runs()
    for first, count in spans:
        flat_runs.push(first, first, count, new_pack)
    written = writer.finish(flat=True, slots=layout.pages, spans=spans,
                            checksums=bytes(ffi.buffer(sums))[:resident * 8])
    return flat_runs, written
