"""Writing exception stores: the union of several, one over the other, as a new store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .exceptions import ENTRY, MAGIC, SECTOR, VERSION, Reader, StoreDamaged, layout
from .interface import BlockError

_HEADER_FIELDS = (MAGIC, 1, VERSION)


def write_union(stores: Sequence[Path], target: Path) -> None:
    """A new file with what ``stores`` (top first) hold together, durable, mode 0600. What is in an
    upper one hides what is beneath it. StoreDamaged if they have chunks of different sizes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    write = os.open(target, flags, 0o600)
    readers: list[Reader] = []
    try:
        for path in stores:
            readers.append(Reader(path))
        places: dict[int, tuple[Reader, int]] = {}
        sizes = {header.chunk for reader in readers if not (header := reader.header()).fresh}
        if len(sizes) > 1:
            raise StoreDamaged(f"{target} cannot be made of stores with different chunks")
        chunk = sizes.pop() if sizes else 4096
        for reader in reversed(readers):
            for old, new in reader.exceptions().items():
                places[old] = (reader, new)
        _write(write, places, chunk)
        os.fsync(write)
    except BaseException as error:
        target.unlink()
        if isinstance(error, OSError):
            raise BlockError(f"{target} cannot be written: {error.strerror}") from error
        raise
    finally:
        for reader in readers:
            reader.close()
        os.close(write)


def _write(fd: int, places: dict[int, tuple[Reader, int]], chunk: int) -> None:
    header = b"".join(number.to_bytes(4, "little") for number in
                      (*_HEADER_FIELDS, chunk // SECTOR))
    _put(fd, header.ljust(chunk, b"\0"), 0)
    per_table = chunk // ENTRY.size
    table = bytearray(chunk)
    found = sorted(places.items())
    for index, ((old, (reader, new)), place) in enumerate(
            zip(found, layout(len(found), chunk), strict=True)):
        _put(fd, reader.read(new * chunk, chunk), place * chunk)
        ENTRY.pack_into(table, index % per_table * ENTRY.size, old, place)
        if (index + 1) % per_table == 0:
            _put(fd, table, _table_at(index // per_table, chunk))
            table = bytearray(chunk)
    # The last one, which may be empty, ends the list.
    _put(fd, table, _table_at(len(found) // per_table, chunk))


def _table_at(number: int, chunk: int) -> int:
    return (1 + number * (chunk // ENTRY.size + 1)) * chunk


def _put(fd: int, data: bytes | bytearray, offset: int) -> None:
    done = 0
    view = memoryview(data)
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
