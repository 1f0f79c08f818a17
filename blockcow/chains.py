"""Plans that keep chains of layers short. Pure: plain data in, plans out.

Without upkeep a machine's chain grows by a link with every epoch, and so does the cost of a read
and of a start. The plan is that of a log-structured merge tree. Every layer has a level, 0 when
it is frozen. When the newest frozen layer and the ones beneath it, ``FANOUT`` together, have the
same level, the newest is replaced by the union of them all, one level up. The others stay as
they are, for the epochs that need them; the chain of the newest passes over them.

So a chain has at most ``FANOUT - 1`` links of a level, and ``1 + log_FANOUT(N)`` levels after N
epochs: :func:`longest` gives the bound. A block is copied at most once per level.

FANOUT is 4: 2 would copy every block twice as often for chains two thirds as long, 8 would make
chains of up to 7 links per level; between them the product of links and copies is nearly flat,
and 4 keeps 200 epochs at 12 links.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

FANOUT = 4


@dataclass(frozen=True)
class Link:
    """What a plan has to know of a layer. ``wanted``: an epoch refers to it. A layer without
    ``backing`` is a base: it is never merged into anything."""

    id: str
    backing: str | None
    level: int = 0
    is_active: bool = False
    wanted: bool = True


@dataclass(frozen=True)
class Consolidation:
    """Replace ``layer`` by the union of ``merged`` (itself first, ``count`` of them), directly
    over ``backing``; its level is then ``level``."""

    layer: str
    merged: tuple[str, ...]
    backing: str
    level: int

    @property
    def count(self) -> int:
        return len(self.merged)


@dataclass(frozen=True)
class Drop:
    """Nothing rests on ``layer`` and no epoch wants it: remove it."""

    layer: str


def merged_level(levels: Sequence[int]) -> int:
    """The level of the union of layers with these levels: one up for a full run, else the
    highest of them, so that levels never fall from a layer to the one beneath it."""
    return max(levels) + (1 if len(levels) >= FANOUT else 0)


def plan(chain: Sequence[Link]) -> Consolidation | None:
    """What to merge in a chain (top first, the active layer and the base included or not)."""
    frozen = [link for link in chain if not link.is_active]
    run = frozen[:FANOUT]
    if len(run) < FANOUT or any(link.level != run[0].level for link in run):
        return None
    backing = run[-1].backing
    if backing is None:  # the run would take in the base
        return None
    merged = tuple(link.id for link in run)
    return Consolidation(run[0].id, merged, backing, merged_level([link.level for link in run]))


def unwanted(links: Collection[Link]) -> Drop | Consolidation | None:
    """The next thing to do about layers that no epoch wants, or None. Do it, change the data
    (:func:`applied`), ask again.

    No child: drop. One frozen child: merge the layer into it, after which it has no child.
    Several children, or an active one, which must not be touched: keep it for now. A base with
    children is always kept: merging it would copy the whole disk.
    """
    by_id = {link.id: link for link in links}
    children: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        if link.backing is not None:
            children[link.backing].append(link)
    merge = None
    for link in links:
        if link.wanted or link.is_active:
            continue
        above = children[link.id]
        if not above:
            return Drop(link.id)
        if merge is None and len(above) == 1 and not above[0].is_active and link.backing:
            merge = (above[0], link)
    if merge is None:
        return None
    child, gone = merge
    assert gone.backing in by_id, f"{gone.backing} is missing"
    level = merged_level([child.level, gone.level])
    return Consolidation(child.id, (child.id, gone.id), gone.backing or "", level)


def applied(links: Mapping[str, Link], step: Drop | Consolidation) -> dict[str, Link]:
    """The layers after ``step``."""
    after = dict(links)
    if isinstance(step, Drop):
        del after[step.layer]
        return after
    old = after[step.layer]
    after[step.layer] = Link(old.id, step.backing, step.level, old.is_active, old.wanted)
    return after


def longest(epochs: int) -> int:
    """Most frozen layers above the base in a chain after ``epochs`` epochs in a row, once
    :func:`plan` has nothing to do: ``FANOUT - 1`` for every level that so many can reach."""
    levels, reach = 1, FANOUT
    while reach <= epochs:
        levels, reach = levels + 1, reach * FANOUT
    return levels * (FANOUT - 1)
