"""Packs: files of guest pages, written once, immutable after it.

``ID.pack`` holds pages only, slot s at byte s * 4096. A *flat* pack keeps page n at slot n, with
holes, so that a hypervisor can map the file; a *delta* pack holds what changed, without gaps.
``ID.idx`` says which slots are in use and each one's checksum. Pages are not compressed: they are
read at random, and mapped. docs/memory-image.md has the octets.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave import files
from memsave.errors import MemoryDamaged, MemsaveError
from memsave.layout import MAX_PAGES, PAGE
from memsave.native import Runs, check, ffi, lib, new_error, run_fault

MAGIC = b"EPOCHIDX"
HEADER = struct.Struct("<QQQII")  # slots, slots in use, spans, kind, bytes of the id
DELTA, FLAT = 0, 1
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
assert HEADER.size == 32


def checked_id(pack_id: str) -> str:
    """A pack id is a file name of letters, digits, '.', '_', '-'; ValueError otherwise."""
    if not ID.fullmatch(pack_id) or pack_id.endswith((".pack", ".idx", files.TEMPORARY)):
        raise ValueError(f"{pack_id!r} is not a pack id")
    return pack_id


class Pack:
    """An open pack: a file descriptor and the index. Raises MemoryDamaged; freed by close()."""

    def __init__(self, pack_id: str, path: Path, index: Path) -> None:
        self.id, self.path = pack_id, path
        reader = files.Reader(index, "pack index", MAGIC)
        self.slots, self.used, spans, kind, id_length = reader.unpack(HEADER, "its header")
        if self.slots > MAX_PAGES or self.used > self.slots or kind not in (DELTA, FLAT):
            raise reader.damaged(f"has an impossible header: {self.used} of {self.slots} slots in "
                                 f"use, kind {kind}")
        self.flat = kind == FLAT
        if reader.take(id_length, "its id") != pack_id.encode():
            raise reader.damaged("belongs to another pack")
        spans_at = reader.bound(spans, ffi.sizeof("ms_span"), "spans")
        sums_at = reader.bound(self.used, 8, "checksums")
        reader.end()
        self._data = ffi.from_buffer("uint8_t[]", reader.data)  # c points into it
        self._before = ffi.new("uint64_t[]", max(spans, 1))
        self.c = ffi.new("ms_pack *", {
            "fd": -1, "slots": self.slots, "used": self.used, "nspans": spans,
            "spans": ffi.cast("ms_span *", self._data + spans_at), "before": self._before,
            "sums": ffi.cast("uint64_t *", self._data + sums_at)})
        error = new_error()
        code = lib.ms_pack_check(self.c, error)
        if code:
            raise reader.damaged(f"is not in order: {run_fault(code, error)}")
        self.c.fd = self._open()

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MemoryDamaged(f"the pack {self.path.name} is missing", self.path) from None
        except OSError as error:
            raise MemoryDamaged(f"the pack {self.path.name} cannot be read: {error.strerror}",
                                self.path) from error
        size = os.fstat(fd).st_size
        if size != self.slots * PAGE:
            os.close(fd)
            raise MemoryDamaged(f"the pack {self.path.name} has {size} bytes instead of "
                                f"{self.slots * PAGE}", self.path)
        return fd

    def in_use(self) -> Runs:
        """Every slot in use, as runs of pack number 0 at page = slot."""
        runs = Runs()
        for i in range(self.c.nspans):
            span = self.c.spans[i]
            runs.push(span.first, span.first, span.count, 0)
        return runs

    def close(self) -> None:
        if self.c.fd >= 0:
            os.close(self.c.fd)
            self.c.fd = -1


class PackTable:
    """Open packs by number, as the C core takes them. Valid until the PackStore is closed."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        self._packs = list(packs)  # keeps what the structures point to
        self.paths = [pack.path for pack in packs]
        self.c = ffi.new("ms_pack[]", max(len(packs), 1))
        for number, pack in enumerate(packs):
            self.c[number] = pack.c[0]

    def check(self, code: int, error: Any, doing: str) -> None:
        """As native.check, with this table's paths."""
        check(code, error, doing, self.paths)


