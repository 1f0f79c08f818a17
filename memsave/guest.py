"""The memory of a running hypervisor process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from memsave import restore
from memsave.capture import Capture
from memsave.image import Image
from memsave.layout import Layout
from memsave.packs import PackStore
from memsave.tracking import Tracker


class GuestMemory:
    """Guest RAM inside process ``pid``: ``addresses`` maps block names to host virtual addresses.

    ``method``: "auto", "userfaultfd", "anonymous", or "pagemap" (as "anonymous", on kernels
    without PAGEMAP_SCAN). Needs permission to ptrace the process. Raises MemsaveError, also for
    blocks that are not private memory. A context manager; captures must be closed before.
    """

    def __init__(self, pid: int, layout: Layout, addresses: Mapping[str, int], *,
                 method: str = "auto") -> None:
        self.layout = layout
        self._tracker = Tracker(pid, layout, addresses, method)

    @property
    def method(self) -> str:
        """"userfaultfd" (exactly what was written) or "anonymous" (a superset)."""
        return "userfaultfd" if self._tracker.exact else "anonymous"

    def capture(self, trusted: bool, spool: Path | None = None) -> Capture:
        """Begin a capture.

        ``trusted`` False: what was written since the last capture is not known (first use, or an
        earlier capture failed), so every anonymous page is looked at. ``spool``: a directory for
        an unlinked file that takes large pre-copies instead of memory.
        """
        return Capture(self._tracker, self.layout, trusted, spool)

    def patch(self, image: Image, packs: PackStore, over: Image) -> int:
        """Make the paused, just started process hold ``image``; returns the pages written.

        ``over`` says what block 0 holds: ``image.flat_view()`` after mapping the flat pack. In
        other blocks the process' own pages are compared. Every stored page is checked before it
        is written: MemoryDamaged; MemsaveError for another layout or a process that ended.
        """
        return restore.patch(self._tracker, self.layout, image, packs, over)

    def close(self) -> None:
        """Let go of the process; write-protection in it stays."""
        self._tracker.close()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
