"""A domain between a libxc stream and the canonical image of its memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave.errors import MemoryDamaged, MemsaveError, XenStreamError
from memsave.image import Image
from memsave.layout import PAGE, Block, Layout
from memsave.native import check, ffi, lib, new_error
from memsave.packs import PackStore
from memsave.writing import Progress, WriteResult, write_image

MAX_PAGES = 1 << 28  # 1 TiB
BLOCK = "xen"  # name of the one block of a domain's layout

_PAGE_TYPES = frozenset(
    [lib.MS_XEN_NORMAL, lib.MS_XEN_ALLOCATED]
    + [lib.MS_XEN_NORMAL + level + pin for level in (1, 2, 3, 4) for pin in (0, lib.MS_XEN_PIN)])


class XenDomain:
    """The memory and records of one domain. Context manager.

    ``spool``: a directory for an unlinked file that holds the content of pages meanwhile.
    ``max_pages`` bounds what a stream may say. MemsaveError if there is no room.
    """

    def __init__(self, spool: Path, *, max_pages: int = MAX_PAGES) -> None:
        try:
            self._fd = os.open(spool, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MemsaveError(f"a domain's memory cannot be kept in {spool}: "
                               f"{error.strerror}") from error
        self.c = lib.ms_xen_new(self._fd, max_pages)
        if self.c == ffi.NULL:
            os.close(self._fd)
            raise MemoryError(f"no memory for a domain of up to {max_pages} pages")

    # -- what it is -----------------------------------------------------------------------------
    @property
    def paravirtual(self) -> bool:
        """PV; else it is HVM or PVH."""
        return bool(self.c.guest == lib.MS_XEN_PV)

    @property
    def version(self) -> tuple[int, int]:
        """Of the Xen that wrote it."""
        return int(self.c.xen_major), int(self.c.xen_minor)

    @property
    def pages(self) -> int:
        """Guest frame numbers are below this."""
        return int(self.c.pages)

    @property
    def sent(self) -> int:
        """Pages that the stream brought, one that came again counted again."""
        return int(self.c.sent)

    @property
    def named(self) -> int:
        """The same, with those that the domain does not have and the stream names nevertheless."""
        return int(self.c.named)

    @property
    def layout(self) -> Layout:
        return Layout((Block(BLOCK, self.pages * PAGE),))

    def records(self) -> Iterator[tuple[int, bytes]]:
        """(type, body) of every record that is not memory, in their order."""
        for number in range(self.c.n):
            one = self.c.records[number]
            yield int(one.type), bytes(ffi.buffer(one.data, one.length))

    def page_types(self) -> Iterator[tuple[int, int, int]]:
        """(first page, count, type) of pages that the domain has, as ms_xen_page in api.h."""
        types = bytes(ffi.buffer(self.c.types, self.pages))
        at = 0
        while at < len(types):
            end = at + 1
            while end < len(types) and types[end] == types[at]:
                end += 1
            if types[at] != lib.MS_XEN_ABSENT:
                yield at, end - at, types[at]
            at = end

    def frame(self, role: int) -> tuple[int, bytes] | None:
        """Page and content of the ring shared with xenstored (MS_XEN_STORE) or xenconsoled
        (MS_XEN_CONSOLE), if the domain has one; known once it is canonical."""
        if self.c.frames[role] == ffi.NULL:
            return None
        return int(self.c.frame_pages[role]), bytes(ffi.buffer(self.c.frames[role], PAGE))

    # -- from a stream to an image --------------------------------------------------------------
    def read(self, fd: int) -> None:
        """Read one libxc stream, up to its end and no further, and make it canonical.
        XenStreamError if it is malformed; MemsaveError if its memory cannot be kept."""
        error = new_error()
        self._check(lib.ms_xen_read(self.c, fd, error), error, "reading a domain's stream")
        self._check(lib.ms_xen_canonical(self.c, error), error, "making a domain canonical")

    def write_image(self, parent: Image | None, packs: PackStore, pack_id: str,
                    progress: Progress | None = None) -> WriteResult:
        """Its memory as an image; pages equal to ``parent``'s are not stored again."""
        if parent is not None and parent.layout != self.layout:
            parent = None
        copies = ffi.gc(lib.ms_copies_new(), lib.ms_copies_free)
        if copies == ffi.NULL:
            raise MemoryError("no memory for a list of pages")
        size = os.fstat(self._fd).st_size
        error = new_error()
        if size == 0:  # all zero
            return write_image(self.layout, copies, Image.zero(self.layout), parent, packs,
                               pack_id, None, progress)
        with mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            data = ffi.from_buffer("uint8_t[]", mapped)
            try:
                self._check(lib.ms_xen_copies(self.c, data, copies, error), error, "listing pages")
                return write_image(self.layout, copies, Image.zero(self.layout), parent, packs,
                                   pack_id, None, progress)
            finally:
                ffi.release(data)

    # -- from an image to a stream --------------------------------------------------------------
    def set(self, *, paravirtual: bool, version: tuple[int, int], pages: int) -> None:
        """Begin a domain. MemsaveError if it is too large."""
        if not 0 < pages <= self.c.max_pages:
            raise MemsaveError(f"a domain of {pages} pages is not possible")
        self.c.guest = lib.MS_XEN_PV if paravirtual else lib.MS_XEN_HVM
        self.c.xen_major, self.c.xen_minor = version
        self.c.pages = pages

    def add_record(self, kind: int, body: bytes) -> None:
        error = new_error()
        self._check(lib.ms_xen_add_record(self.c, kind, ffi.from_buffer("uint8_t[]", body),
                                          len(body), error), error, "a record")

    def set_types(self, first: int, count: int, kind: int) -> None:
        """The domain has these pages. MemsaveError if that cannot be."""
        if first + count > self.pages or kind not in _PAGE_TYPES:
            raise MemsaveError(f"a domain of {self.pages} pages has no pages {first} to "
                               f"{first + count - 1} of type {kind}")
        ffi.buffer(self.c.types, self.pages)[first:first + count] = bytes([kind]) * count

    def set_frame(self, role: int, page: int, content: bytes) -> None:
        """A ring. MemsaveError if it cannot be there."""
        if page >= self.pages or len(content) != PAGE:
            raise MemsaveError(f"page {page} cannot be one that a domain shares")
        error = new_error()
        self._check(lib.ms_xen_set_frame(self.c, role, page,
                                         ffi.from_buffer("uint8_t[]", content), error), error,
                    "a shared page")

    def load_image(self, image: Image, packs: PackStore) -> None:
        """Take the memory from an image, every page checked on the way. MemoryDamaged."""
        if image.layout != self.layout:
            raise MemoryDamaged(f"the memory image has {image.layout.pages} pages, the domain's "
                                f"state {self.pages}", packs.directory)
        error = new_error()
        table = image.table(packs)
        for number in range(len(image.runs)):
            run = image.runs.c.v + number
            sums = ffi.new("uint64_t[]", run.count)
            table.check(lib.ms_restore_run(table.c, run, self._fd, sums, error), error,
                        "copying pages")
        self._check(lib.ms_xen_hold(self.c, image.runs.c, error), error, "taking pages")

    def write(self, fd: int) -> None:
        """Write it as a libxc stream. MemsaveError if that fails."""
        error = new_error()
        self._check(lib.ms_xen_write(self.c, fd, error), error, "writing a domain's stream")

    def _check(self, code: int, error: Any, doing: str) -> None:
        if code == lib.MS_XEN_STREAM:
            raise XenStreamError(ffi.string(self.c.why).decode(errors="replace"))
        check(code, error, doing)

    def close(self) -> None:
        if self.c != ffi.NULL:
            lib.ms_xen_free(self.c)
            self.c = ffi.NULL
            os.close(self._fd)

    def __enter__(self) -> XenDomain:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