class PackStore:
    """A directory of packs. Packs stay open until close(); a context manager.

    The directory must exist; it should be readable by its owner alone, since packs hold the
    guest's secrets. Files in it are made with mode 0600.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._open: dict[str, Pack] = {}

    def pack_path(self, pack_id: str) -> Path:
        return self.directory / f"{checked_id(pack_id)}.pack"

    def index_path(self, pack_id: str) -> Path:
        return self.directory / f"{checked_id(pack_id)}.idx"

    def final_files(self, pack_id: str) -> list[Path]:
        """The two files of a finished pack."""
        return [self.pack_path(pack_id), self.index_path(pack_id)]

    def files(self, pack_id: str) -> list[Path]:
        """Every path that writing this pack may have left behind."""
        return [path for final in self.final_files(pack_id)
                for path in (final, files.temporary(final))]

    def drop(self, pack_id: str) -> None:
        """Remove a pack, finished or not; nothing there is fine."""
        pack = self._open.pop(pack_id, None)
        if pack is not None:
            pack.close()
        for path in self.files(pack_id):
            path.unlink(missing_ok=True)
        files.sync_directory(self.directory)

    def usage(self, pack_id: str) -> int:
        """Bytes on disk of both files (holes take none). Raises OSError if one is missing."""
        return sum(path.stat().st_blocks * 512 for path in self.final_files(pack_id))

    def room(self) -> int:
        """Bytes that are free in the directory's file system. Raises OSError."""
        stat = os.statvfs(self.directory)
        return stat.f_bavail * stat.f_frsize

    def signature(self, pack_id: str) -> str:
        """What stat says of both files: "size:mtime:ctime:inode" (ns) each, joined with ';'.

        It is another one once anybody wrote to, truncated or replaced a file. Raises OSError.
        """
        return ";".join(f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
                        for stat in (path.stat() for path in self.final_files(pack_id)))

    def open(self, pack_id: str) -> Pack:
        """Open a pack, or return it open. MemoryDamaged if it is missing, of another size than
        its index says, or if the index is not whole."""
        pack = self._open.get(pack_id)
        if pack is None:
            pack = Pack(pack_id, self.pack_path(pack_id), self.index_path(pack_id))
            self._open[pack_id] = pack
        return pack

    def table(self, pack_ids: Sequence[str]) -> PackTable:
        """Open packs, numbered in the order given."""
        return PackTable([self.open(pack_id) for pack_id in pack_ids])

    def verify(self, pack_id: str) -> None:
        """Read every slot in use and compare its checksum. Raises MemoryDamaged."""
        verify_runs(self.table([pack_id]), self.open(pack_id).in_use())

    def exists(self, pack_id: str) -> bool:
        """Whether a file of this pack is there already."""
        return any(path.exists() for path in self.final_files(pack_id))

    def close(self) -> None:
        """Close every pack; the store can be used on."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> PackStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def verify_runs(table: PackTable, runs: Runs) -> None:
    """Read every page that runs refer to: right checksum, not zero. Raises MemoryDamaged."""
    error = new_error()
    table.check(lib.ms_verify(table.c, runs.c.v, runs.c.n, error), error, "verifying")


class PackWriter:
    """Writes one new pack. Context manager: what was not finished is removed.

    MemsaveError if the pack exists already.
    """

    def __init__(self, store: PackStore, pack_id: str) -> None:
        if store.exists(pack_id):
            raise MemsaveError(f"pack {pack_id} exists already and packs are never changed")
        self.id = pack_id
        self._store = store
        self._pack, self._index = store.final_files(pack_id)
        try:
            self._fd = files.create(files.temporary(self._pack))
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> MemsaveError:
        return MemsaveError(f"{self.doing}: {error.strerror}")

    @property
    def doing(self) -> str:
        """The beginning of a message about a failure."""
        return f"pack {self.id} cannot be written to {self._store.directory}"

    @property
    def fd(self) -> int:
        """The pack's temporary file, opened for writing."""
        return self._fd

    def finish(self, *, flat: bool, slots: int, spans: Sequence[tuple[int, int]],
               checksums: bytes) -> int:
        """Make the pack durable and visible. Returns the bytes both files take on disk.

        ``spans``: (first slot, count) in use; ``checksums``: little-endian u64 of each such slot.
        MemsaveError if there is no room, or writing fails.
        """
        try:
            return self._finish(flat, slots, spans, checksums)
        except OSError as error:
            raise self._cannot(error) from error

    def _finish(self, flat: bool, slots: int, spans: Sequence[tuple[int, int]],
                checksums: bytes) -> int:
        name = self.id.encode()
        used = sum(count for _, count in spans)
        os.ftruncate(self._fd, slots * PAGE)
        os.fsync(self._fd)
        files.write_temporary(self._index, files.sealed(MAGIC, (
            HEADER.pack(slots, used, len(spans), FLAT if flat else DELTA, len(name)),
            files.padded(name), b"".join(struct.pack("<QQ", *span) for span in spans),
            checksums)))
        for path in (self._pack, self._index):
            files.temporary(path).rename(path)
        files.sync_directory(self._store.directory)
        return self._store.usage(self.id)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.close(self._fd)
        if kind is not None:
            self._store.drop(self.id)
