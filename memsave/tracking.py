"""Which pages a process wrote: the seam between the kernel's interfaces and a capture.

Three ways, all correct, of different precision:

userfaultfd  pages written since the last capture, exactly (Linux 6.7; needs the preloaded library)
anonymous    all pages written since the process mapped its memory, by PAGEMAP_SCAN (Linux 6.7)
pagemap      the same from /proc/PID/pagemap, on every kernel
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from memsave import native
from memsave.errors import MemsaveError

TRACKER_FD = 1000  # as in csrc/tracker_preload.c
TRACKER_LINK = "anon_inode:[userfaultfd]"
RUNS = 65536  # runs fetched by one call; more are fetched by the next

METHODS = ("userfaultfd", "anonymous", "pagemap")
Runs = list[tuple[int, int]]


def preload_library() -> Path:
    """The library that a hypervisor needs in LD_PRELOAD for exact tracking."""
    found = sorted(Path(__file__).resolve().parent.glob("_tracker_preload*.so"))
    if not found:
        raise MemsaveError("memsave is not built: _tracker_preload is missing")
    return found[0]


class Tracker:
    """Finds private and written pages of one process. ``method`` is one of METHODS."""

    def __init__(self, pid: int, ranges: list[tuple[int, int]], method: str = "auto") -> None:
        """``ranges`` are (address, bytes) of the memory to watch; ``method`` "auto" takes the best
        that works, a name of METHODS that one or none (MemsaveError)."""
        if method not in ("auto", *METHODS):
            raise ValueError(f"unknown tracking method {method!r}")
        self._uffd: int | None = None
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MemsaveError(f"the memory of process {pid} cannot be read: {error.strerror}; it "
                               "needs the same user, and kernel.yama.ptrace_scope at most 1"
                               ) from error
        try:
            self._scan_works = self._probe(ranges)
            if method in ("auto", "userfaultfd") and self._scan_works:
                self._uffd = self._find(pid, ranges)
            self.method = ("userfaultfd" if self._uffd is not None else
                           "anonymous" if self._scan_works and method != "pagemap" else "pagemap")
            if method not in ("auto", self.method):
                raise MemsaveError(f"tracking by {method} does not work for process {pid}")
        except BaseException:
            self.close()
            raise

    def _probe(self, ranges: list[tuple[int, int]]) -> bool:
        runs, after = native.ffi.new("ms_run[1]"), native.ffi.new("uint64_t *")
        result = native.lib.ms_scan(self._pagemap, ranges[0][0], 1, 0, 0, runs, 1, after)
        if result in (-errno.ENOTTY, -errno.EINVAL):
            return False
        native.checked(result, "PAGEMAP_SCAN")
        return True

    @staticmethod
    def _find(pid: int, ranges: list[tuple[int, int]]) -> int | None:
        """The preloaded library's userfaultfd with our ranges registered; None if there is none."""
        try:
            if str(Path(f"/proc/{pid}/fd/{TRACKER_FD}").readlink()) != TRACKER_LINK:
                return None
        except OSError:
            return None
        stolen = native.lib.ms_steal(pid, TRACKER_FD)
        if stolen < 0:
            return None
        for address, size in ranges:
            if native.lib.ms_register(stolen, address, size) != 0:
                os.close(stolen)
                return None
        os.set_inheritable(stolen, False)
        return int(stolen)

    def private(self, address: int, pages: int, *, written: bool, protect: bool) -> Runs:
        """Runs (first page, count) of private pages from ``address`` on.

        ``written`` keeps only those written since they were last protected, ``protect`` protects
        what is found, in one step; both are ignored where only a superset can be had.
        """
        exact = self._uffd is not None
        runs: Any = native.ffi.new("ms_run[]", RUNS)
        after = native.ffi.new("uint64_t *")
        found: Runs = []
        while after[0] < pages:
            if self.method == "pagemap":
                got = native.lib.ms_scan_entries(self._pagemap, address, pages, runs, RUNS, after)
            else:
                got = native.lib.ms_scan(self._pagemap, address, pages, int(written and exact),
                                         int(protect and exact), runs, RUNS, after)
            native.checked(got, "scanning a process' pages")
            found += [(runs[i].first, runs[i].count) for i in range(got)]
        return found

    def close(self) -> None:
        for fd in (self._pagemap, self._uffd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._pagemap, self._uffd = -1, None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
