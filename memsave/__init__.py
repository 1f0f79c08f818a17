"""Guest memory: capture from a running hypervisor, canonical image, packs, restore.

    >>> with GuestMemory(pid, layout, addresses) as guest, guest.capture(trusted=False) as capture:
    ...     capture.precopy()              # guest runs
    ...     capture.seal()                 # guest stands still
    ...     done = capture.write(Image.zero(layout), None, PackStore(packs), pack_id)

Formats are specified in docs/memory-image.md; :mod:`memsave.verifier` reads them independently.
"""

from memsave.capture import Capture, GuestMemory, WriteResult
from memsave.errors import MemoryDamaged, MemsaveError
from memsave.image import Image, diff
from memsave.layout import PAGE, Block, Layout
from memsave.packs import PackStore
from memsave.tracking import preload_library

__all__ = ["PAGE", "Block", "Capture", "GuestMemory", "Image", "Layout", "MemoryDamaged",
           "MemsaveError", "PackStore", "WriteResult", "diff", "preload_library"]
