"""``create``: a live epoch.

Steps as in docs/design.md part 5: intend, prepare, pause, seal, resume, write, commit. Those in the
middle are the hypervisor's (``seal`` of its driver). A failure at any of them ends in :func:`undo`,
which is also what ``recover`` runs after a kill.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import memsave
from epochs import points
from epochs.catalog import DiskRecord, EpochRecord, JournalRecord, MachineRecord
from epochs.durable import remove_tree
from epochs.errors import Refused, UsageError
from epochs.graph import TAG
from epochs.hypervisor import Progress, Sealed, Work, hypervisor, no_progress
from epochs.protocol import freezing, upkeep
from epochs.protocol.instances import require_live
from epochs.protocol.journal import operation
from epochs.store import StoreFiles, new_id


def create(store: StoreFiles, machine: MachineRecord, *, message: str = "",
           tags: tuple[str, ...] = (), flat: bool | None = None,
           progress: Progress = no_progress) -> EpochRecord:
    """Seal the machine's present state as a child of its head, while it goes on.

    The caller holds the machine's lock. ``flat`` forces or forbids a new flat pack. Raises Refused
    if a check says no before anything changed, Failed if something broke and was undone.
    """
    check_tags(store, machine, tags)
    with store.shared():
        began = time.perf_counter()
        machine = store.catalog.machine(machine.name)  # its head may just have been deleted
        instance = require_live(store, machine)
        disks = store.catalog.disks(machine.id)
        hypervisor(machine.spec).require_sealable(store, instance, disks)
        plan: dict[str, Any] = {
            "epoch": new_id(), "pack": new_id(), "instance": instance.id,
            "layers": {disk.name: store.new_layer(disk.backend, disk.base) for disk in disks},
            "active": {disk.name: disk.active for disk in disks},
        }
        with operation(store, "create", machine.id, plan, undo) as under_way:
            work = Work(store, machine, disks, instance, plan["epoch"], plan["pack"],
                        plan["layers"], under_way, flat, progress)
            sealed = hypervisor(machine.spec).seal(work)
            epoch = _record(work, sealed, message, began)
            _commit(work, epoch, tags, sealed)
        upkeep.try_shorten_chains(store, machine)
    return epoch


def check_tags(store: StoreFiles, machine: MachineRecord, tags: tuple[str, ...]) -> None:
    """Refuse tags that are malformed or taken in this machine."""
    taken = {name for name, owner, _ in store.catalog.tags() if owner == machine.id}
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise UsageError(f"'{tag}' is not a tag; use letters, digits, '_', '.', '+', '-', "
                             "at most 100, starting with a letter or digit")
        if tag in taken or tags.count(tag) > 1:
            raise Refused(f"machine '{machine.name}' has a tag '{tag}' already; choose another "
                          f"or move it with 'epochs tag --force'")


def _record(work: Work, sealed: Sealed, message: str, began: float) -> EpochRecord:
    store, written = work.store, sealed.written
    map_bytes = store.map_file(work.epoch).read_bytes()
    state = store.state_file(work.epoch).read_bytes()
    stats = {
        **sealed.figures, **memory_figures(written),
        "disk_bytes": {part.disk: part.written for part in sealed.frozen},
        "map_bytes": len(map_bytes), "state_bytes": len(state),
        "total_seconds": time.perf_counter() - began,
    }
    return EpochRecord(
        id=work.epoch, machine=work.machine.id, machine_name=work.machine.name,
        parent=work.machine.head, created=time.time(), message=message, spec=work.machine.spec,
        compatibility=work.instance.compatibility, map_checksum=checksum(map_bytes),
        state_checksum=checksum(state), state_size=len(state), thumbnail=sealed.thumbnail,
        stats=stats)


def memory_figures(written: memsave.WriteResult) -> dict[str, Any]:
    """What was measured of an image, under the names of docs/json.md."""
    return {
        "pages_new": written.new_pages, "pages_changed": written.changed_pages,
        "pages_zero": written.zero_pages, "pages_folded": written.folded_pages,
        "pages_resident": written.image.resident, "pack_bytes": written.bytes_written,
        "flat": written.flat,
    }


def checksum(data: bytes) -> str:
    """BLAKE2b-128 of a small blob, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _commit(work: Work, epoch: EpochRecord, tags: tuple[str, ...], sealed: Sealed) -> None:
    """One transaction: the epoch, its layers, the machine's head, and the journal row gone."""
    store, catalog = work.store, work.store.catalog
    by_disk = {part.disk: part for part in sealed.frozen}
    if sealed.based:  # not durable: a power cut ends the instance, too
        sealed.image.save(_pending(store, work.instance.id), durable=False)
    with catalog.transaction():
        for part in sealed.frozen:
            catalog.put_layer(part.frozen)
            catalog.put_layer(part.active)
            catalog.set_active(work.machine.id, part.disk, part.active.id)
        if sealed.signature is not None:
            catalog.add_pack(work.pack, sealed.signature)
        catalog.add_epoch(epoch, {disk.name: by_disk[disk.name].frozen.id for disk in work.disks},
                          sealed.image.packs)
        for tag in tags:
            catalog.put_tag(tag, work.machine.id, epoch.id)
        catalog.set_head(work.machine.id, epoch.id)
        store.moved_on(_new_layers(work.disks, work.new_layers))
        catalog.put_instance(replace(work.instance, trusted=False),
                             sealed.image.packs if sealed.based else ())
        work.operation.phase("committed")
    points.hit("create.committed")
    finish_commit(store, work.operation.record)


