"""Exception stores of dm-snapshot: which chunks differ from the origin, and where they are.

The persistent format (drivers/md/dm-snap-persistent.c; all numbers little-endian)::

    chunk 0     0  u32  magic, "SnAp"        4  u32  1 if valid, 0 once it overflowed
                8  u32  version, 1          12  u32  sectors of a chunk
    chunk 1     a table of (u64 chunk of the origin, u64 chunk of the store), one chunk long; the
                second number is 0 after the last one
    …           the data that the table names, then the next table, and so on

A store is as durable as its tables: an exception counts once it is in one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .interface import BlockDamaged, BlockError

MAGIC = 0x70416E53
VERSION = 1
SECTOR = 512
ENTRY = struct.Struct("<QQ")
_HEADER = struct.Struct("<IIII")
_PIECE = 1 << 20
LEAST_CHUNK = 4096


class StoreDamaged(BlockDamaged):
    """An exception store that is none, or that cannot be right."""


class StoreInvalid(BlockError):
    """A snapshot overflowed: what it had kept does not say any more what the origin was."""


@dataclass(frozen=True)
class Header:
    """``chunk`` in bytes. ``fresh``: nobody has used the store yet."""

    chunk: int
    fresh: bool = False

    @property
    def per_table(self) -> int:
        """Exceptions that one table holds."""
        return self.chunk // ENTRY.size


class Reader:
    """A store, read past the page cache, in which the kernel's writes to a device do not show."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # file systems without direct I/O; there the cache is the truth
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, _PIECE)  # aligned as direct I/O wants it
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)
        self._buffer.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, length: int) -> bytes:
        """Whole sectors at most 1 MiB long. StoreDamaged if the store ends before."""
        got = os.preadv(self._fd, [memoryview(self._buffer)[:length]], offset)
        if got != length:
            raise StoreDamaged(f"{self.path} ends in the middle of its exceptions")
        return self._buffer[:length]

    def header(self) -> Header:
        """StoreDamaged, StoreInvalid."""
        magic, valid, version, sectors = _HEADER.unpack_from(self.read(0, LEAST_CHUNK))
        if magic == 0:
            return Header(0, fresh=True)
        if (magic != MAGIC or version != VERSION or sectors & (sectors - 1)
                or not 8 <= sectors <= _PIECE // SECTOR):
            raise StoreDamaged(f"{self.path} is no exception store of dm-snapshot")
        if not valid:
            raise StoreInvalid(f"{self.path} overflowed")
        return Header(sectors * SECTOR)

    def exceptions(self) -> dict[int, int]:
        """Chunks of the origin, and where in the store (in chunks) each one's data is."""
        return dict(self.entries())

    def entries(self) -> Iterator[tuple[int, int]]:
        """The same, one after the other as they are in the tables."""
        header = self.header()
        if header.fresh:
            return
        most = self.size // header.chunk
        at = 1
        while True:
            if at >= most:  # a full store ends after its last data
                return
            table = self.read(at * header.chunk, header.chunk)
            for old, new in ENTRY.iter_unpack(table):
                if new == 0:
                    return
                if new >= most or (new - 1) % (header.per_table + 1) == 0:
                    raise StoreDamaged(f"{self.path} names data that is not in it")
                yield old, new
            at += header.per_table + 1


def ranges(chunks: Iterable[int], chunk: int, size: int) -> list[tuple[int, int]]:
    """Chunks as byte ranges (offset, length), ascending, neighbours made one, within ``size``."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(chunks)):
        start = number * chunk
        length = min(chunk, size - start)
        if length <= 0:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def changed(path: Path, size: int) -> list[tuple[int, int]]:
    """Byte ranges of a disk of ``size`` bytes in which a snapshot has exceptions."""
    with Reader(path) as store:
        header = store.header()
        return [] if header.fresh else ranges(store.exceptions(), header.chunk, size)


def erase(path: Path) -> None:
    """Make a store fresh: the next snapshot on it begins with nothing. Durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(4096), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def room_for(size: int, chunk: int) -> int:
    """Bytes of a store in which every chunk of a disk of ``size`` bytes has room."""
    chunks = -(-size // chunk)
    tables = chunks // (chunk // ENTRY.size) + 1
    return (1 + chunks + tables + 1) * chunk


def in_use(path: Path) -> int:
    """Bytes of a store up to the end of the last table or data that counts."""
    with Reader(path) as store:
        header = store.header()
        if header.fresh:
            return 4096
        count = highest = 0
        for _, new in store.entries():
            count, highest = count + 1, max(highest, new)
        # The table that follows the last full one ends the list.
        last = 1 + count // header.per_table * (header.per_table + 1)
        return (max(last, highest) + 1) * header.chunk


def layout(count: int, chunk: int) -> Iterator[int]:
    """Where a writer puts the data of ``count`` exceptions, in chunks, one after the other."""
    per_table = chunk // ENTRY.size
    for index in range(count):
        table, within = divmod(index, per_table)
        yield 1 + table * (per_table + 1) + 1 + within
