"""The canonical image of guest memory: a full page map over packs."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from memsave import files
from memsave.errors import MemoryDamaged, MemsaveError
from memsave.layout import MAX_BLOCKS, MAX_NAME, PAGE, Block, Layout
from memsave.native import Runs, Segments, ffi, lib, new_error, run_fault
from memsave.packs import ID, PackStore, PackTable, verify_runs

MAGIC = b"EPOCHMAP"
HEADER = struct.Struct("<IIIIQ")  # blocks, packs, number of the flat pack, zero, runs
BLOCK = struct.Struct("<QHHI")  # bytes, bytes of the name, zero, zero
PACK = struct.Struct("<II")  # bytes of the id, zero
RUN = struct.Struct("<QQII")  # page, slot, count, pack
NO_FLAT = 0xFFFFFFFF
MAX_PACKS = 1 << 20
BATCH = 256  # pages read at a time
assert (HEADER.size, BLOCK.size, PACK.size, RUN.size) == (24, 16, 8, 24)


class Image:
    """What every page of a guest holds: zero, or a slot of a pack. Immutable.

    ``layout``; ``packs``: ids of all packs needed; ``flat``: the flat pack that an instance should
    map for block 0, or None.
    """

    def __init__(self, layout: Layout, pack_ids: Sequence[str], runs: Runs,
                 flat: str | None) -> None:
        """``runs`` number packs as ``pack_ids`` lists them; packs that none needs are left out."""
        needed = {pack_id for pack_id, pages in zip(pack_ids, runs.by_pack(len(pack_ids)),
                                                    strict=True) if pages}
        if flat is not None:
            needed.add(flat)
        self.layout = layout
        self.flat = flat
        self.pack_ids = tuple(sorted(needed))
        self.packs = frozenset(needed)
        self.runs = renumber(runs, pack_ids, self.pack_ids)

    @classmethod
    def zero(cls, layout: Layout) -> Image:
        """Memory that is all zero, in no pack."""
        return cls(layout, (), Runs(), None)

    @property
    def resident(self) -> int:
        """Pages that are not zero."""
        return self.runs.pages

    def flat_view(self) -> Image:
        """What an instance holds just after it mapped this image's flat pack: block 0 as that pack
        has it, zero elsewhere. MemsaveError if there is no flat pack.

        Only :meth:`GuestMemory.patch` takes it: it refers to holes of the pack, too.
        """
        if self.flat is None:
            raise MemsaveError("this memory image has no flat pack that could be mapped")
        runs = Runs()
        runs.push(0, 0, self.layout.blocks[0].pages, 0)
        return Image(self.layout, (self.flat,), runs, self.flat)

    # -- files ------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """The page map file: equal maps over equal packs give equal bytes."""
        flat = NO_FLAT if self.flat is None else self.pack_ids.index(self.flat)
        body = [HEADER.pack(len(self.layout.blocks), len(self.pack_ids), flat, 0, len(self.runs))]
        for block in self.layout.blocks:
            name = block.name.encode()
            body += [BLOCK.pack(block.size, len(name), 0, 0), files.padded(name)]
        for pack_id in self.pack_ids:
            body += [PACK.pack(len(pack_id), 0), files.padded(pack_id.encode())]
        return files.sealed(MAGIC, [*body, self.runs.tobytes()])

    def save(self, path: Path | str, *, durable: bool = True) -> None:
        """Replace ``path`` by the page map, atomically (mode 0600); unless ``durable`` is False, so
        that it outlives a power cut, too. Raises OSError."""
        path = Path(path)
        files.write_temporary(path, self.to_bytes(), durable=durable)
        files.temporary(path).rename(path)
        if durable:
            files.sync_directory(path.parent)

    @classmethod
    def load(cls, path: Path | str) -> Image:
        """Read a page map. MemoryDamaged if it is missing or not whole; MemsaveError if it needs
        a newer memsave. Packs are not looked at."""
        reader = files.Reader(Path(path), "page map", MAGIC)
        blocks, packs, flat, reserved, runs = reader.unpack(HEADER, "its header")
        if reserved or not 0 < blocks <= MAX_BLOCKS or packs > MAX_PACKS:
            raise reader.damaged(f"has an impossible header: {blocks} blocks, {packs} packs")
        if flat != NO_FLAT and flat >= packs:
            raise reader.damaged(f"names flat pack {flat}, which its table does not have")
        layout = _read_layout(reader, blocks)
        pack_ids = [_read_pack_id(reader) for _ in range(packs)]
        if sorted(set(pack_ids)) != pack_ids:
            raise reader.damaged("has a pack table that is not in order")
        at = reader.bound(runs, RUN.size, "runs")
        reader.end()
        return cls._from_stored(reader, layout, pack_ids, flat, at, runs)

    @classmethod
    def _from_stored(cls, reader: files.Reader, layout: Layout, pack_ids: list[str], flat: int,
                     at: int, n: int) -> Image:
        data = ffi.from_buffer("uint8_t[]", reader.data)
        stored = ffi.cast("ms_run *", data + at)
        used = ffi.new("uint8_t[]", max(len(pack_ids), 1))
        error = new_error()
        code = lib.ms_runs_check(stored, n, layout.pages, len(pack_ids), used, error)
        if code:
            raise reader.damaged(f"is not in order: {run_fault(code, error)}")
        for number, pack_id in enumerate(pack_ids):
            if not used[number] and number != flat:
                raise reader.damaged(f"lists pack {pack_id}, which it does not use")
        runs = Runs()
        numbers = ffi.new("uint32_t[]", list(range(len(pack_ids))) or 1)
        code = lib.ms_runs_copy(stored, n, numbers, runs.c, error)
        if code:
            raise MemoryError("no memory for a page map")
        return cls(layout, pack_ids, runs, None if flat == NO_FLAT else pack_ids[flat])

    # -- contents ---------------------------------------------------------------------------
    def table(self, packs: PackStore) -> PackTable:
        """This image's packs, open, numbered as its runs number them."""
        return packs.table(self.pack_ids)

    def verify(self, packs: PackStore, pages: str = "used") -> None:
        """Check packs, indexes and their sizes, and the checksum of every page referred to.

        ``pages`` "none" leaves out reading pages. Raises MemoryDamaged(message, path).
        """
        if pages not in ("used", "none"):
            raise ValueError(f"pages is 'used' or 'none', not {pages!r}")
        table = self.table(packs)
        if self.flat is not None:
            flat = packs.open(self.flat)
            if not flat.flat or flat.slots < self.layout.blocks[0].pages:
                raise MemoryDamaged(f"pack {flat.path.name} cannot be mapped as the flat pack of "
                                    f"{self.layout.blocks[0].pages} pages", flat.path)
        if pages == "used":
            verify_runs(table, self.runs)

    def digest(self, packs: PackStore) -> str:
        """BLAKE2b-256 of the guest's memory, in hexadecimal: equal memory, equal digest, whatever
        packs it lies in. Every page is checked; raises MemoryDamaged."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(b"memsave guest memory 1\0" + struct.pack("<Q", len(self.layout.blocks)))
        for block in self.layout.blocks:
            name = block.name.encode()
            digest.update(struct.pack("<QQ", block.size, len(name)) + name)
        stretches = iter(self.runs.stretches())
        end = -1
        for first, data in self._read(packs):
            if first >= end:
                at, count = next(stretches)
                digest.update(struct.pack("<QQ", at, count))
                end = at + count
            digest.update(data)
        return digest.hexdigest()

    def _read(self, packs: PackStore) -> Iterator[tuple[int, memoryview]]:
        """Checked contents, in page order, in pieces of at most BATCH pages."""
        table = self.table(packs)
        buffer = bytearray(BATCH * PAGE)
        into, view, error = ffi.from_buffer("uint8_t[]", buffer), memoryview(buffer), new_error()
        for page, slot, count, pack in self.runs:
            for at in range(0, count, BATCH):
                part = min(BATCH, count - at)
                table.check(lib.ms_pack_read_checked(table.c, pack, slot + at, part, into,
                                                     ffi.NULL, error), error, "reading")
                yield page + at, view[:part * PAGE]


def renumber(runs: Runs, old: Sequence[str], new: Sequence[str]) -> Runs:
    """Runs that number packs as ``old`` lists them, numbered as ``new`` does."""
    numbers = {pack_id: number for number, pack_id in enumerate(new)}
    return runs.renumbered([numbers.get(pack_id, NO_FLAT) for pack_id in old] or [0])


def diff(a: Image, b: Image, packs: PackStore) -> list[tuple[str, int, int]]:
    """Pages whose bytes differ, as runs (block name, first page in the block, count).

    MemsaveError if the layouts differ, MemoryDamaged if a pack cannot be read.
    """
    if a.layout != b.layout:
        raise MemsaveError("memory images of different layouts cannot be compared")
    ids = sorted(a.packs | b.packs)
    table = packs.table(ids)
    segments, found, error = Segments(), Runs(), new_error()
    segments.add_difference(renumber(a.runs, a.pack_ids, ids), renumber(b.runs, b.pack_ids, ids),
                            0, a.layout.pages)
    table.check(lib.ms_diff(table.c, segments.c.v, segments.c.n, found.c, error), error,
                "comparing")
    return list(a.layout.split((page, count) for page, _, count, _ in found))


def _read_layout(reader: files.Reader, count: int) -> Layout:
    blocks = []
    for number in range(count):
        size, length, *zeros = reader.unpack(BLOCK, "its blocks")
        name = reader.take(length, "a block's name")
        if any(zeros) or length > MAX_NAME:
            raise reader.damaged(f"has an impossible entry for block {number}")
        try:
            blocks.append(Block(name.decode(), size))
        except ValueError as error:
            raise reader.damaged(f"has an impossible block: {error}") from error
    try:
        return Layout(tuple(blocks))
    except ValueError as error:
        raise reader.damaged(f"has an impossible layout: {error}") from error


def _read_pack_id(reader: files.Reader) -> str:
    length, zero = reader.unpack(PACK, "its pack table")
    name = reader.take(length, "a pack's id")
    pack_id = name.decode("ascii", "replace")
    if zero or not ID.fullmatch(pack_id):
        raise MemoryDamaged(f"the page map {reader.path.name} has an impossible pack id",
                            reader.path)
    return pack_id
