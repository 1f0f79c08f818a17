"""Which packs a create folds into its new one, so that an image never needs many. Pure.

Without folding, an image would name a pack for every epoch since the last flat one, and what it
costs to open, patch and record them would grow with the depth of the graph. The plan is that of a
size-tiered merge tree: packs whose pages in use are of the same power of ``FANOUT`` are a tier, and
a tier of ``FANOUT`` packs is copied into the new pack. So an image names at most ``FANOUT - 1``
packs of a tier besides its flat pack, :func:`most` in all, and a page is copied at most once a
tier. Old packs stay for the epochs that need them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

FANOUT = 8


def plan(live: Mapping[int, int], new: int) -> frozenset[int]:
    """The pack numbers to fold into the new pack. ``live`` maps those that may be folded to the
    pages that the image uses of them (not 0); ``new`` is how many pages are stored anyway."""
    left = dict(live)
    folded: set[int] = set()
    while True:
        tiers: dict[int, list[int | None]] = defaultdict(list)
        for pack, pages in left.items():
            tiers[_tier(pages)].append(pack)
        if new:
            tiers[_tier(new)].append(None)  # the new pack itself
        full = [tier for tier, packs in sorted(tiers.items()) if len(packs) >= FANOUT]
        if not full:
            return frozenset(folded)
        for member in tiers[full[0]]:
            if member is not None:
                folded.add(member)
                new += left.pop(member)


def most(pages: int) -> int:
    """How many packs besides its flat one an image of so many pages may need."""
    return (FANOUT - 1) * (_tier(pages) + 1) if pages else 0


def _tier(pages: int) -> int:
    """The largest t with FANOUT ** t <= pages."""
    tier = 0
    while pages >= FANOUT:
        pages //= FANOUT
        tier += 1
    return tier
