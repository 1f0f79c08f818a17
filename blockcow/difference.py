"""Where two layers of one disk differ, to 4 KiB.

For qcow2 only what is allocated above the layer that both chains share can differ: those ranges
are read from both and compared. Equal bytes written twice are no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from .interface import BlockError, Chain, Difference
from .nbd import exported
from .qcow2_graph import chain_options, nested
from .tools import json_name, json_of, run

GRANULARITY = 4096
_PIECE = 4 << 20

Range = tuple[int, int]


def differing(directory: Path, a: Chain, b: Chain) -> Difference:
    """See :meth:`blockcow.interface.Backend.difference`, for chains of qcow2 layers."""
    if a[0].size != b[0].size:
        raise BlockError(f"layers {a[0].id} and {b[0].id} are not of one disk: their sizes differ")
    shared = {layer.id for layer in a} & {layer.id for layer in b}
    own_a = [layer for layer in a if layer.id not in shared]
    own_b = [layer for layer in b if layer.id not in shared]
    if len(shared) == 0:
        candidates = [(0, a[0].size)]
    else:
        found = _allocated(directory, a, len(own_a)) + _allocated(directory, b, len(own_b))
        candidates = union(found, a[0].size)
    if not candidates:
        return Difference(())
    graph = {entry["node-name"]: entry for entry in chain_options(directory, a)}
    top_a = next(reversed(graph))
    options_b = chain_options(directory, b)
    graph.update((entry["node-name"], entry) for entry in options_b)
    with exported(list(graph.values()), [top_a, options_b[-1]["node-name"]]) as (one, other):
        return Difference(compare(candidates, one.read, other.read))


def _allocated(directory: Path, chain: Chain, count: int) -> list[Range]:
    """What the ``count`` top layers of a chain hold, zeros included."""
    if count == 0:
        return []
    image = nested(chain_options(directory, chain))
    entries = json_of(run(["qemu-img", "map", "--output=json", json_name(image)]))
    return [(e["start"], e["length"]) for e in entries if e["depth"] < count]


def union(ranges: Iterable[Range], size: int) -> list[Range]:
    """Sorted, disjoint ranges that cover the given ones, rounded out to the granularity."""
    merged: list[list[int]] = []
    for start, length in sorted(ranges):
        begin = start // GRANULARITY * GRANULARITY
        end = min(size, -(-(start + length) // GRANULARITY) * GRANULARITY)
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return [(begin, end - begin) for begin, end in merged if end > begin]


def compare(
    candidates: Iterable[Range],
    one: Callable[[int, int], bytes],
    other: Callable[[int, int], bytes],
) -> tuple[Range, ...]:
    """The parts of the candidate ranges in which ``one(offset, length)`` and ``other`` differ."""
    found: list[Range] = []
    for start, length in candidates:
        for offset in range(start, start + length, _PIECE):
            count = min(_PIECE, start + length - offset)
            left, right = memoryview(one(offset, count)), memoryview(other(offset, count))
            if left == right:
                continue
            for at in range(0, count, GRANULARITY):
                end = min(at + GRANULARITY, count)
                if left[at:end] != right[at:end]:
                    _append(found, offset + at, end - at)
    return tuple(found)


def _append(found: list[Range], start: int, length: int) -> None:
    if found and sum(found[-1]) == start:
        found[-1] = (found[-1][0], found[-1][1] + length)
    else:
        found.append((start, length))
