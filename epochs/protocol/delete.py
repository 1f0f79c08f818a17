"""``delete``: forget epochs; every other epoch and every machine stays as it was."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from epochs import points
from epochs.catalog import EpochRecord
from epochs.errors import Refused
from epochs.protocol import mounts, standby, upkeep
from epochs.protocol.journal import operation
from epochs.store import StoreFiles


@dataclass(frozen=True)
class Deletion:
    """``freed`` is bytes on disk, before minus after."""

    epochs: list[str]
    freed: int


def used_bytes(store: StoreFiles) -> int:
    """Bytes that the store's packs, layers and epochs occupy on disk."""
    return sum(_blocks(path) for place in (store.packs_dir, store.layers_dir, store.path / "epochs")
               for path in place.rglob("*")) * 512


def _blocks(path: Path) -> int:
    """Of 512 bytes; 0 for directories, and for what another command has just removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_blocks if stat.S_ISREG(found.st_mode) else 0


def delete(store: StoreFiles, epochs: list[EpochRecord]) -> Deletion:
    """Forget the epochs; children and heads pass to the parent, layers are merged."""
    with store.exclusive():
        before = used_bytes(store)
        ids = [epoch.id for epoch in epochs]
        mounts.refuse_mounted(store, ids)
        for one in store.needed_epochs() & {*ids}:
            raise Refused(f"epoch {one[:12]} is what a guarded command goes back to if it fails; "
                          "wait until it is done")
        standby.drop_of(store, epochs=ids)
        layers = sorted({layer for epoch in ids
                         for layer in store.catalog.epoch_layers(epoch).values()})
        with operation(store, "delete", None, {"epochs": ids, "layers": layers},
                       upkeep.redo_delete) as under_way:
            with store.catalog.transaction():
                for epoch in ids:
                    store.catalog.forget_epoch(epoch)
            points.hit("delete.forgotten")
            upkeep.redo_delete(store, under_way.record)
        upkeep.try_tidy(store)
        return Deletion(ids, before - used_bytes(store))
