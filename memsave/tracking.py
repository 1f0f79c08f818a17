"""Which pages of a process were written: the seam between the kernel's interfaces and a capture.

userfaultfd  exactly the pages written since they were last protected. Needs Linux 6.7 and the
             preloaded library (csrc/tracker_preload.c) in the process.
anonymous    every page written since the mapping was made: a superset, always right. By
             PAGEMAP_SCAN (Linux 6.7), or else from the entries of /proc/PID/pagemap.

Sources: Linux Documentation/admin-guide/mm/{pagemap,userfaultfd}.rst. What neither sees: writes by
devices through pages that were pinned before they were protected (see Capture.precopy).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.errors import MemsaveError
from memsave.layout import PAGE, Layout
from memsave.native import check, ffi, lib, new_error

TRACKER_FD = 1000  # as in csrc/tracker_preload.c
TRACKER_LINK = "anon_inode:[userfaultfd]"
UFFDIO_REGISTER = 0xC020AA00  # _IOWR(0xAA, 0, struct uffdio_register), linux/userfaultfd.h
REGISTER = struct.Struct("QQQQ")  # start, length, mode, ioctls (out)
MODE_WP = 2  # UFFDIO_REGISTER_MODE_WP
METHODS = ("auto", "userfaultfd", "anonymous", "pagemap")
NO_SCAN = "MEMSAVE_NO_PAGEMAP_SCAN"  # set in the environment: as on a kernel before 6.7


@dataclass(frozen=True)
class Area:
    """A line of /proc/PID/maps; ``inode`` is 0 for anonymous memory."""

    start: int
    end: int
    shared: bool
    inode: int


def areas_of(pid: int) -> list[Area]:
    """The mappings of a process, ascending. Raises OSError."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        area, mode, _, _, inode = line.split()[:5]
        start, end = (int(part, 16) for part in area.split("-"))
        found.append(Area(start, end, mode[3] == "s", int(inode)))
    return found


def covering(areas: Sequence[Area], start: int, end: int) -> list[Area] | None:
    """The mappings that hold [start, end) without a gap, or None."""
    found = []
    for area in areas:
        if area.start <= start < area.end:
            found.append(area)
            start = area.end
            if start >= end:
                return found
    return None


def preload_library() -> Path:
    """The library that a hypervisor needs in LD_PRELOAD for exact tracking."""
    found = sorted(Path(__file__).resolve().parent.glob("_tracker_preload*.so"))
    if not found:
        raise MemsaveError("memsave is not built: its library _tracker_preload is missing; run "
                           "'python setup.py build_ext --inplace'")
    return found[0]


class Ranges:
    """Pages found in a process (``ms_ranges``), ascending; ``pages`` leaves out zero pages."""

    def __init__(self) -> None:
        self.c = lib.ms_ranges_new()
        if self.c == ffi.NULL:
            raise MemoryError("no memory for page ranges")
        self.c = ffi.gc(self.c, lib.ms_ranges_free)

    def reserve(self, count: int) -> None:
        """Have room for ``count`` ranges, already faulted in."""
        error = new_error()
        check(lib.ms_ranges_reserve(self.c, count, error), error, "page ranges")

    def push(self, first: int, count: int) -> None:
        """Append pages behind all others."""
        error = new_error()
        check(lib.ms_ranges_push(self.c, first, count, error), error, "page ranges")

    @property
    def pages(self) -> int:
        return int(self.c.pages)

    def __len__(self) -> int:
        return int(self.c.n)


