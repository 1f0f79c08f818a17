"""Machines as such: ``add``, ``stop``, ``remove``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blockcow
from blockcow import BlockError, Layer
from blockcow.source import probe
from epochs import points
from epochs.catalog import DiskRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import Refused
from epochs.hypervisor import Hypervisor, hypervisor
from epochs.protocol import mounts, standby, upkeep
from epochs.protocol.instances import state
from epochs.protocol.journal import operation
from epochs.protocol.launch import put_off
from epochs.qemu import command
from epochs.spec import DiskSpec, MachineSpec, check_name
from epochs.store import StoreFiles, new_id

Offered = tuple[DiskSpec, str, blockcow.Source]  # a disk, its backend, and what is there
STOP_LIMIT = 60.0  # seconds that a guest has to power itself off


def add(store: StoreFiles, name: str, spec: MachineSpec,
        progress: Callable[[str, int, int], None] | None = None) -> MachineRecord:
    """Register a machine. Its disks are checked, checksummed, and never written to."""
    check_name(name)
    if store.catalog.find_machine(name) is not None:
        raise Refused(f"there is a machine '{name}' already; choose another name")
    driver = hypervisor(spec)
    spec = driver.accept(store, name, spec)
    with store.shared():
        machine, sources = offered(store, driver, name, spec)
        plan = {"machine": machine.id,
                "layers": [[backend, new_base(store, disk, backend)]
                           for disk, backend, _ in sources]}
        with operation(store, "add", machine.id, plan, undo_add) as under_way:
            make_directory(store.machine_dir(machine.id))
            layers: list[Layer] = []
            for (disk, backend, source), (_, layer_id) in zip(sources, plan["layers"],
                                                              strict=True):
                layers.append(store.backend(backend).adopt(
                    source, layer_id, disk_progress(progress, disk, source),
                    owner=f"{name}/{disk.name}#base"))
            with store.catalog.transaction():
                for layer in layers:
                    store.catalog.put_layer(layer)
                store.catalog.add_machine(machine, [
                    DiskRecord(disk.name, backend, layer.id, None)
                    for (disk, backend, _), layer in zip(sources, layers, strict=True)])
                store.moved_on((layer.backend, layer.id) for layer in layers)
                under_way.end()
    return machine


def offered(store: StoreFiles, driver: Hypervisor, name: str, spec: MachineSpec) -> (
        tuple[MachineRecord, list[Offered]]):
    """A machine that is recorded nowhere yet, and its disks, looked at. Refused if one cannot be
    used."""
    sources = [(disk, _backend(store, driver, disk, source), source) for disk in spec.disks
               for source in (probe(Path(disk.file), disk.format),)]
    _refuse_shared_disks(store, sources)
    accel, machine_type = driver.platform(store, spec)
    machine = MachineRecord(new_id(), name, _settled(spec, sources), time.time(), machine_type, "",
                            accel, None)
    return replace(machine, mac=command.mac_address(machine.id)), sources


def disk_progress(progress: Callable[[str, int, int], None] | None, disk: DiskSpec,
                   source: blockcow.Source) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(f"disk {disk.name}", done, source.size)

    return advance


def _backend(store: StoreFiles, driver: Hypervisor, disk: DiskSpec,
             source: blockcow.Source) -> str:
    if disk.backend is None:
        return driver.choose_backend(store, disk, source)
    if disk.backend not in (*blockcow.BACKENDS, blockcow.LVM):
        raise Refused(f"disk '{disk.name}': there is no backend '{disk.backend}'; there are "
                      + ", ".join(sorted((*blockcow.BACKENDS, blockcow.LVM))))
    of_lvm = disk.backend.startswith(blockcow.LVM)
    refusal = store.backend("lvm-thin" if of_lvm else disk.backend).available()
    if refusal:
        raise Refused(f"disk '{disk.name}' cannot use the {disk.backend} backend: {refusal}")
    found = blockcow.lvm_backend(source.path, store.path / "locks") if of_lvm else disk.backend
    if disk.backend not in (found, blockcow.LVM):
        raise Refused(f"disk '{disk.name}': {source.path} takes backend={found}, not "
                      f"{disk.backend}")
    if disk.snapshot is not None and found != "lvm-thick":
        raise Refused(f"disk '{disk.name}': snapshot= is for ordinary volumes of LVM only")
    return found


def new_base(store: StoreFiles, disk: DiskSpec, backend: str) -> str:
    """An id for a disk's base layer; Refused if it is not clear in which pool it goes."""
    if backend != "dmthin":
        if disk.pool is not None:
            raise Refused(f"disk '{disk.name}' goes into a pool only with backend=dmthin")
        return new_id()
    if disk.pool is not None:
        from epochs.protocol import pools

        return store.layer_in_pool(pools.named(store, disk.pool).id)
    there = store.catalog.pools()
    if len(there) != 1:
        raise Refused(f"disk '{disk.name}': " + (
            "say in which pool, with pool=NAME; there are " + ", ".join(p.name for p in there)
            if there else "there is no pool yet; make one with 'epochs pool create NAME DEVICE'"))
    return store.layer_in_pool(there[0].id)


