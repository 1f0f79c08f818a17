"""Which epochs a rule keeps. Pure: it looks at dates and tags, and deletes nothing.

For every period (hour, day, ISO week, month, year; local time) the newest epoch of each of the last
N periods that have one is kept, as backup programs do it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime


@dataclass(frozen=True)
class Candidate:
    """One epoch: when it was made (seconds since 1970), its tags, and why it must stay in any case,
    if it must."""

    id: str
    created: float
    tags: tuple[str, ...] = ()
    needed: str | None = None


@dataclass(frozen=True)
class Policy:
    """How many to keep; ``tags``: patterns as of fnmatch."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{one.name} is less than 0")

    @property
    def empty(self) -> bool:
        """Whether it keeps nothing at all."""
        return not any(getattr(self, one.name) for one in fields(self))


@dataclass
class Decision:
    """``reasons`` why it is kept; none: it goes. ``firm``: nor does it go for want of space: it is
    needed, one of the last N, or tagged."""

    id: str
    created: float
    reasons: list[str] = field(default_factory=list)
    firm: bool = False

    @property
    def kept(self) -> bool:
        """Whether there is any reason."""
        return bool(self.reasons)


PERIODS: Mapping[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda at: (at.year, at.month, at.day, at.hour),
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: (at.year,),
}


def decide(epochs: Iterable[Candidate], policy: Policy) -> list[Decision]:
    """What becomes of each, newest first."""
    ordered = sorted(epochs, key=lambda one: (one.created, one.id), reverse=True)
    decisions = {one.id: Decision(one.id, one.created) for one in ordered}
    for one in ordered:
        reasons = decisions[one.id].reasons
        if one.needed is not None:
            reasons.append(one.needed)
        reasons += [f"tag {tag}" for tag in one.tags
                    if any(fnmatch.fnmatchcase(tag, pattern) for pattern in policy.tags)]
    for number, one in enumerate(ordered[:policy.last], start=1):
        decisions[one.id].reasons.append(f"last {number}")
    for decision in decisions.values():
        decision.firm = bool(decision.reasons)
    for name, period in PERIODS.items():
        seen: list[tuple[int, ...]] = []
        for one in ordered:
            if len(seen) >= getattr(policy, name):
                break
            key = period(datetime.fromtimestamp(one.created))
            if not seen or seen[-1] != key:
                seen.append(key)
                decisions[one.id].reasons.append(f"{name} {len(seen)}")
    return [decisions[one.id] for one in ordered]
