"""How much must be free where a machine's disks grow before an epoch of it is made. Pure.

After a freeze every block that the guest writes for the first time takes new space. So what it
has been writing between its last epochs says what it will take until the next one: the largest of
those, twice over, and something for a guest that has no history yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HISTORY = 5  # epochs that are looked back on
MARGIN = 16 * 2**20  # bytes, whatever the history says
METADATA_BLOCK = 4096
LEAF = 126  # entries of a leaf that is half full: (4096 - 32) / 16 / 2
METADATA_MARGIN = 64 * METADATA_BLOCK


@dataclass(frozen=True)
class Wanted:
    """Bytes that should be free for data, and for the list of where the data is."""

    data: int
    metadata: int


def wanted(written: Sequence[int], block: int, size: int) -> Wanted:
    """For a disk of ``size`` bytes that wrote ``written`` bytes between its last epochs, newest
    first, where space is taken in blocks of ``block`` bytes. In the worst case every block that is
    written takes a block of metadata of its own, and another one on the way to it; but never more
    than the list of all the disk's blocks takes, with half of each of its leaves in use."""
    most = max(written[:HISTORY], default=0)
    touched = 2 * -(-most // block)
    whole = 2 * (-(-size // block) // LEAF + 2)
    return Wanted(2 * most + MARGIN,
                  2 * min(touched, whole) * METADATA_BLOCK + METADATA_MARGIN)