def _pending(store: StoreFiles, instance_id: str) -> Path:
    """What becomes the instance's base map once the epoch is committed."""
    return store.base_map(instance_id).with_suffix(".next")


def _new_layers(disks: list[DiskRecord], layers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The layers that a create makes, as (backend, id)."""
    return [(disk.backend, layers[disk.name]) for disk in disks if disk.name in layers]


def finish_commit(store: StoreFiles, record: JournalRecord) -> None:
    """After the commit: the instance's base map becomes the epoch's, tracking is credible."""
    catalog = store.catalog
    pending = _pending(store, record.plan["instance"])
    if pending.exists():
        pending.rename(store.base_map(record.plan["instance"]))
    with catalog.transaction():
        catalog.trust(record.plan["instance"])
        catalog.end(record.id)


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Bring the guest back to running and remove everything of an epoch that was not committed."""
    if record.phase == "committed":
        finish_commit(store, record)
        return
    machine = store.catalog.machine_by_id(record.machine or "")
    instance = store.catalog.instance_of(record.machine or "")
    # The guest first; then the files, because on a full disk the catalog cannot be written before
    # they are gone.
    with (hypervisor(machine.spec).after_create(store, instance, record)
          if machine is not None and instance is not None
          and instance.id == record.plan["instance"] else nullcontext()) as live:
        points.hit("undo-create.resumed")
        remove_tree(store.epoch_dir(record.plan["epoch"]))
        _pending(store, record.plan["instance"]).unlink(missing_ok=True)
        memsave.PackStore(store.packs_dir).drop(record.plan["pack"])
        held = (freezing.unfrozen(store, machine, live, record.plan)
                if machine is not None else {})
    points.hit("undo-create.unfrozen")
    # One transaction: done again with the layers recorded already, the new active layer would be
    # taken for the one that was frozen.
    with store.catalog.transaction():
        for name, layers in held.items():
            for layer in reversed(layers):  # bottom first: backing must exist
                store.catalog.put_layer(layer)
            store.catalog.set_active(record.machine or "", name, layers[0].id)
        store.moved_on(_new_layers(store.catalog.disks(record.machine or ""),
                                   record.plan["layers"]))
        store.catalog.end(record.id)
