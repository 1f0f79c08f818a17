"""Where a file's data lies on its device: FIEMAP, see the kernel's
Documentation/filesystems/fiemap.rst."""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B
_HEAD = struct.Struct("QQIIII")
_EXTENT = struct.Struct("QQQQQIIII")
_SYNC, _LAST = 1, 1
_NO_PLACE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
"""Flags of an extent whose physical place proves nothing: unknown, delayed, encoded, encrypted,
not aligned, inline, tail."""

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
    """All extents of a file, cut at 1 MiB so that two files' can be compared one by one however
    the file system split them; dirty data is written out first. Raises OSError."""
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
            found += _cut(logical, physical, length, not flags & _NO_PLACE)
            start, last = logical + length, bool(flags & _LAST)
        if last:
            break
    return found


_CUT = 1 << 20


def _cut(logical: int, physical: int, length: int, comparable: bool) -> list[Extent]:
    pieces = []
    end = logical + length
    while logical < end:
        step = min(end, (logical // _CUT + 1) * _CUT) - logical
        pieces.append(Extent(logical, physical, step, comparable))
        logical, physical = logical + step, physical + step
    return pieces
