"""What keeps a store small and its chains short: dropping, merging, sweeping.

Nothing here changes what any epoch looks like. Files that other commands may be about to open are
removed only under the store's exclusive lock; a replacement of a layer is renamed over it first and
recorded afterwards, because the old record over the new file reads the same bytes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import blockcow
import memsave
from blockcow import BlockError, Layer, chains
from epochs import points
from epochs.catalog import JournalRecord, MachineRecord
from epochs.durable import remove_tree
from epochs.errors import EpochsError, HypervisorDied
from epochs.hypervisor import hypervisor
from epochs.protocol.journal import operation
from epochs.qemu import command
from epochs.store import StoreFiles


def drop_layers(store: StoreFiles, layer_ids: list[str]) -> None:
    """Drop those of the layers (and then of those beneath) that nothing needs any more."""
    for layer_id in layer_ids:
        layer = store.catalog.find_layer(layer_id)
        while layer is not None and not store.catalog.layer_needed(layer.id):
            store.backend(layer.backend).drop(layer)
            with store.catalog.transaction():
                store.catalog.remove_layer(layer.id)
                store.moved_on([(layer.backend, layer.id)])
            layer = store.catalog.find_layer(layer.backing) if layer.backing else None


def deactivate(store: StoreFiles, layer_ids: list[str]) -> None:
    """Take down the devices of layers that no hypervisor uses any more."""
    for layer_id in layer_ids:
        layer = store.catalog.find_layer(layer_id)
        if layer is not None:
            store.backend(layer.backend).deactivate(layer)


def drop_packs(store: StoreFiles) -> None:
    """Drop packs that no epoch and no instance refers to."""
    packs = memsave.PackStore(store.packs_dir)
    for pack in store.catalog.unneeded_packs():
        packs.drop(pack)
        with store.catalog.transaction():
            store.catalog.remove_pack(pack)


def redo_delete(store: StoreFiles, record: JournalRecord) -> None:
    """Remove the files of epochs, or of a machine, that were forgotten; repeatable."""
    left = store.catalog.parents()
    for epoch in record.plan["epochs"]:
        if epoch not in left:
            remove_tree(store.epoch_dir(epoch))
    machine = record.plan.get("machine")
    if machine and store.catalog.machine_by_id(machine) is not None:
        machine = None  # not forgotten yet
    if machine:
        remove_tree(store.machine_dir(machine))
    points.hit("delete.files-dropped")
    drop_packs(store)
    drop_layers(store, record.plan["layers"])
    if machine:
        store.forget_machine_lock(machine)
    with store.catalog.transaction():
        store.catalog.end(record.id)


# -- chains ------------------------------------------------------------------------------------
def shorten_chains(store: StoreFiles, machine_id: str) -> None:
    """After a create: merge the newest frozen layers where the chain policy says so, and let the
    running hypervisor read through the merged one. The guest runs meanwhile."""
    for disk in store.catalog.disks(machine_id):
        if disk.active is None:
            continue
        merged = False
        while True:
            chain = store.catalog.chain(disk.active)[1:]
            plan = chains.plan([_link(layer) for layer in chain])
            if plan is None:
                break
            consolidate(store, chain, plan.count)
            merged = True
        if merged:
            _read_through(store, machine_id, disk.active)


def try_shorten_chains(store: StoreFiles, machine: MachineRecord) -> None:
    """The same where failing must not fail what was done already; the reason is told."""
    try:
        shorten_chains(store, machine.id)
    except (BlockError, EpochsError, OSError) as error:
        store.notice(f"the disk chains of machine '{machine.name}' stay long for now: {error}")


def _read_through(store: StoreFiles, machine_id: str, active_id: str) -> None:
    machine, instance = (store.catalog.machine_by_id(machine_id),
                         store.catalog.instance_of(machine_id))
    if machine is None or instance is None:
        return
    active, *below = store.catalog.chain(active_id)
    with operation(store, "rebacking", machine_id, {"layer": active.id},
                   undo_rebacking) as under_way:
        try:
            with hypervisor(machine.spec).live(store, instance) as live:
                store.backend(active.backend).rebacking(live, active,
                                                        command.disk_node(active.id), below)
        except HypervisorDied:
            pass  # its next start opens the short chain
        points.hit("rebacking.done")
        under_way.end()


def undo_rebacking(store: StoreFiles, record: JournalRecord) -> None:
    """The guest reads the same through the old layers and the new ones; it must only go on."""
    layer = store.catalog.find_layer(record.plan["layer"])
    if layer is not None:
        store.backend(layer.backend).go_on(layer)
    with store.catalog.transaction():
        store.catalog.end(record.id)


def consolidate(store: StoreFiles, chain: list[Layer], count: int) -> None:
    """Replace frozen layer ``chain[0]`` by the union of ``chain[:count]``, content unchanged.

    Every layer that goes into the union is read and checked first, so that damage is reported and
    never copied under a fresh checksum.
    """
    layer = chain[0]
    backend = store.backend(layer.backend)
    for part in chain[:count]:
        backend.check(part, full=True)
    plan = {"layer": layer.id, "backend": layer.backend}
    with operation(store, "consolidate", None, plan, undo_consolidate) as under_way:
        points.hit("consolidate.intended")
        built = backend.consolidate(chain, count)
        points.hit("consolidate.built")
        under_way.phase("built", replacement=asdict(built))
        promoted = backend.promote(built)
        points.hit("consolidate.promoted")
        with store.catalog.transaction():
            store.catalog.put_layer(promoted)
            under_way.end()
        points.hit("consolidate.recorded")


def undo_consolidate(store: StoreFiles, record: JournalRecord) -> None:
    """Drop an unfinished replacement, or record one that was already renamed into place."""
    backend = store.backend(record.plan["backend"])
    layer = store.catalog.find_layer(record.plan["layer"])
    replacement = record.plan.get("replacement")
    promoted: Layer | None = None
    if layer is not None:
        place = store.layers_dir / layer.file
        if replacement is not None and not (store.layers_dir / replacement["file"]).exists():
            promoted = _promoted(backend, layer, Layer(**replacement))
        else:
            for file in backend.files(layer.id):
                if file != place:
                    file.unlink(missing_ok=True)
    points.hit("undo-consolidate.dropped")
    with store.catalog.transaction():
        if promoted is not None:
            store.catalog.put_layer(promoted)
        store.catalog.end(record.id)


def _promoted(backend: blockcow.Backend, layer: Layer, replacement: Layer) -> Layer | None:
    """The replacement as it stands in the layer's place, or None if the layer itself is still
    there: then an undo that was killed had removed the replacement."""
    try:
        return backend.check(replace(replacement, file=layer.file, signature=None), full=True)
    except blockcow.LayerDamaged:
        backend.check(layer, full=True)
        return None


def merge_unwanted(store: StoreFiles) -> None:
    """Give back the space of layers that only serve as backing (exclusive lock held).

    A layer with one frozen child is merged into it; one that several share, or that a running
    guest writes over, stays until that changes.
    """
    while (step := _next_step(store)) is not None:
        if isinstance(step, chains.Consolidation):
            consolidate(store, store.catalog.chain(step.layer), step.count)
        else:
            drop_layers(store, [step.layer])


def has_unwanted(store: StoreFiles) -> bool:
    """Whether :func:`merge_unwanted` would find something to do."""
    return store.catalog.any_unwanted_layer() and _next_step(store) is not None


def _next_step(store: StoreFiles) -> chains.Drop | chains.Consolidation | None:
    wanted, active = store.catalog.wanted_layers(), store.catalog.active_layers()
    # Layers that are never merged are only looked at once nothing rests on them.
    return chains.unwanted([
        chains.Link(layer.id, layer.backing, layer.level, layer.id in active, layer.id in wanted)
        for layer in store.catalog.layers()
        if layer.backend != "lvm-thick" or not store.catalog.layer_needed(layer.id)])


def _link(layer: Layer) -> chains.Link:
    return chains.Link(layer.id, layer.backing, layer.level)


def tidy(store: StoreFiles) -> None:
    """Everything that can be dropped or merged is (exclusive lock held)."""
    drop_packs(store)
    merge_unwanted(store)


def try_tidy(store: StoreFiles) -> None:
    """The same where failing must not stop the command that runs it; the reason is told."""
    try:
        tidy(store)
    except (BlockError, EpochsError, OSError) as error:
        store.notice(f"space of deleted epochs is not given back yet: {error}")


# -- orphans -----------------------------------------------------------------------------------
def orphans(store: StoreFiles) -> list[Path]:
    """Files and directories in the store that neither the catalog nor an operation under way
    names. Meaningful only while the exclusive lock is held and the journal is empty."""
    catalog = store.catalog
    if catalog.journal():
        return []
    packs = memsave.PackStore(store.packs_dir)
    known: set[Path] = {store.epoch_dir(epoch) for epoch in catalog.parents()}
    known |= {store.instance_dir(instance.id) for instance in catalog.instances()}
    known |= {store.machine_dir(machine.id) for machine in catalog.machines()}
    known |= {store.machine_dir(standby.machine) for standby in catalog.standbys()}
    known |= {store.path / "mounts" / mount.id for mount in catalog.mounts()}
    known |= {file for pack in catalog.pack_signatures() for file in packs.final_files(pack)}
    for layer in catalog.layers():
        known |= {store.layers_dir / layer.file, *store.backend(layer.backend).files(layer.id)}
    places = ("epochs", "instances", "machines", "mounts", "packs", "layers")
    return sorted(entry for place in places
                  for entry in (store.path / place).iterdir() if entry not in known)


def strays(store: StoreFiles) -> list[str]:
    """Devices and volumes of ours that no layer in the catalog accounts for, in words."""
    known: dict[str, set[str]] = {}
    for layer in store.catalog.layers():
        known.setdefault(layer.backend, set()).add(layer.id)
    return [stray for backend, ids in known.items()
            for stray in store.backend(backend).strays(ids)]


def sweep(store: StoreFiles) -> list[Path]:
    """Remove orphans (exclusive lock held) and return what was removed."""
    found = orphans(store)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    return found
