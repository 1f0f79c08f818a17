"""Where copied pages wait to be written: anonymous memory, or an unlinked file for many."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from memsave.errors import MemsaveError
from memsave.native import ffi, lib


class Buffer:
    """``size`` bytes of private memory, or of a spool file. Freed by close(), once."""

    def __init__(self, size: int, spool: Path | None = None) -> None:
        """``spool``: a directory for an unlinked file. MemsaveError if there is no room."""
        self.size = size
        if spool is None:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = _spooled(size, spool)
        self.data = ffi.from_buffer("uint8_t[]", self._map)

    def prefault(self) -> None:
        """Take all of the memory now, so that writing to it causes no page fault."""
        err = lib.ms_prefault(self.data, self.size)
        if err:
            raise MemsaveError(f"{self.size} bytes for the pages of a pause: {os.strerror(err)}")

    def data_bytes(self) -> mmap.mmap:
        """The same memory for Python; no view of it may be left at close()."""
        return self._map

    def close(self) -> None:
        ffi.release(self.data)
        self._map.close()


def _spooled(size: int, directory: Path) -> mmap.mmap:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Allocated, not only lengthened: a full disk is an error here and no SIGBUS later.
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    except OSError as error:
        raise MemsaveError(f"{size} bytes for copied pages in {directory}: "
                           f"{error.strerror}") from error
    finally:
        os.close(fd)