def _refuse_shared_disks(store: StoreFiles, sources: list[Offered]) -> None:
    """A store's own files are no disks to add, nor is a volume that a machine writes to itself."""
    written = {layer.signature for layer in store.catalog.layers()
               if layer.backend == "lvm-thick" and layer.backing is None}
    for disk, backend, source in sources:
        if backend == "lvm-thick":
            own, others = blockcow.written_volume(source.path, store.path / "locks",
                                                  store.catalog.store_id)
            if own in written:
                raise Refused(f"disk '{disk.name}': {source.path} is the disk of a machine "
                              "already, is given twice, or has epochs; remove those first")
            if others:
                raise Refused(f"disk '{disk.name}': {source.path} has epochs in another store "
                              f"({others}); remove those first")
            written.add(own)
        if source.path.resolve().is_relative_to(store.path):
            raise Refused(f"disk '{disk.name}': {source.path} belongs to the store itself; fork an "
                          "epoch instead")


def _settled(spec: MachineSpec, sources: list[Offered]) -> MachineSpec:
    """With every disk as it was found."""
    return replace(spec, disks=tuple(
        replace(disk, file=str(source.path.resolve()), format=source.format, backend=backend)
        for disk, backend, source in sources))


def undo_add(store: StoreFiles, record: JournalRecord) -> None:
    """Remove what an unfinished ``add`` made."""
    if store.catalog.machine_by_id(record.plan["machine"]) is None:
        for backend, layer_id in record.plan["layers"]:
            store.backend(backend).discard(layer_id)
        remove_tree(store.machine_dir(record.plan["machine"]))
    points.hit("undo-add.discarded")
    with store.catalog.transaction():
        store.moved_on((backend, layer_id) for backend, layer_id in record.plan["layers"])
        store.catalog.end(record.id)


def pull_plug(store: StoreFiles, machine: MachineRecord) -> None:
    """End the hypervisor's process at once, whatever it is in the middle of."""
    instance = store.catalog.instance_of(machine.id)
    if instance is not None:
        hypervisor(machine.spec).end(store, instance.id)


def stop(store: StoreFiles, machine: MachineRecord, *, kill: bool = False,
         limit: float = STOP_LIMIT) -> None:
    """Power a machine off: by its guest agent or ACPI, or at once with ``kill``.

    Raises Refused if it is off, Failed if the guest did not go within ``limit`` seconds.
    """
    found = state(store, machine)
    if found.instance is None:
        raise Refused(f"machine '{machine.name}' is off already")
    if found.alive and found.word != "off" and not kill:
        hypervisor(machine.spec).power_off(store, machine, found.instance, limit)
    with store.shared():
        put_off(store, machine)
        standby.drop_of(store, owner=machine.id)
        hypervisor(machine.spec).released(store, machine.id)


@dataclass(frozen=True)
class Removal:
    """What ``remove`` did: the epochs that went with the machine."""

    machine: str
    epochs: list[str]


