"""Small files with a header and a trailing checksum, read with every length bounded."""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path

from memsave import native
from memsave.errors import MemoryDamaged, MemsaveError

VERSION = 1
TRAILER = struct.Struct("<Q")  # XXH3-64 of everything before it


def write_durably(path: Path, parts: list[bytes]) -> None:
    """Temporary, fsync, rename; the caller syncs the directory. Mode 0600."""
    temporary = path.with_name(path.name + ".tmp")
    data = b"".join(parts)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data + TRAILER.pack(native.hash_bytes(data)))
        while view:
            view = view[os.write(fd, view):]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tail(array_: array[int]) -> bytes:
    """The little-endian bytes of an array of u64."""
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        array_ = array("Q", array_)
        array_.byteswap()
    return array_.tobytes()


class Reader:
    """Reads a checked file front to back; anything that does not fit raises MemoryDamaged."""

    def __init__(self, path: Path, what: str, magic: bytes) -> None:
        self.path, self.what = path, what
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MemoryDamaged(f"the {what} {path.name} is missing", path) from None
        if len(data) < len(magic) + TRAILER.size or not data.startswith(magic):
            raise MemoryDamaged(f"{path.name} is no {what}", path)
        (wanted,) = TRAILER.unpack(data[-TRAILER.size:])
        if native.hash_bytes(data[:-TRAILER.size]) != wanted:
            raise MemoryDamaged(f"the {what} {path.name} has another checksum than when it was "
                                "written", path)
        self._data = memoryview(data)[:-TRAILER.size]
        self._at = len(magic)

    def damaged(self, why: str) -> MemoryDamaged:
        return MemoryDamaged(f"the {self.what} {self.path.name} {why}", self.path)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes; refuses to go beyond the file before it takes memory."""
        if size < 0 or size > len(self._data) - self._at:
            raise self.damaged("is shorter than it says")
        self._at += size
        return bytes(self._data[self._at - size:self._at])

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def numbers(self, count: int) -> array[int]:
        """``count`` little-endian u64."""
        found = array("Q")
        found.frombytes(self.take(count * 8))
        if struct.pack("=H", 1) != struct.pack("<H", 1):
            found.byteswap()
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise self.damaged("is longer than it says")

    def check_version(self, version: int, features: int, known: int) -> None:
        """Refuse a version or an incompatible feature bit that this code does not know."""
        if version != VERSION:
            raise MemsaveError(f"the {self.what} {self.path.name} has version {version}, this "
                               f"Epochs knows version {VERSION}; upgrade Epochs")
        if features & ~known:
            raise MemsaveError(f"the {self.what} {self.path.name} needs feature bits "
                               f"{features & ~known:#x}, which this Epochs does not know; "
                               "upgrade Epochs")