class Tracker:
    """Finds and copies pages of one process. Raises MemsaveError; freed by close()."""

    def __init__(self, pid: int, layout: Layout, addresses: Mapping[str, int],
                 method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"the tracking method is one of {', '.join(METHODS)}, not {method!r}")
        self.pid = pid
        self._doing = f"memory of process {pid}"
        self._pidfd = self._pagemap = self._uffd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise MemsaveError(f"the memory of process {pid} cannot be inspected: "
                               f"{error.strerror}; it must run, as the same user, and "
                               "kernel.yama.ptrace_scope must allow it") from error
        try:
            self._blocks = self._describe(layout, addresses)
            self._refuse_shared(layout)
            self.c = ffi.new("ms_guest *", {"pid": pid, "pagemap": self._pagemap, "scan": 0,
                                            "nblocks": len(layout.blocks),
                                            "blocks": self._blocks})
            if method != "pagemap" and NO_SCAN not in os.environ:
                self.c.scan = lib.ms_can_scan(self._pagemap, self._blocks[0].address)
            if self.c.scan and method in ("auto", "userfaultfd"):
                self._uffd = self._attach()
            if method == "userfaultfd" and self._uffd < 0:
                raise MemsaveError(f"process {pid} has no usable userfaultfd: it was started "
                                   "without the preloaded library, or the kernel is older than 6.7")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _describe(layout: Layout, addresses: Mapping[str, int]) -> Any:
        blocks = ffi.new("ms_block[]", len(layout.blocks))
        first = 0
        for number, block in enumerate(layout.blocks):
            if block.name not in addresses or addresses[block.name] % PAGE:
                raise MemsaveError(f"RAM block '{block.name}' has no address on a page boundary")
            blocks[number] = {"first_page": first, "pages": block.pages,
                              "address": addresses[block.name]}
            first += block.pages
        return blocks

    def _refuse_shared(self, layout: Layout) -> None:
        """A block in a shared mapping, or one besides block 0 with a file behind it, would be
        found empty by every scan, and restoring it would write into what others use, too."""
        areas = areas_of(self.pid)
        for number, block in enumerate(layout.blocks):
            at = int(self._blocks[number].address)
            found = covering(areas, at, at + block.size)
            if found is None or any(area.shared or (number and area.inode) for area in found):
                raise MemsaveError(
                    f"RAM block '{block.name}' of process {self.pid} is not private memory of its "
                    "own: memory that is shared (memory-backend-memfd or -file, ivshmem) cannot be "
                    "captured")

    def _attach(self) -> int:
        """A copy of the process' userfaultfd with all blocks registered, or -1."""
        try:
            if str(Path(f"/proc/{self.pid}/fd/{TRACKER_FD}").readlink()) != TRACKER_LINK:
                return -1
        except OSError:
            return -1
        fd = int(lib.ms_pidfd_getfd(self._pidfd, TRACKER_FD))
        if fd < 0:
            return -1
        try:
            for number in range(self.c.nblocks):
                block = self._blocks[number]
                # Registering again what is registered changes nothing, protection included.
                fcntl.ioctl(fd, UFFDIO_REGISTER,
                            REGISTER.pack(block.address, block.pages * PAGE, MODE_WP, 0))
        except OSError:
            os.close(fd)
            return -1
        return fd

    @property
    def exact(self) -> bool:
        """Whether written pages can be told from those that were written earlier."""
        return self._uffd >= 0

    def collect(self, into: Ranges, *, everything: bool, protect: bool) -> None:
        """Append pages: those written since they were protected, or ``everything`` anonymous.

        ``protect`` protects what is found in the same step. Without exact tracking everything is
        found and nothing protected.
        """
        wanted = lib.MS_ANONYMOUS if everything or not self.exact else lib.MS_WRITTEN
        error = new_error()
        check(lib.ms_collect(self.c, wanted, int(protect and self.exact), into.c, error), error,
              self._doing)

    def shield(self) -> None:
        """Protect pages that are still the file's, so that a look for written ones passes them by.
        Any time; exact tracking only."""
        error = new_error()
        check(lib.ms_shield(self.c, error), error, self._doing)

    def populated(self, block: int) -> Ranges:
        """Pages of a block that are not untouched anonymous memory."""
        ranges, error = Ranges(), new_error()
        check(lib.ms_collect_block(self.c, block, lib.MS_POPULATED, ranges.c, error), error,
              self._doing)
        return ranges

    def read(self, ranges: Ranges, to: Any, threads: int) -> None:
        """Copy all pages of ``ranges`` (without zero ones) one behind the other."""
        error = new_error()
        check(lib.ms_read_ranges(self.c, ranges.c, to, threads, error), error, self._doing)

    def require_alive(self) -> None:
        """Raise MemsaveError if the process has ended: what was read may be another's."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise MemsaveError(f"process {self.pid} has ended: {os.strerror(errno.ESRCH)}")

    def close(self) -> None:
        for fd in (self._pidfd, self._pagemap, self._uffd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._pagemap = self._uffd = -1
