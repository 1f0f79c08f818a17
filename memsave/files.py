"""Small files of ours: magic, version, features, lengths, and a checksum at the end.

Every version of these files ends with XXH3-64 of everything before it, so that damage is told
from a version that is not known (docs/memory-image.md).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from memsave import native
from memsave.errors import MemoryDamaged, MemsaveError
from memsave.layout import PAGE

VERSION = 1
PREFIX = struct.Struct("<8sIIQQQ")  # magic, version, page size, incompatible, compatible, length
TRAILER = struct.Struct("<Q")
MAX_FILE = 1 << 32  # bytes
TEMPORARY = ".tmp"
assert PREFIX.size == 40


def temporary(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + TEMPORARY)


def create(path: Path) -> int:
    """Open a new or truncated file for its owner alone, for writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def sync_directory(directory: Path) -> None:
    """Make renames and unlinks in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def padded(data: bytes) -> bytes:
    """Zeros up to the next multiple of 8."""
    return data + bytes(-len(data) % 8)


def sealed(magic: bytes, body: Iterable[bytes]) -> bytes:
    """A whole file: prefix, body, checksum."""
    content = b"".join(body)
    length = PREFIX.size + len(content) + TRAILER.size
    data = PREFIX.pack(magic, VERSION, PAGE, 0, 0, length) + content
    return data + TRAILER.pack(native.hash_bytes(data))


def write_temporary(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` beside ``path``, and fsync it unless ``durable`` is False; nothing is left
    behind on failure (OSError)."""
    beside = temporary(path)
    fd = create(beside)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
        if durable:
            os.fsync(fd)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


class Reader:
    """Reads a sealed file front to back; what does not fit is MemoryDamaged.

    MemsaveError for a version, page size or incompatible feature that this code does not know.
    """

    def __init__(self, path: Path, what: str, magic: bytes) -> None:
        self.path, self._what = path, what
        self.data = self._read()
        least = PREFIX.size + TRAILER.size
        if len(self.data) < least:
            raise self.damaged(f"has {len(self.data)} bytes, at least {least} are needed")
        found, version, page, incompatible, _, length = PREFIX.unpack_from(self.data)
        if found != magic:
            raise self.damaged("begins with other bytes than it should")
        self._end = len(self.data) - TRAILER.size
        (wanted,) = TRAILER.unpack_from(self.data, self._end)
        if native.hash_bytes(memoryview(self.data)[:self._end]) != wanted:
            raise self.damaged("has another checksum than when it was written")
        if version != VERSION:
            raise MemsaveError(f"{self._name()} has version {version}, but only version {VERSION} "
                               "is known here; use a newer memsave")
        if incompatible:
            raise MemsaveError(f"{self._name()} needs feature bits {incompatible:#x}, which are "
                               "not known here; use a newer memsave")
        if page != PAGE:
            raise MemsaveError(f"{self._name()} has pages of {page} bytes; only {PAGE} are "
                               "supported")
        if length != len(self.data):
            raise self.damaged(f"says that it has {length} bytes, but has {len(self.data)}")
        self.at = PREFIX.size

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE:
                    raise self.damaged(f"has {size} bytes, more than {MAX_FILE}")
                return file.read(size)
        except FileNotFoundError:
            raise self.damaged("is missing") from None
        except OSError as error:
            raise self.damaged(f"cannot be read: {error.strerror}") from error

    def _name(self) -> str:
        return f"the {self._what} {self.path.name}"

    def damaged(self, why: str) -> MemoryDamaged:
        """The exception for this file; ``why`` continues the sentence."""
        return MemoryDamaged(f"{self._name()} {why}", self.path)

    def bound(self, count: int, size: int, what: str) -> int:
        """Check that ``count`` items of ``size`` bytes can follow; returns their offset."""
        if count * size > self._end - self.at:
            raise self.damaged(f"says that it has {count} {what}, which do not fit into it")
        at = self.at
        self.at += count * size
        return at

    def unpack(self, form: struct.Struct, what: str) -> tuple[int, ...]:
        """The next structure."""
        if form.size > self._end - self.at:
            raise self.damaged(f"ends within {what}")
        return form.unpack_from(self.data, self.bound(1, form.size, what))

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes and their padding, which must be zeros."""
        if size + -size % 8 > self._end - self.at:
            raise self.damaged(f"ends within {what}")
        at = self.bound(size + -size % 8, 1, what)
        if any(self.data[at + size:self.at]):
            raise self.damaged(f"has padding behind {what} that is not zero")
        return self.data[at:at + size]

    def end(self) -> None:
        """Check that everything was read."""
        if self.at != self._end:
            raise self.damaged(f"has {self._end - self.at} bytes too many")
