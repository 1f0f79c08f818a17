"""What memsave raises.

::

    MemsaveError        a capture or restore failed, for the reason in the message
     └─ MemoryDamaged   stored bytes are not those that were written; ``path`` names the file
"""

from __future__ import annotations

from pathlib import Path


class MemsaveError(Exception):
    """A capture, a restore or a file failed; the message is one sentence."""


class MemoryDamaged(MemsaveError):
    """A pack, an index or a page map does not hold what was written into it."""

    def __init__(self, message: str, path: Path | str) -> None:
        super().__init__(message)
        self.path = Path(path)
