"""What memsave raises.

::

    MemsaveError        a capture, a restore or a file was refused or failed
     ├─ MemoryDamaged   stored bytes are not those that were written; ``path`` names the file
     └─ XenStreamError, XenMissing   of domains of Xen
"""

from __future__ import annotations

from pathlib import Path


class MemsaveError(Exception):
    """The message is one sentence that names the thing and the reason."""


class MemoryDamaged(MemsaveError):
    """A pack, an index or a page map does not hold what was written into it.

    ``path`` is the file that has to be mended or given up.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class XenStreamError(MemsaveError):
    """A stream of a Xen domain is malformed, or of a domain that cannot be taken."""


class XenMissing(MemsaveError):
    """No Xen on this host, or no way to it."""
