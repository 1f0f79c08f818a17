"""``delete``: forget epochs; every other epoch and every machine stays as it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epochs import points
from epochs.catalog import EpochRecord
from epochs.protocol import mounts, upkeep
from epochs.protocol.journal import operation
from epochs.store import StoreFiles


@dataclass(frozen=True)
class Deletion:
    """``freed`` is bytes on disk, before minus after."""

    epochs: list[str]
    freed: int


def used_bytes(store: StoreFiles) -> int:
    """Bytes that the store's packs, layers and epochs occupy on disk."""
    return sum(file.stat().st_blocks * 512
               for place in (store.packs_dir, store.layers_dir, store.path / "epochs")
               for file in _files(place))


def _files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


def delete(store: StoreFiles, epochs: list[EpochRecord]) -> Deletion:
    """Forget the epochs; children and heads pass to the parent, layers are merged."""
    with store.exclusive():
        before = used_bytes(store)
        ids = [epoch.id for epoch in epochs]
        mounts.refuse_mounted(store, ids)
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
