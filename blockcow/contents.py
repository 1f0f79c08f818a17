"""What a layer's file holds: checksum, signature, and the check of both.

The checksum is the sum, modulo 2**128, of the XXH3 (128 bit, seeded with the block's index) of
every 64 KiB block that is not all zero, and the file's length (the last block may be short). A
hole and written zeros thus say the same, and holes cost nothing: they are skipped with
``SEEK_DATA`` where the file system has it. Being a sum it can be carried from a file to a copy of
it of which only some blocks changed: :func:`changed_checksum`. XXH3 finds damage, it does not
withstand an attacker; whoever can write the layer directory owns the machine anyway.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from .interface import BlockError

BLOCK = 64 << 10
CHUNK = 64 * BLOCK

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, end)`` of the data in a file of ``size`` bytes, holes left out."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start, end = end, size  # block devices, old file systems: all of it is data
        if start >= size:
            return
        yield start, min(end, size)


def checksum(path: Path, progress: Progress | None = None) -> str:
    """The checksum of a file or block device as ``xxh3:SUM:LENGTH``, 32 hexadecimal
    digits and a decimal number."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return checksum_fd(fd, progress)
    finally:
        os.close(fd)


def checksum_fd(fd: int, progress: Progress | None = None) -> str:
    """:func:`checksum` of an open file."""
    return checksum_of(fd, data_extents(fd, os.lseek(fd, 0, os.SEEK_END)), progress)


def checksum_of(fd: int, extents: Iterable[tuple[int, int]],
                progress: Progress | None = None) -> str:
    """The same where the caller knows what is not zero: ``(start, end)``, ascending."""
    total = 0
    size = os.lseek(fd, 0, os.SEEK_END)
    buffer = memoryview(bytearray(CHUNK))
    position = 0
    for start, end in extents:
        begin = max(position, start // BLOCK * BLOCK)
        stop = min(size, -(-end // BLOCK) * BLOCK)
        while begin < stop:
            wanted = min(CHUNK, stop - begin)
            _read_exactly(fd, buffer[:wanted], begin)
            for at in range(0, wanted, BLOCK):
                block = buffer[at : min(at + BLOCK, wanted)]
                total += _block_sum(block, (begin + at) // BLOCK)
            begin += wanted
            if progress is not None:
                progress(wanted)
        position = max(position, stop)
    return _text(total, size)


_ZEROS = bytes(BLOCK)


def _block_sum(block: memoryview, index: int) -> int:
    if block == _ZEROS[: len(block)]:
        return 0
    return xxhash.xxh3_128_intdigest(block, index)


def _text(total: int, size: int) -> str:
    return f"xxh3:{total % (1 << 128):032x}:{size}"


def changed_checksum(
    known: str, old: int, new: int, ranges: Iterable[tuple[int, int]], progress: Progress | None
) -> str:
    """The checksum of the file ``new`` (a descriptor, as ``old``), which has the length of ``old``
    and differs from it at most in ``ranges`` (sorted); ``known`` is that of ``old``. Reads only
    the blocks that the ranges touch."""
    size = os.lseek(new, 0, os.SEEK_END)
    total = int(known.split(":")[1], 16)
    buffer = memoryview(bytearray(BLOCK))
    position = 0
    for start, length in ranges:
        first = max(position, start // BLOCK)
        position = max(position, -(-min(start + length, size) // BLOCK))
        for index in range(first, position):
            block = buffer[: min(BLOCK, size - index * BLOCK)]
            for fd, sign in ((new, 1), (old, -1)):
                _read_exactly(fd, block, index * BLOCK)
                total += sign * _block_sum(block, index)
            if progress is not None:
                progress(len(block))
    return _text(total, size)


def _read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise BlockError("the file shrank while it was read")
        done += count


def signature(path: Path) -> str:
    """``size:mtime_ns:ctime_ns:inode``; raises OSError.

    For a block device the size is 0 and the times are those of its node, which not every writer
    (a mounted file system, for one) renews: there only a full check is a proof.
    """
    seen = path.stat()
    return f"{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}:{seen.st_ino}"


def sync_file(path: Path) -> None:
    """fsync one file; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_data(path: Path) -> None:
    """fdatasync one file; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def sealed(path: Path, progress: Progress | None = None) -> tuple[str, str]:
    """Make a file durable and return its ``(checksum, signature)``.

    The signature is taken before the bytes are read: a writer that should not exist then shows
    as a signature that no longer fits.
    """
    sync_file(path)
    before = signature(path)
    return checksum(path, progress), before
