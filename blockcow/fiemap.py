"""Where a file's data lies on its device: FIEMAP, see the kernel's
Documentation/filesystems/fiemap.rst."""

from __future__ import annotations

import fcntl
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B
_HEAD = struct.Struct("QQIIII")
_EXTENT = struct.Struct("QQQQQIIII")
_SYNC, _LAST = 1, 1
_NO_PLACE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""Flags of an extent whose physical place proves nothing: unknown, delayed, encoded, encrypted,
not aligned, inline, tail, unwritten."""

_AT_ONCE = 512


@dataclass(frozen=True)
class Extent:
    """Bytes ``logical`` … of the file are at ``physical`` of the device. ``comparable``: two
    extents with equal numbers hold equal bytes."""

    logical: int
    physical: int
    length: int
    comparable: bool


def extents(fd: int, size: int) -> list[Extent]:
    """All extents of a file in order; dirty data is written out first. Raises OSError."""
    found: list[Extent] = []
    start = 0
    while start < size:
        request = bytearray(_HEAD.size + _AT_ONCE * _EXTENT.size)
        _HEAD.pack_into(request, 0, start, size - start, _SYNC, 0, _AT_ONCE, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        mapped = _HEAD.unpack_from(request)[3]
        if mapped == 0:
            break
        last = False
        for number in range(mapped):
            fields = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
            logical, physical, length, flags = fields[0], fields[1], fields[2], fields[5]
            found.append(Extent(logical, physical, length, not flags & _NO_PLACE))
            start, last = logical + length, bool(flags & _LAST)
        if last:
            break
    return found


def unshared(one: Sequence[Extent], other: Sequence[Extent]) -> list[tuple[int, int]]:
    """Ranges ``(offset, length)`` in which two files may differ: all but holes in both, and
    bytes that lie at the same physical place."""
    found = []
    ends = [end for e in (*one, *other) for end in (e.logical, e.logical + e.length)]
    points = sorted(set(ends))
    left, right = _Cursor(one), _Cursor(other)
    for start, end in itertools.pairwise(points):
        a, b = left.at(start), right.at(start)
        if a is None and b is None:
            continue
        if (
            a is not None
            and b is not None
            and (a.comparable and b.comparable)
            and a.physical - a.logical == b.physical - b.logical
        ):
            continue
        found.append((start, end - start))
    return found


class _Cursor:
    """The extent that covers a position, for positions that only grow."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents, self._number = extents, 0

    def at(self, position: int) -> Extent | None:
        while self._number < len(self._extents):
            extent = self._extents[self._number]
            if position < extent.logical + extent.length:
                return extent if position >= extent.logical else None
            self._number += 1
        return None
