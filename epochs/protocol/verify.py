"""Whether an epoch's bytes are those that were written.

``before_use`` trusts a file whose stat signature is the one recorded when its checksum was last
known to be right, and reads every file whose signature is another; ``verify`` reads everything.
Whatever is found is recorded with the epoch, so that it is refused from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import memsave
from blockcow import Layer, LayerDamaged
from epochs.catalog import EpochRecord
from epochs.errors import Damaged
from epochs.protocol.create import checksum
from epochs.store import StoreFiles


@dataclass(frozen=True)
class Finding:
    """One damaged file of one epoch."""

    epoch: str
    file: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"epoch": self.epoch, "file": self.file, "reason": self.reason}


def before_use(store: StoreFiles, epoch: EpochRecord) -> None:
    """Raise Damaged if the epoch must not be run. Cheap where no file was touched."""
    # What was found damaged once is read in full: its signature may fit nevertheless.
    findings = examine(store, epoch, full=epoch.damaged is not None)
    _record(store, epoch, findings)
    if findings:
        raise Damaged(f"epoch {epoch.id[:12]} is damaged and cannot be used: "
                      f"{findings[0].reason} ({findings[0].file})",
                      [finding.to_json() for finding in findings])


def verify(store: StoreFiles, epochs: list[EpochRecord],
           progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Read every byte that the epochs depend on; records and returns what is damaged."""
    done: dict[str, str | None] = {}  # layers are shared: each is read once
    found = []
    for index, epoch in enumerate(epochs):
        findings = examine(store, epoch, full=True, layers=done)
        _record(store, epoch, findings)
        found += findings
        if progress:
            progress(index + 1, len(epochs))
    return found


def _record(store: StoreFiles, epoch: EpochRecord, findings: list[Finding]) -> None:
    why = f"{findings[0].reason} ({findings[0].file})" if findings else None
    if why != epoch.damaged:
        with store.catalog.transaction():
            store.catalog.mark_damaged(epoch.id, why)


def examine(store: StoreFiles, epoch: EpochRecord, *, full: bool,
            layers: dict[str, str | None] | None = None) -> list[Finding]:
    """All damage of one epoch: blobs, then memory, then disks."""
    findings = []

    def note(file: Path, reason: str) -> None:
        findings.append(Finding(epoch.id, str(file), reason))

    for file, wanted, what in (
            (store.map_file(epoch.id), epoch.map_checksum, "page map"),
            (store.state_file(epoch.id), epoch.state_checksum, "device state")):
        try:
            if checksum(file.read_bytes()) != wanted:
                note(file, f"the {what} has another checksum than when it was written")
        except FileNotFoundError:
            note(file, f"the {what} is missing")
        except OSError as error:
            note(file, f"the {what} cannot be read: {error.strerror}")
    if not any(finding.file == str(store.map_file(epoch.id)) for finding in findings):
        _examine_memory(store, epoch, full, note)
    _examine_disks(store, epoch, full, note, {} if layers is None else layers)
    return findings


def _examine_memory(store: StoreFiles, epoch: EpochRecord, full: bool,
                    note: Callable[[Path, str], None]) -> None:
    with memsave.PackStore(store.packs_dir) as packs:
        try:
            image = memsave.Image.load(store.map_file(epoch.id))
            known = store.catalog.pack_signatures()
            now = {}
            for pack in sorted(image.packs):
                try:
                    now[pack] = packs.signature(pack)
                except OSError as error:
                    note(Path(error.filename or packs.pack_path(pack)),
                         "the pack or its index is missing")
                    return
            if not full and all(known.get(pack) == now[pack] for pack in now):
                return
            image.verify(packs)
        except memsave.MemoryDamaged as error:
            note(Path(error.path), str(error))
            return
    changed = {pack: signature for pack, signature in now.items()
               if known.get(pack) != signature}
    # A signature vouches for a whole pack, and this epoch may use only some of its slots: it is
    # renewed only where a full verification of the pack succeeds.
    for pack, signature in changed.items():
        with memsave.PackStore(store.packs_dir) as packs:
            try:
                packs.verify(pack)
            except memsave.MemoryDamaged:
                continue
        with store.catalog.transaction():
            store.catalog.set_pack_signature(pack, signature)


def _examine_disks(store: StoreFiles, epoch: EpochRecord, full: bool,
                   note: Callable[[Path, str], None], seen: dict[str, str | None]) -> None:
    for layer_id in store.catalog.epoch_layers(epoch.id).values():
        for layer in store.catalog.chain(layer_id):
            if layer.id in seen:
                reason = seen[layer.id]
                if reason is not None:
                    note(store.layers_dir / layer.file, reason)
                continue
            seen[layer.id] = None
            try:
                _check_layer(store, layer, full=full)
            except LayerDamaged as error:
                seen[layer.id] = str(error)
                note(error.path, str(error))


def _check_layer(store: StoreFiles, layer: Layer, *, full: bool) -> None:
    """Check one layer and renew its signature. Another command may replace it by a merged one
    meanwhile: what does not fit the row any more is checked by what the catalog says of it now."""
    while True:
        try:
            checked = store.backend(layer.backend).check(layer, full=full)
            break
        except LayerDamaged:
            renamed = _being_promoted(store, layer)
            now = store.catalog.layer(layer.id)
            if now != layer:
                layer = now
            elif renamed is not None:
                store.backend(layer.backend).check(renamed, full=full)
                return
            else:
                raise
    if checked != layer:
        with store.catalog.transaction():
            current = store.catalog.layer(layer.id)
            if current.checksum == layer.checksum:  # not consolidated meanwhile
                store.catalog.put_layer(replace(current, signature=checked.signature))


def _being_promoted(store: StoreFiles, layer: Layer) -> Layer | None:
    """The replacement of a layer that may be in its place already, though not in its row."""
    for record in store.catalog.journal():
        if record.kind == "consolidate" and record.plan["layer"] == layer.id:
            replacement = record.plan.get("replacement")
            if replacement is not None:
                return replace(Layer(**replacement), file=layer.file, signature=None)
    return None
