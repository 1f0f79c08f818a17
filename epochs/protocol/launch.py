"""Starting instances: from an epoch (rollback, fork) or cold (start).

An instance is made ready and held before anything that runs is touched: disks cloned, the
hypervisor started on the epoch. Everything it creates is named beforehand in a
:class:`epochs.hypervisor.Target`, which the journal holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from blockcow import Layer
from epochs import points
from epochs.catalog import DiskRecord, EpochRecord, MachineRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import Refused
from epochs.hypervisor import Hypervisor, Laps, Launch, Ready, Target, hypervisor
from epochs.protocol import upkeep
from epochs.store import StoreFiles, new_id


def new_target(store: StoreFiles, machine_id: str, disks: list[DiskRecord], *,
               cold: bool) -> Target:
    """Name a target; a cold start makes layers only for disks that have no active one."""
    return Target(machine_id, new_id(),
                  {disk.name: store.new_layer(disk.backend, disk.base) for disk in disks
                   if not cold or disk.active is None})


def disks_of(store: StoreFiles, epoch: EpochRecord) -> list[DiskRecord]:
    """The disks that a fork of an epoch gets."""
    return [DiskRecord(disk, store.catalog.layer(layer).backend,
                       store.catalog.chain(layer)[-1].id, None)
            for disk, layer in store.catalog.epoch_layers(epoch.id).items()]


def launch(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord], target: Target,
           epoch: EpochRecord | None, *, fork: bool = False,
           same_generation: bool = False) -> Ready:
    """Make an instance ready: of ``epoch``, or cold from the machine's present disks. ``fork``: it
    gets an identity of its own. ``same_generation``: it keeps the epoch's generation id.

    Raises Incompatible, HypervisorDied, memsave.MemoryDamaged …; whatever was created until then
    is still there, to be removed with :func:`undo`.
    """
    clock = Laps()
    make_directory(store.instance_dir(target.instance))
    make_directory(store.machine_dir(machine.id))  # a power cut may have taken it, new as it was
    layers, chains = _disk_chains(store, machine.name, disks, target, epoch)
    points.hit("launch.disks-cloned")
    clock.lap("disks")
    # Whoever switches to this instance records its layers, so they are durable before; meanwhile
    # the hypervisor starts.
    with ThreadPoolExecutor(1, "epochs-sync") as beside:
        durable = beside.submit(_make_durable, store, layers)
        ready = hypervisor(machine.spec).launch(
            store, Launch(machine, disks, target, epoch, fork, same_generation, layers, chains,
                          clock))
        try:
            durable.result()
        except BaseException:
            ready.close()
            raise
    return ready


def _make_durable(store: StoreFiles, layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        store.backend(layer.backend).sync(layer)


def _disk_chains(store: StoreFiles, name: str, disks: list[DiskRecord], target: Target,
                 epoch: EpochRecord | None) -> tuple[dict[str, Layer], dict[str, list[Layer]]]:
    """Clone what has to be cloned for machine ``name``; returns the new active layers and every
    disk's chain."""
    frozen = store.catalog.epoch_layers(epoch.id) if epoch else {}
    layers: dict[str, Layer] = {}
    chains: dict[str, list[Layer]] = {}
    for disk in disks:
        if disk.name not in target.layers:
            chains[disk.name] = store.catalog.chain(disk.active or disk.base)
            continue
        below = store.catalog.chain(frozen[disk.name] if epoch else disk.base)
        layer = store.backend(disk.backend).clone(below, target.layers[disk.name],
                                                  owner=f"{name}/{disk.name}")
        layers[disk.name] = layer
        chains[disk.name] = [layer, *(below if layer.backing else [])]
    for disk in disks:
        store.backend(disk.backend).activate(chains[disk.name])
    return layers, chains


def undo(store: StoreFiles, driver: Hypervisor, target: Target,
         backends: Mapping[str, str]) -> None:
    """Remove whatever a launch may have left behind; ``backends`` maps disk names to backends."""
    driver.end(store, target.instance)
    for disk, layer_id in target.layers.items():
        store.backend(backends[disk]).discard(layer_id)
    remove_tree(store.instance_dir(target.instance))


def check_same_disks(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord],
                     epoch: EpochRecord) -> None:
    """Refused if a machine cannot be put to an epoch because it has other disks."""
    if epoch.spec.hypervisor != machine.spec.hypervisor:
        raise Refused(f"epoch {epoch.id[:12]} is of a {epoch.spec.hypervisor} machine, and "
                      f"'{machine.name}' is one of {machine.spec.hypervisor}")
    frozen = list(store.catalog.epoch_layers(epoch.id))
    if frozen != [disk.name for disk in disks]:
        raise Refused(f"epoch {epoch.id[:12]} has disks {', '.join(frozen) or 'none'}, machine "
                      f"'{machine.name}' has {', '.join(d.name for d in disks) or 'none'}; fork "
                      "the epoch instead")
    for disk, layer in store.catalog.epoch_layers(epoch.id).items():
        backend = store.catalog.layer(layer).backend
        if any(d.name == disk and d.backend != backend for d in disks):
            raise Refused(f"disk '{disk}' of machine '{machine.name}' is not kept by {backend} as "
                          f"in epoch {epoch.id[:12]}; fork the epoch instead")
        found = store.catalog.layer(layer)
        if store.backend(backend).fork_refusal(found) is not None:
            base = store.catalog.chain(layer)[-1].id
            if any(d.name == disk and d.base != base for d in disks):
                raise Refused(f"disk '{disk}' of epoch {epoch.id[:12]} is on another volume than "
                              f"that of machine '{machine.name}'")


def put_off(store: StoreFiles, machine: MachineRecord) -> None:
    """End a machine's hypervisor at once and forget the instance (its disks stay)."""
    instance = store.catalog.instance_of(machine.id)
    if instance is None:
        return
    hypervisor(machine.spec).end(store, instance.id)
    with store.catalog.transaction():
        store.catalog.remove_instance(instance.id)
    remove_tree(store.instance_dir(instance.id))
    upkeep.deactivate(store, [disk.active for disk in store.catalog.disks(machine.id)
                              if disk.active])
    upkeep.drop_packs(store)
