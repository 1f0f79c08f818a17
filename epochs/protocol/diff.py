"""``diff``: what differs between two epochs, page by page and disk block by disk block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import memsave
from epochs import treediff
from epochs.catalog import EpochRecord
from epochs.errors import Refused
from epochs.protocol import mounts
from epochs.store import StoreFiles
from epochs.treediff import FileChange


@dataclass(frozen=True)
class EpochDiff:
    """``pages``: runs (block, first page, count); ``disks``: byte ranges (offset, length);
    ``files``: if asked for, of each disk what changed in its file systems, by partition (0: the
    whole disk)."""

    a: str
    b: str
    pages: list[tuple[str, int, int]]
    disks: dict[str, tuple[tuple[int, int], ...]]
    files: dict[str, dict[int, list[FileChange]]] | None = None

    def to_json(self) -> dict[str, Any]:
        files = None if self.files is None else {
            disk: [{"partition": number or None, "path": one.path, "change": one.change}
                   for number, changes in parts.items() for one in changes]
            for disk, parts in self.files.items()}
        return {
            **({} if files is None else {"files": files}),
            "a": self.a, "b": self.b,
            "memory": {"pages": sum(count for _, _, count in self.pages),
                       "runs": [list(run) for run in self.pages]},
            "disks": {disk: {"bytes": sum(length for _, length in ranges),
                             "ranges": [list(one) for one in ranges]}
                      for disk, ranges in self.disks.items()},
        }


def diff(store: StoreFiles, a: EpochRecord, b: EpochRecord, *, files: bool = False) -> EpochDiff:
    """Compare two epochs by their bytes; Refused if they are of different hardware. ``files``: say
    which files differ, too, for which their disks are mounted (on throw-away overlays)."""
    if files:
        mounts.refuse_unless_possible()
    with memsave.PackStore(store.packs_dir) as packs:
        images = [memsave.Image.load(store.map_file(epoch.id)) for epoch in (a, b)]
        if images[0].layout != images[1].layout:
            raise Refused(f"epochs {a.id[:12]} and {b.id[:12]} have different memory layouts and "
                          "cannot be compared")
        pages = memsave.diff(images[0], images[1], packs)
    layers = [store.catalog.epoch_layers(epoch.id) for epoch in (a, b)]
    disks = {}
    for disk in layers[0]:
        if disk not in layers[1]:
            raise Refused(f"epoch {b.id[:12]} has no disk '{disk}'")
        chains = [store.catalog.chain(side[disk]) for side in layers]
        if chains[0][0].backend != chains[1][0].backend:
            raise Refused(f"disk '{disk}' is kept by different backends in the two epochs")
        found = store.backend(chains[0][0].backend).difference(chains[0], chains[1])
        disks[disk] = found.ranges
    changes = {disk: _files(store, a, b, disk) if ranges else {}
               for disk, ranges in disks.items()} if files else None
    return EpochDiff(a.id, b.id, pages, disks, changes)


def _files(store: StoreFiles, a: EpochRecord, b: EpochRecord, disk: str
           ) -> dict[int, list[FileChange]]:
    with mounts.viewed(store, a, disk) as left, mounts.viewed(store, b, disk) as right:
        before = {one.partition or 0: place for one, place in left}
        after = {one.partition or 0: place for one, place in right}
        if before.keys() != after.keys():
            raise Refused(f"disk '{disk}' has other file systems in epoch {a.id[:12]} than in "
                          f"{b.id[:12]}; their files cannot be compared")
        return {number: treediff.compare(before[number], after[number]) for number in before}
