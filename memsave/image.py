"""The canonical memory image: a full run-length map from page number to zero or (pack, slot)."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from memsave import native
from memsave.files import Reader, tail, write_durably
from memsave.layout import MAX_BLOCKS, MAX_NAME, PAGE, Block, Layout
from memsave.packs import SLOT_BITS, PackStore, Table, reference

MAGIC = b"EPOCHMAP"
# version, page size, incompatible features, blocks, packs, flat pack or NONE, reserved, runs
HEADER = struct.Struct("<IIQIIIIQ")
BLOCK = struct.Struct("<QI")  # pages, bytes of name
KNOWN_FEATURES = 0
NONE = 0xFFFFFFFF
MAX_PACKS = 1 << 20
SLOT_MASK = (1 << SLOT_BITS) - 1


class Image:
    """What guest memory held at one instant. Immutable; cheap to load, pages stay in the packs."""

    def __init__(self, layout: Layout, packs: Sequence[str], flat: str | None,
                 counts: array[int], firsts: array[int]) -> None:
        self.layout = layout
        self._packs = tuple(packs)
        self.flat = flat
        self._counts, self._firsts = counts, firsts

    @classmethod
    def zero(cls, layout: Layout) -> Image:
        """All pages zero: what a hypervisor's memory holds before it ever ran."""
        return cls(layout, (), None, array("Q", [layout.pages]), array("Q", [0]))

    @classmethod
    def from_refs(cls, layout: Layout, pack_ids: Sequence[str], flat: str | None,
                  refs: array[int]) -> Image:
        """Compress page references; packs that no page refers to are left out (but ``flat``)."""
        counts, firsts = _compress(refs)
        used = sorted({(first >> SLOT_BITS) - 1 for first in firsts if first}
                      | ({pack_ids.index(flat)} if flat is not None else set()))
        renumber = {old: new for new, old in enumerate(used)}
        firsts = array("Q", (_renumbered(first, renumber) for first in firsts))
        return cls(layout, [pack_ids[index] for index in used], flat, counts, firsts)

    @property
    def packs(self) -> frozenset[str]:
        """Ids of the packs that this image cannot do without."""
        return frozenset(self._packs)

    @property
    def resident(self) -> int:
        """Pages that are not zero."""
        return sum(count for count, first in zip(self._counts, self._firsts, strict=True) if first)

    def refs(self, pack_ids: Sequence[str]) -> array[int]:
        """One reference per page, with indices into ``pack_ids`` (which holds all of ours)."""
        index = {pack: number for number, pack in enumerate(pack_ids)}
        renumber = {old: index[pack] for old, pack in enumerate(self._packs)}
        firsts = array("Q", (_renumbered(first, renumber) for first in self._firsts))
        found = native.numbers(self.layout.pages)
        native.lib.ms_expand(native.u64(self._counts), native.u64(firsts), len(firsts),
                             native.u64(found))
        return found

    def own_refs(self) -> array[int]:
        """References with indices into :attr:`pack_ids`."""
        return self.refs(self._packs)

    @property
    def pack_ids(self) -> tuple[str, ...]:
        """The packs in the order that the file lists them."""
        return self._packs

    def flat_view(self) -> Image:
        """What a fresh hypervisor that maps ``flat`` holds: that pack in block 0, zero beyond."""
        main = self.layout.blocks[0].pages
        counts, firsts = array("Q", [main]), array("Q", [reference(0, 0)])
        if self.layout.pages > main:
            counts.append(self.layout.pages - main)
            firsts.append(0)
        if self.flat is None:
            return Image.zero(self.layout)
        return Image(self.layout, (self.flat,), self.flat, counts, firsts)

    # -- the file ------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """Write the page map durably (the caller syncs the directory)."""
        flat = NONE if self.flat is None else self._packs.index(self.flat)
        parts = [MAGIC, HEADER.pack(1, PAGE, 0, len(self.layout.blocks), len(self._packs), flat, 0,
                                    len(self._counts))]
        for block in self.layout.blocks:
            name = block.name.encode()
            parts += [BLOCK.pack(block.pages, len(name)), name]
        parts += [bytes.fromhex(pack) for pack in self._packs]
        pairs = array("Q", (number for pair in zip(self._counts, self._firsts, strict=True)
                            for number in pair))
        write_durably(Path(path), [*parts, tail(pairs)])

    @classmethod
    def load(cls, path: Path) -> Image:
        """Read a page map; MemoryDamaged or MemsaveError if it is not one that we can trust."""
        reader = Reader(Path(path), "page map", MAGIC)
        version, page, features, blocks, packs, flat, _, runs = reader.unpack(HEADER)
        reader.check_version(version, features, KNOWN_FEATURES)
        if page != PAGE or not 0 < blocks <= MAX_BLOCKS or packs > MAX_PACKS or (
                flat != NONE and flat >= packs):
            raise reader.damaged("makes no sense")
        found = []
        for _ in range(blocks):
            pages, size = reader.unpack(BLOCK)
            if size > MAX_NAME:
                raise reader.damaged("has a block with an overlong name")
            try:
                found.append(Block(reader.take(size).decode(), pages * PAGE))
            except ValueError as error:
                raise reader.damaged(f"has an impossible block: {error}") from error
        try:
            layout = Layout(tuple(found))
        except ValueError as error:
            raise reader.damaged(f"has an impossible layout: {error}") from error
        ids = [reader.take(16).hex() for _ in range(packs)]
        pairs = reader.numbers(runs * 2)
        reader.end()
        counts, firsts = pairs[::2], pairs[1::2]
        if sum(counts) != layout.pages or 0 in counts:
            raise reader.damaged("does not cover its memory exactly")
        for count, first in zip(counts, firsts, strict=True):
            if first and ((first >> SLOT_BITS) > packs or first <= SLOT_MASK
                          or (first & SLOT_MASK) + count > SLOT_MASK):
                raise reader.damaged("refers to a pack that it does not name")
        return cls(layout, ids, None if flat == NONE else ids[flat], counts, firsts)

    # -- content -------------------------------------------------------------------------------
    def verify(self, store: PackStore) -> None:
        """Check every page that the image refers to; MemoryDamaged names the file."""
        store.table(self._packs).verify(self.own_refs())

    def digest(self, store: PackStore) -> str:
        """BLAKE2b-256 of the guest memory itself: block names and sizes, then every maximal run of
        non-zero pages as (first page, count, bytes). Equal memory, equal digest, whatever packs."""
        table = store.table(self._packs)
        digest = hashlib.blake2b(digest_size=32)
        for block in self.layout.blocks:
            name = block.name.encode()
            digest.update(struct.pack("<QI", block.pages, len(name)) + name)
        for first, pieces in self._content():
            digest.update(struct.pack("<QQ", first, sum(count for _, _, count in pieces)))
            for pack, slot, count in pieces:
                digest.update(table.packs[pack].page_bytes(slot, count))
        return digest.hexdigest()

    def _content(self) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Maximal non-zero runs: first page and the (pack, slot, count) pieces it is made of."""
        at, first = 0, 0
        pieces: list[tuple[int, int, int]] = []
        for count, ref in zip(self._counts, self._firsts, strict=True):
            if ref:
                if not pieces:
                    first = at
                pieces.append(((ref >> SLOT_BITS) - 1, ref & SLOT_MASK, count))
            elif pieces:
                yield first, pieces
                pieces = []
            at += count
        if pieces:
            yield first, pieces


def diff(a: Image, b: Image, store: PackStore) -> list[tuple[str, int, int]]:
    """Runs of pages whose bytes differ: (block, first page in it, count)."""
    if a.layout != b.layout:
        raise ValueError("images of different layouts cannot be compared")
    pack_ids = sorted(a.packs | b.packs)
    table: Table = store.table(pack_ids)
    left, right = a.refs(pack_ids), b.refs(pack_ids)
    numbers = native.numbers(a.layout.pages)
    count = native.lib.ms_differ(native.u64(left), native.u64(right), len(left),
                                 native.u64(numbers))
    count = native.checked(native.lib.ms_differ_bytes(
        native.u64(left), table.c, len(table), native.u64(right), table.c, len(table),
        native.u64(numbers), count), "comparing two images")
    return a.layout.runs(as_runs(numbers[:count]))


def as_runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, count)."""
    found: list[tuple[int, int]] = []
    start = end = -1
    for number in numbers:
        if number == end:
            end += 1
            continue
        if end > start:
            found.append((start, end - start))
        start, end = number, number + 1
    if end > start:
        found.append((start, end - start))
    return found


def _compress(refs: array[int]) -> tuple[array[int], array[int]]:
    null = native.ffi.NULL
    runs = native.lib.ms_compress(native.u64(refs), len(refs), null, null)
    counts, firsts = native.numbers(runs), native.numbers(runs)
    native.lib.ms_compress(native.u64(refs), len(refs), native.u64(counts), native.u64(firsts))
    return counts, firsts


def _renumbered(first: int, renumber: dict[int, int]) -> int:
    if not first:
        return 0
    return reference(renumber[(first >> SLOT_BITS) - 1], first & SLOT_MASK)
