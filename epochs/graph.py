"""The graph of epochs: pure functions over child-to-parent maps, and the grammar of EPOCH.

EPOCH is an id, a unique prefix of one (4 characters or more), a tag, a machine's name (its head),
``MACHINE@TAG``, or any of these followed by ``~N`` for the Nth ancestor (``~`` alone is ``~1``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from epochs.errors import NotFound, Refused, UsageError

Parents = Mapping[str, str | None]
MIN_PREFIX = 4
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_HEX = re.compile(r"[0-9a-f]+")


def ancestors(parents: Parents, epoch: str) -> Iterator[str]:
    """``epoch`` itself, its parent, and so on to the root."""
    at: str | None = epoch
    while at is not None:
        yield at
        at = parents[at]


def children(parents: Parents) -> dict[str | None, list[str]]:
    """Parent to children, in the order of ``parents``; None holds the roots."""
    found: dict[str | None, list[str]] = {}
    for child, parent in parents.items():
        found.setdefault(parent, []).append(child)
    return found


def common_ancestor(parents: Parents, a: str, b: str) -> str | None:
    """The nearest epoch that both descend from (or are), None if there is none."""
    above = set(ancestors(parents, a))
    return next((epoch for epoch in ancestors(parents, b) if epoch in above), None)


def depth(parents: Parents, epoch: str) -> int:
    """Number of epochs from the root to this one; a root has depth 1."""
    return sum(1 for _ in ancestors(parents, epoch))


@dataclass(frozen=True)
class Names:
    """Everything a name can stand for. ``tags`` are (name, machine id, epoch id);
    ``machines`` maps a name to (id, head)."""

    parents: Parents
    tags: Sequence[tuple[str, str, str]]
    machines: Mapping[str, tuple[str, str | None]]


def resolve(text: str, names: Names) -> str:
    """The epoch id that ``text`` stands for.

    Raises NotFound if nothing has that name, Refused if several things do.
    """
    match = re.fullmatch(r"([^~]+)((?:~\d*)*)", text)
    if not match:
        raise UsageError(f"'{text}' does not name an epoch; use an id, a tag, MACHINE, "
                         "MACHINE@TAG, with ~N for an ancestor")
    epoch = _base(match[1], names)
    steps = sum(int(step or "1") for step in match[2].split("~")[1:])
    line = list(ancestors(names.parents, epoch))
    if steps >= len(line):
        raise NotFound(f"'{text}' goes back {steps} epochs, but {match[1]} has only "
                       f"{len(line) - 1} before it")
    return line[steps]


def _base(text: str, names: Names) -> str:
    if "@" in text:
        machine, _, tag = text.partition("@")
        return _tag_of_machine(machine, tag, names)
    candidates: dict[str, str] = {}
    if text in names.machines:
        head = names.machines[text][1]
        if head is None and not any(tag == text for tag, _, _ in names.tags):
            raise NotFound(f"machine '{text}' has no epoch yet; make one with "
                           f"'epochs create {text}'")
        if head is not None:
            candidates[head] = f"machine '{text}'"
    owners = {machine: name for name, (machine, _) in names.machines.items()}
    for tag, machine, epoch in names.tags:
        if tag == text:
            candidates.setdefault(epoch, f"{owners.get(machine, machine[:8])}@{tag}")
    if _HEX.fullmatch(text) and len(text) >= MIN_PREFIX:
        for epoch in names.parents:
            if epoch.startswith(text):
                candidates.setdefault(epoch, f"epoch {epoch[:12]}")
    if not candidates:
        short = _HEX.fullmatch(text) and len(text) < MIN_PREFIX
        raise NotFound(f"there is no epoch '{text}'"
                       + (f"; a prefix needs {MIN_PREFIX} characters or more" if short
                          else "; 'epochs log' shows those there are"))
    if len(candidates) > 1:
        raise Refused(f"'{text}' could be " + " or ".join(sorted(candidates.values()))
                      + "; write which one")
    return next(iter(candidates))


def _tag_of_machine(machine: str, tag: str, names: Names) -> str:
    if machine not in names.machines:
        raise NotFound(f"there is no machine '{machine}'; 'epochs list' shows those there are")
    machine_id, head = names.machines[machine]
    for name, owner, epoch in names.tags:
        if name == tag and owner == machine_id:
            return epoch
    line = set(ancestors(names.parents, head)) if head else set()
    inherited = {epoch for name, _, epoch in names.tags if name == tag and epoch in line}
    if len(inherited) == 1:
        return inherited.pop()
    raise NotFound(f"machine '{machine}' has no epoch tagged '{tag}'")


@dataclass(frozen=True)
class Line:
    """One line of a drawn graph: the drawing before the text, and the epoch if it shows one."""

    drawing: str
    epoch: str | None


def draw(parents: Parents, order: Sequence[str]) -> list[Line]:
    """Draw epochs as columns, newest first; ``order`` is oldest first and children follow parents.

    Every column is a line of descent waiting for its parent to appear further down.
    """
    lines: list[Line] = []
    columns: list[str] = []  # the epoch each column leads down to
    for epoch in reversed(order):
        mine = [i for i, wanted in enumerate(columns) if wanted == epoch]
        if not mine:
            columns.append(epoch)
            mine = [len(columns) - 1]
        keep = mine[0]
        for extra in reversed(mine[1:]):
            lines.append(Line(_joined(len(columns), extra), None))
            del columns[extra]
        lines.append(Line(" ".join("*" if i == keep else "|" for i in range(len(columns))), epoch))
        parent = parents[epoch]
        if parent is None or parent not in parents:
            del columns[keep]
        else:
            columns[keep] = parent
    return lines


def _joined(width: int, column: int) -> str:
    cells = ["|" for _ in range(width)]
    text = " ".join(cells[:column])
    return text + "/" + "".join(" /" for _ in range(column + 1, width))
