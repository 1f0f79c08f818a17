"""Writing and reading the header of an empty qcow2 overlay, without starting qemu-img.

The layout is specified in QEMU's ``docs/interop/qcow2.txt``; the octets that we write stand in
``docs/layers.md``. Clusters are 128 KiB with extended L2 entries, that is 32 subclusters of
4 KiB: a write of a page copies nothing up and takes 4 KiB in the (sparse) file, where plain
64 KiB clusters take 64 KiB. 2000 random 4 KiB writes over a 4 GiB disk made a file of 126 MB
with 64 KiB clusters, of 9.3 MB with 64 KiB and subclusters, and of 8.9 MB like this, for 8.2 MB
of data; the time was 1.86, 1.08 and 1.17 s.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from .interface import BlockError

MAGIC = 0x514649FB
CLUSTER_BITS = 17
CLUSTER = 1 << CLUSTER_BITS
L2_COVERS = (CLUSTER // 16) * CLUSTER
"""Bytes of the disk under one L2 table, and so under one L1 entry: 1 GiB."""

MAX_SIZE = 4 << 50
"""QEMU refuses an L1 table above 32 MiB (QCOW_MAX_L1_SIZE)."""

NAME_MAX = 1023
"""Longest backing file name (qcow2.txt)."""

_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_HEADER_LENGTH = 104
_BACKING_FORMAT = 0xE2792ACA
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))


def empty_overlay(size: int, backing_file: str, backing_format: str) -> list[tuple[int, bytes]]:
    """The pieces ``(offset, bytes)`` of an empty overlay; what lies between is zero. The file's
    length is :func:`file_length`. Raises BlockError for a size or name that qcow2 cannot hold."""
    if size <= 0 or size % 512 or size > MAX_SIZE:
        raise BlockError(f"a disk of {size} bytes cannot be an overlay: give a multiple of 512")
    name = os.fsencode(backing_file)
    form = backing_format.encode("ascii")
    if not 0 < len(name) <= NAME_MAX:
        raise BlockError(f"the path {backing_file!r} is too long for qcow2 (at most 1023 bytes)")
    extension = struct.pack(">II", _BACKING_FORMAT, len(form)) + form + bytes(-len(form) % 8)
    name_at = _HEADER_LENGTH + len(extension) + 8
    l1_entries = _l1_entries(size)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    header = _HEADER.pack(
        MAGIC,
        3,
        name_at,
        len(name),
        CLUSTER_BITS,
        size,
        0,  # no encryption
        l1_entries,
        3 * CLUSTER,  # L1 table
        1 * CLUSTER,  # reference count table
        1,
        0,  # no snapshots
        0,
        _EXTENDED_L2,
        0,
        0,
        4,  # 16 bit reference counts
        _HEADER_LENGTH,
    )
    return [
        (0, header + extension + bytes(8) + name),
        (1 * CLUSTER, struct.pack(">Q", 2 * CLUSTER)),
        (2 * CLUSTER, struct.pack(">H", 1) * (3 + l1_clusters)),
    ]


def file_length(size: int) -> int:
    """Bytes of the file of an empty overlay over a disk of ``size`` bytes."""
    return (3 + -(-_l1_entries(size) * 8 // CLUSTER)) * CLUSTER


def _l1_entries(size: int) -> int:
    return -(-size // L2_COVERS)


def create_overlay(path: Path, size: int, backing_file: str, backing_format: str) -> None:
    """Write an empty overlay, mode 0600, complete under its name or not there at all.

    It is written as ``path`` + ``.tmp`` and renamed. Not fsynced, see ``sync`` of the interface.
    """
    pieces = empty_overlay(size, backing_file, backing_format)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        os.ftruncate(fd, file_length(size))
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)
    # link() would refuse an existing name by itself, but not every file system has it.
    if path.exists():
        temporary.unlink()
        raise BlockError(f"the layer file {path} exists already: give the layer another id")
    temporary.rename(path)


@dataclass(frozen=True)
class Overlay:
    """What the header of a qcow2 file says. ``empty`` means that no L2 table exists: every byte
    comes from the backing file."""

    size: int
    backing_file: str
    backing_format: str
    clean: bool
    empty: bool


def read_overlay(path: Path) -> Overlay | None:
    """Read a header; None if the file is absent or no complete qcow2 v3 overlay (a header that
    never reached the disk). Reads at most the first cluster and 32 MiB of L1 table."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        head = os.pread(fd, 4096, 0)
        if len(head) < _HEADER_LENGTH:
            return None
        fields = _HEADER.unpack_from(head)
        magic, version, name_at, name_length, _, size, _, l1_entries, l1_at = fields[:9]
        if magic != MAGIC or version != 3 or name_length > NAME_MAX or l1_entries > MAX_SIZE >> 30:
            return None
        if name_at + name_length > CLUSTER or l1_at > os.fstat(fd).st_size:
            return None
        l1 = os.pread(fd, l1_entries * 8, l1_at)
        if len(l1) != l1_entries * 8:
            return None
        return Overlay(
            size=size,
            backing_file=os.fsdecode(os.pread(fd, name_length, name_at)),
            backing_format=_extension(head, fields[-1], _BACKING_FORMAT).decode("ascii", "replace"),
            clean=not fields[13] & (_DIRTY | _CORRUPT),
            empty=not any(l1),
        )
    finally:
        os.close(fd)


def _extension(head: bytes, at: int, wanted: int) -> bytes:
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            break
        if kind == wanted:
            return head[at + 8 : at + 8 + length]
        at += 8 + length + -length % 8
    return b""
