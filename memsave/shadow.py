"""Memory set aside for captured pages: page n at n * 4096, taken only where it is written."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from memsave import native
from memsave.layout import PAGE

_MAP_NORESERVE = 0x4000  # not in Python 3.11; from Linux' asm-generic/mman.h
SPOOL_ABOVE = 256 * 2**20  # bytes; a larger capture goes to a file, so that memory stays bounded


class Shadow:
    """A sparse buffer of ``pages``. Backed by an unlinked file in ``spool`` if that is given, so
    that the kernel can write it back under memory pressure; else by anonymous memory."""

    def __init__(self, pages: int, spool: Path | None) -> None:
        size = pages * PAGE
        if spool is None:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
        else:
            fd = os.open(spool, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        self._base: Any = native.ffi.from_buffer(self._map)
        self._view = memoryview(self._map)

    def address(self, page: int) -> Any:
        """C pointer to a page."""
        return native.ffi.cast("uint8_t *", self._base) + page * PAGE

    def page_bytes(self, page: int, count: int) -> memoryview:
        """``count`` pages from ``page`` on, not copied."""
        return self._view[page * PAGE:(page + count) * PAGE]

    def close(self) -> None:
        if not self._map.closed:
            native.ffi.release(self._base)
            try:
                self._view.release()
                self._map.close()
            except BufferError:
                # An exception on its way out still shows a slice in one of its frames; the memory
                # goes with it, as nothing else refers to the mapping.
                del self._view
