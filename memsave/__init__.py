"""Guest memory: capture from a running hypervisor, canonical image, packs, restore.

::

    with GuestMemory(pid, layout, addresses) as guest, guest.capture(trusted=False) as capture:
        capture.precopy()    # the guest runs
        capture.reserve()
        capture.seal()       # the guest stands still
        result = capture.write(Image.zero(layout), None, packs, "first")

docs/memory-image.md specifies the files; :mod:`memsave.verifier` reads them independently.
"""

from memsave.capture import Capture
from memsave.errors import MemoryDamaged, MemsaveError
from memsave.guest import GuestMemory
from memsave.image import Image, diff
from memsave.layout import PAGE, Block, Layout
from memsave.packs import PackStore
from memsave.tracking import preload_library
from memsave.writing import WriteResult

__all__ = [
    "PAGE",
    "Block",
    "Capture",
    "GuestMemory",
    "Image",
    "Layout",
    "MemoryDamaged",
    "MemsaveError",
    "PackStore",
    "WriteResult",
    "diff",
    "preload_library",
]