def remove(store: StoreFiles, machine: MachineRecord, *, with_epochs: bool = False,
           force: bool = False) -> Removal:
    """Forget a machine, its present disks and console log. Its epochs stay unless asked for."""
    if state(store, machine).alive and not force:
        raise Refused(f"machine '{machine.name}' is on; stop it first or use --force")
    mounts.refuse_mounted(store, store.catalog.epochs_of(machine.id) if with_epochs else [])
    with store.shared():
        put_off(store, machine)
    with store.exclusive():
        gone = store.catalog.epochs_of(machine.id) if with_epochs else []
        mounts.refuse_mounted(store, gone)
        standby.drop_of(store, epochs=gone, owner=machine.id)
        hypervisor(machine.spec).released(store, machine.id)
        layers = [layer for disk in store.catalog.disks(machine.id)
                  for layer in (disk.active, disk.base) if layer]
        with operation(store, "remove", machine.id,
                       {"epochs": gone, "layers": layers, "machine": machine.id},
                       upkeep.redo_delete) as under_way:
            with store.catalog.transaction():
                for epoch in gone:
                    store.catalog.forget_epoch(epoch)
                store.catalog.remove_machine(machine.id)
            upkeep.redo_delete(store, under_way.record)
        upkeep.try_tidy(store)
    return Removal(machine.name, gone)


def _why_stuck(store: StoreFiles, machine: MachineRecord, word: str) -> str | None:
    """Why QEMU holds a guest, with the mend, as far as it can be told from here."""
    if word != "io-error":
        return None
    then = f"then 'epochs start {machine.name}' lets it go on"
    for disk in store.catalog.disks(machine.id):
        if disk.active is not None:
            room = store.backend(disk.backend).room(store.catalog.layer(disk.active))
            if room is not None and room.data < room.block:
                return f"{room.what} is full: {room.mend}, {then}; nothing is lost"
    return f"a disk of it failed; mend the cause, {then}"


def _room(store: StoreFiles, disk: DiskRecord) -> dict[str, Any] | None:
    """What is left where a disk grows, for --json; None where that is the store's file system, or
    where it cannot be asked now."""
    if disk.backend not in blockcow.DIRECT or disk.active is None:
        return None
    try:
        room = store.backend(disk.backend).room(store.catalog.layer(disk.active))
    except BlockError as error:
        store.notice(f"disk '{disk.name}': {error}")
        return None
    if room is None:
        return None
    return {"where": room.what, "free": room.data, "total": room.data_total,
            "metadata_free": room.metadata, "metadata_total": room.metadata_total}


def describe(store: StoreFiles, machine: MachineRecord) -> dict[str, Any]:
    """A machine as plain data for ``list``, ``status`` and --json (docs/json.md)."""
    found = state(store, machine)
    instance = found.instance
    return {
        "name": machine.name, "id": machine.id, "state": found.word,
        "detail": found.detail or _why_stuck(store, machine, found.word),
        "head": machine.head, "epochs": len(store.catalog.epochs_of(machine.id)),
        "memory": machine.spec.memory,
        "cpus": machine.spec.cpus, "accelerator": machine.accel,
        "machine_type": machine.machine_type, "net": machine.spec.net, "vga": machine.spec.vga,
        "pid": None, "domid": None, "address": None,
        "publish": list(machine.spec.publish),
        "hypervisor": machine.spec.hypervisor,
        "qemu": instance.compatibility.get("qemu") if instance else None,
        "xen": instance.compatibility.get("xen") if instance else None,
        **(hypervisor(machine.spec).describe(store, instance) if instance and found.alive else {}),
        "started": instance.started if instance else None,
        "created": machine.created,
        "console_log": str(hypervisor(machine.spec).console_log(store, machine)),
        "disks": [{"name": disk.name, "backend": disk.backend, "room": _room(store, disk),
                   "chain": len(store.catalog.chain(disk.active or disk.base))}
                  for disk in store.catalog.disks(machine.id)],
    }
