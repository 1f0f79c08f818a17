"""Packs: files of guest pages, written once, immutable after it.

``ID.pack`` holds pages only, slot s at s * 4096: *flat* packs keep page n at slot n with holes, so
that a hypervisor can map the file; *delta* packs hold what changed, without gaps. ``ID.idx`` says
which slots are used and each one's checksum. docs/memory-image.md has the octets.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave import native
from memsave.errors import MemoryDamaged
from memsave.files import Reader, sync_directory, tail, write_durably
from memsave.layout import MAX_PAGES, PAGE

MAGIC = b"EPOCHIDX"
# version, kind, incompatible features, page size, reserved, slots, used, runs
HEADER = struct.Struct("<IIQIIQQQ")
DELTA, FLAT = 0, 1
KNOWN_FEATURES = 0
SLOT_BITS = 40
ID = re.compile(r"[0-9a-f]{32}")


def reference(pack: int, slot: int) -> int:
    """A page reference: pack index (in some table) and slot; 0 stands for a page of zeros."""
    return (pack + 1) << SLOT_BITS | slot


class Pack:
    """An open pack: its pages mapped read-only, its checksums by slot."""

    def __init__(self, pack_id: str, path: Path, index: Path) -> None:
        self.id, self.path = pack_id, path
        reader = Reader(index, "index of a pack", MAGIC)
        version, kind, features, page, _, slots, used, runs = reader.unpack(HEADER)
        reader.check_version(version, features, KNOWN_FEATURES)
        if kind not in (DELTA, FLAT) or page != PAGE or not used <= slots <= MAX_PAGES:
            raise reader.damaged("makes no sense")
        self.flat = kind == FLAT
        self.slots, self.used = slots, used
        pairs = reader.numbers(runs * 2)
        checksums = reader.numbers(used)
        reader.end()
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < slots * PAGE:
                    raise MemoryDamaged(f"the pack {path.name} has {size} bytes instead of "
                                        f"{slots * PAGE}", path)
                self._map: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), slots * PAGE, prot=mmap.PROT_READ) if slots else b"")
        except FileNotFoundError:
            raise MemoryDamaged(f"the pack {path.name} is missing", path) from None
        self.runs = list(zip(pairs[::2], pairs[1::2], strict=True))
        self.hashes = native.numbers(slots)
        at, end = 0, 0
        for first, count in self.runs:
            if first < end or count == 0 or count > used - at or first + count > slots:
                raise reader.damaged("has overlapping or impossible runs")
            self.hashes[first:first + count] = checksums[at:at + count]
            at, end = at + count, first + count
        if at != used:
            raise reader.damaged("counts other slots than it lists")
        self._base: Any = native.ffi.from_buffer(self._map)

    def describe(self, into: Any) -> None:
        """Fill a C ms_pack."""
        into.base = native.ffi.cast("const uint8_t *", self._base)
        into.hashes = native.u64(self.hashes)
        into.slots = self.slots

    def page_bytes(self, slot: int, count: int) -> memoryview:
        """``count`` pages from ``slot`` on, not copied."""
        return memoryview(self._map)[slot * PAGE:(slot + count) * PAGE]

    def close(self) -> None:
        native.ffi.release(self._base)
        if isinstance(self._map, mmap.mmap):
            try:
                self._map.close()
            except BufferError:
                # A slice lives on in the frames of an exception; the mapping goes with it.
                self._map = b""


class PackStore:
    """A directory of packs. Context manager: packs stay open and mapped until it is left."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._open: dict[str, Pack] = {}

    def pack_path(self, pack_id: str) -> Path:
        return self.directory / f"{_checked(pack_id)}.pack"

    def index_path(self, pack_id: str) -> Path:
        return self.directory / f"{_checked(pack_id)}.idx"

    def final_files(self, pack_id: str) -> list[Path]:
        """The files of a finished pack."""
        return [self.pack_path(pack_id), self.index_path(pack_id)]

    def files(self, pack_id: str) -> list[Path]:
        """Every file that writing this pack may have left behind."""
        return [path for final in self.final_files(pack_id)
                for path in (final, final.with_name(final.name + ".tmp"))]

    def drop(self, pack_id: str) -> None:
        """Remove a pack, finished or not; nothing there is fine."""
        self._close(pack_id)
        for file in self.files(pack_id):
            file.unlink(missing_ok=True)
        sync_directory(self.directory)

    def usage(self, pack_id: str) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_blocks * 512 for path in self.final_files(pack_id))

    def signature(self, pack_id: str) -> str:
        """What stat says of both files; it changes when anybody touches them. Raises OSError."""
        stats = [path.stat() for path in self.final_files(pack_id)]
        return ";".join(f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}" for s in stats)

    def open(self, pack_id: str) -> Pack:
        """Map a pack; MemoryDamaged if it is missing, truncated, or its index is not intact."""
        if pack_id not in self._open:
            self._open[pack_id] = Pack(pack_id, self.pack_path(pack_id),
                                       self.index_path(pack_id))
        return self._open[pack_id]

    def table(self, pack_ids: Sequence[str]) -> Table:
        """Open packs in an order that references can be resolved with."""
        return Table([self.open(pack_id) for pack_id in pack_ids])

    def verify(self, pack_id: str) -> None:
        """Read every used slot; MemoryDamaged if one is not what was written."""
        pack = self.open(pack_id)
        table = Table([pack])
        for first, count in pack.runs:
            table.verify(array("Q", (reference(0, slot) for slot in range(first, first + count))))

    def write_index(self, pack_id: str, *, flat: bool, slots: int,
                    runs: Iterable[tuple[int, int]], checksums: array[int]) -> None:
        """Write ``ID.idx`` durably; runs are (first slot, count), checksums in their order."""
        pairs = array("Q", (number for run in runs for number in run))
        header = HEADER.pack(1, FLAT if flat else DELTA, 0, PAGE, 0, slots, len(checksums),
                             len(pairs) // 2)
        write_durably(self.index_path(pack_id), [MAGIC, header, tail(pairs), tail(checksums)])

    def _close(self, pack_id: str) -> None:
        pack = self._open.pop(pack_id, None)
        if pack is not None:
            pack.close()

    def close(self) -> None:
        for pack_id in list(self._open):
            self._close(pack_id)

    def __enter__(self) -> PackStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _checked(pack_id: str) -> str:
    if not ID.fullmatch(pack_id):
        raise ValueError(f"{pack_id!r} is no pack id")
    return pack_id


class Table:
    """Open packs by index, as C sees them. Lives no longer than the PackStore's mappings."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        self.packs = list(packs)
        self.c = native.ffi.new("ms_pack[]", max(1, len(self.packs)))
        for index, pack in enumerate(self.packs):
            pack.describe(self.c[index])

    def __len__(self) -> int:
        return len(self.packs)

    def verify(self, refs: array[int]) -> None:
        """Check every referenced page; MemoryDamaged names the pack of the first bad one."""
        good = native.lib.ms_verify(native.u64(refs), len(refs), self.c, len(self))
        if good == len(refs):
            return
        index, slot = (refs[good] >> SLOT_BITS) - 1, refs[good] & ((1 << SLOT_BITS) - 1)
        if index >= len(self.packs):
            raise MemoryDamaged("a page map refers to a pack that it does not name", "memory.map")
        pack = self.packs[index]
        raise MemoryDamaged(f"slot {slot} of the pack {pack.path.name} is not the page that was "
                            "written", pack.path)
