"""The label of a pool: what is on its device, and whose it is. docs/pool.md has the octets.

Two blocks of 4 KiB at the beginning of the device are written in turn, so that one of them is whole
whatever moment the power goes; the one with the higher sequence number counts.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from .interface import BlockDamaged

MAGIC = b"EPOCHSPL"
VERSION = 1
BLOCK = 4096
RESERVED = 2**20  # bytes at the beginning that hold no segment
SECTOR = 512
CLOSED, OPEN = 0, 1
NO_BOOT = uuid.UUID(int=0)
_HEADER = struct.Struct("<8sIIQQ16s16s16sIIQII")
_SEGMENT = struct.Struct("<QQ")
_CHECKSUM = struct.Struct("<Q")
MAX_SEGMENTS = (BLOCK - _HEADER.size - _CHECKSUM.size) // _SEGMENT.size
MAX_SECTORS = 1 << 55
assert _HEADER.size == 104


class LabelDamaged(BlockDamaged):
    """A device carries a label that is not whole, or one of a kind that is not known here."""


@dataclass(frozen=True)
class Segment:
    """Sectors [start, start + length) of the device."""

    start: int
    length: int


@dataclass(frozen=True)
class Label:
    """``size``: sectors of the device that are in use; ``metadata``, ``data``: its segments in
    order; ``block``: sectors of a block of the pool. ``boot``: the host's boot in which the pool
    was opened last; ``state``: CLOSED only if it was closed after that."""

    pool: uuid.UUID
    store: uuid.UUID
    size: int
    block: int
    metadata: tuple[Segment, ...]
    data: tuple[Segment, ...]
    sequence: int = 0
    state: int = CLOSED
    boot: uuid.UUID = NO_BOOT

    @property
    def data_sectors(self) -> int:
        return sum(segment.length for segment in self.data)

    @property
    def metadata_sectors(self) -> int:
        return sum(segment.length for segment in self.metadata)

    def to_bytes(self) -> bytes:
        """One block. ValueError for more segments than fit."""
        if len(self.metadata) + len(self.data) > MAX_SEGMENTS:
            raise ValueError(f"a label holds at most {MAX_SEGMENTS} segments")
        body = _HEADER.pack(MAGIC, VERSION, self.block, 0, self.sequence, self.pool.bytes,
                            self.store.bytes, self.boot.bytes, self.state, 0, self.size,
                            len(self.metadata), len(self.data))
        body += b"".join(_SEGMENT.pack(one.start, one.length) for one in self.metadata + self.data)
        body = body.ljust(BLOCK - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def parse(data: bytes) -> Label | None:
    """A label from one block; None if it is none of ours. LabelDamaged."""
    if len(data) < BLOCK or not data.startswith(MAGIC):
        return None
    body, (checksum,) = data[:-_CHECKSUM.size], _CHECKSUM.unpack(data[-_CHECKSUM.size:])
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise LabelDamaged("the pool's label has another checksum than when it was written")
    (_, version, block, features, sequence, pool, store, boot, state, reserved, size, metadata,
     pieces) = _HEADER.unpack_from(body)
    if version != VERSION or features:
        raise LabelDamaged(f"the pool's label is of version {version}, features {features:#x}; "
                           "upgrade Epochs")
    if (state not in (CLOSED, OPEN) or reserved or not metadata > 0 or not pieces > 0
            or metadata + pieces > MAX_SEGMENTS or not 0 < size <= MAX_SECTORS
            or not 128 <= block <= 2097152 or block % 128):
        raise LabelDamaged("the pool's label has impossible contents")
    segments = [Segment(*_SEGMENT.unpack_from(body, _HEADER.size + at * _SEGMENT.size))
                for at in range(metadata + pieces)]
    _check(segments, size)
    return Label(uuid.UUID(bytes=pool), uuid.UUID(bytes=store), size, block,
                 tuple(segments[:metadata]), tuple(segments[metadata:]), sequence, state,
                 uuid.UUID(bytes=boot))


def _check(segments: Sequence[Segment], size: int) -> None:
    end = RESERVED // SECTOR
    for one in sorted(segments, key=lambda segment: segment.start):
        if one.start < end or not one.length or one.start + one.length > size:
            raise LabelDamaged("the pool's label has segments that overlap or lie outside")
        end = one.start + one.length


def read(device: Path) -> Label | None:
    """The label of a device or file; None if it has none. LabelDamaged if it has one but no whole
    one. Raises OSError."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        blocks = [os.pread(fd, BLOCK, at * BLOCK) for at in range(2)]
    finally:
        os.close(fd)
    found: list[Label] = []
    damage: LabelDamaged | None = None
    for data in blocks:
        try:
            label = parse(data)
        except LabelDamaged as error:
            damage = error
        else:
            if label is not None:
                found.append(label)
    if found:
        return max(found, key=lambda label: label.sequence)
    if damage is not None:
        raise LabelDamaged(f"{device}: {damage}")
    return None


def write(device: Path, label: Label, *, first: bool = False) -> Label:
    """Write the next label durably, over the older of the two; ``first``: both. Returns it."""
    label = replace(label, sequence=label.sequence + 1)
    fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for at in (0, 1) if first else (label.sequence % 2,):
            os.pwrite(fd, label.to_bytes(), at * BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)
    return label


def erase(device: Path) -> None:
    """Remove both labels, and what makes the pool's metadata recognisable (if a whole label says
    where that is), durably."""
    try:
        label = read(device)
    except LabelDamaged:
        label = None
    fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if label is not None:
            for segment in label.metadata:
                os.pwrite(fd, bytes(BLOCK), segment.start * SECTOR)
        os.pwrite(fd, bytes(2 * BLOCK), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
