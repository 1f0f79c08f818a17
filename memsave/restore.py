"""Making a fresh, paused hypervisor process hold an image."""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING

from memsave import native
from memsave.image import Image
from memsave.layout import PAGE
from memsave.packs import PackStore, Table
from memsave.shadow import Shadow

if TYPE_CHECKING:
    from memsave.capture import GuestMemory


def patch(guest: GuestMemory, image: Image, packs: PackStore, over: Image) -> int:
    """Write every page in which the process differs from ``image``; returns how many.

    ``over`` says what block 0 holds (:meth:`Image.flat_view` of the image whose flat pack the
    process maps). The other blocks of a fresh process hold whatever the hypervisor put there, so
    they are looked at. Each page's checksum is verified before it is written: MemoryDamaged.
    """
    ids = list(dict.fromkeys([*image.pack_ids, *over.pack_ids]))
    table = packs.table(ids)
    wanted, held = image.refs(ids), over.refs(ids)
    main = guest.layout.blocks[0].pages
    numbers = native.numbers(main)
    count = native.lib.ms_differ(native.u64(wanted), native.u64(held), main, native.u64(numbers))
    # A reference may differ where the content does not: both zero, one of them as a hole of the
    # flat pack.
    count = native.checked(native.lib.ms_differ_bytes(
        native.u64(wanted), table.c, len(table), native.u64(held), table.c, len(table),
        native.u64(numbers), count), "comparing an image with its flat pack")
    written = _write(guest, 0, numbers[:count], wanted, 0, table)
    at = main
    for index, block in enumerate(guest.layout.blocks[1:], 1):
        pages = _differing(guest, index, wanted[at:at + block.pages], table)
        written += _write(guest, index, pages, wanted, at, table)
        at += block.pages
    return written


def _write(guest: GuestMemory, block: int, pages: array[int], wanted: array[int], first: int,
           table: Table) -> int:
    """Write pages (numbered within the block) from where the image has them."""
    if not pages:
        return 0
    refs = array("Q", (wanted[first + page] for page in pages))
    table.verify(refs)
    zero = native.ffi.new("uint8_t[]", PAGE)
    sources = native.ffi.new("const uint8_t *[]", len(pages))
    native.checked(native.lib.ms_resolve(native.u64(refs), len(refs), table.c, len(table), zero,
                                         sources), "resolving pages")
    return native.checked(native.lib.ms_write(guest.pid, guest.place(block), native.u64(pages),
                                              sources, len(pages)),
                          f"writing the memory of process {guest.pid}")


def _differing(guest: GuestMemory, index: int, refs: array[int], table: Table) -> array[int]:
    """Pages of a block whose content in the process is not what the references say."""
    runs = guest.tracker.private(guest.place(index), len(refs), written=False, protect=False)
    present = array("Q", chain.from_iterable(range(first, first + count)
                                             for first, count in runs))
    shadow = Shadow(len(refs), None)
    try:
        if runs:
            guest.read(index, native.ffi.new("ms_run[]", runs), len(runs), shadow.address(0))
        numbers = array("Q", sorted({*present, *(n for n, ref in enumerate(refs) if ref)}))
        kinds = bytearray(len(numbers))
        native.checked(native.lib.ms_classify(
            shadow.address(0), native.u64(numbers), len(numbers), native.u64(refs),
            native.ffi.NULL, table.c, len(table),
            native.ffi.from_buffer("uint8_t[]", kinds)), "comparing a block with the image")
        return array("Q", (number for number, kind in zip(numbers, kinds, strict=True)
                           if kind != native.lib.MS_SAME))
    finally:
        shadow.close()
