"""Starting instances: from an epoch (rollback, fork) or cold (start).

An instance is made ready and paused before anything that runs is touched: disks cloned, QEMU
started on the epoch's flat pack, the pages that differ patched, device state loaded. Everything
it creates is named beforehand in a :class:`Target`, which the journal holds.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import memsave
from blockcow import Layer
from epochs import points
from epochs.catalog import DiskRecord, EpochRecord, InstanceRecord, MachineRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import EpochsError, Failed, HypervisorDied, Incompatible
from epochs.processes import ProcessId, working_in
from epochs.qemu import binary, command, ramblocks
from epochs.qemu.monitor import Monitor
from epochs.qemu.process import last_words, spawn
from epochs.store import StoreFiles, new_id

BLANK = "blank.ram"


@dataclass(frozen=True)
class Target:
    """Names of everything that launching one instance creates, fixed before it begins.

    ``layers`` maps disk names to ids of new active layers; a cold start keeps existing ones.
    """

    machine: str
    instance: str
    layers: Mapping[str, str]

    def to_plan(self) -> dict[str, Any]:
        return {"machine": self.machine, "instance": self.instance, "layers": dict(self.layers)}

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> Target:
        return cls(plan["machine"], plan["instance"], plan["layers"])


@dataclass
class Ready:
    """An instance that is paused and complete but in no catalog row yet."""

    record: InstanceRecord
    monitor: Monitor
    layers: dict[str, Layer]
    packs: frozenset[str]
    timings: dict[str, float] = field(default_factory=dict)


def new_target(store: StoreFiles, machine_id: str, disks: list[DiskRecord], *,
               cold: bool) -> Target:
    """Name a target; a cold start makes layers only for disks that have no active one."""
    return Target(machine_id, new_id(),
                  {disk.name: store.new_layer(disk.backend, disk.base) for disk in disks
                   if not cold or disk.active is None})


def launch(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord], target: Target,
           epoch: EpochRecord | None) -> Ready:
    """Make an instance ready: of ``epoch``, or cold from the machine's present disks.

    Raises Incompatible, HypervisorDied, memsave.MemoryDamaged …; whatever was created until then
    is still there, to be removed with :func:`undo`.
    """
    clock = _Clock()
    make_directory(store.instance_dir(target.instance))
    make_directory(store.machine_dir(machine.id))  # a power cut may have taken it, new as it was
    layers, chains = _disk_chains(store, machine.name, disks, target, epoch)
    points.hit("launch.disks-cloned")
    clock.lap("disks")
    # Whoever switches to this instance records its layers, so they are durable before; meanwhile
    # QEMU starts.
    with ThreadPoolExecutor(1, "epochs-sync") as beside:
        durable = beside.submit(_make_durable, store, layers)
        ready = _spawned(store, machine, disks, target, epoch, layers, chains, clock)
        try:
            durable.result()
        except BaseException:
            ready.monitor.close()
            raise
    return ready


def _make_durable(store: StoreFiles, layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        store.backend(layer.backend).sync(layer)


def _spawned(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord], target: Target,
             epoch: EpochRecord | None, layers: dict[str, Layer], chains: dict[str, list[Layer]],
             clock: _Clock) -> Ready:
    """QEMU on these disks: paused, with the epoch's memory and devices, or about to boot."""
    directory = store.instance_dir(target.instance)
    qemu = binary.find(machine.spec.qemu)
    compatibility = command.compatibility(machine.spec, qemu, machine.accel, machine.machine_type,
                                          machine.mac)
    packs = memsave.PackStore(store.packs_dir)
    image: memsave.Image | None = None
    state_fd: int | None = None
    spawned = None
    try:
        if epoch is None:
            ram = directory / BLANK
            with ram.open("wb") as blank:
                blank.truncate(machine.spec.memory)
        else:
            command.check_compatible(epoch.id[:12], epoch.compatibility, compatibility)
            image = memsave.Image.load(store.map_file(epoch.id))
            if image.flat is None:
                raise Failed(f"epoch {epoch.id[:12]} has no flat pack to map")
            ram = packs.pack_path(image.flat)
            state_fd = os.open(store.state_file(epoch.id), os.O_RDONLY | os.O_CLOEXEC)
        nodes = {disk.name: command.disk_node(chains[disk.name][0].id) for disk in disks}
        blockdevs = [argument for disk in disks
                     for argument in store.backend(disk.backend).blockdev(chains[disk.name],
                                                                          nodes[disk.name])]
        spawned = spawn(
            qemu.path, directory,
            lambda sockets: command.arguments(
                machine.spec, name=machine.name, accel=machine.accel,
                machine_type=machine.machine_type, mac=machine.mac, image=ram, nodes=nodes,
                blockdevs=blockdevs, sockets=sockets,
                console_log=store.console_log(machine.id),
                generation_id=str(uuid.uuid4()), incoming=epoch is not None),
            {"LD_PRELOAD": str(memsave.preload_library())},
            pass_fds=() if state_fd is None else (state_fd,))
        points.hit("launch.spawned")
        clock.lap("spawn")
        if image is not None and epoch is not None and state_fd is not None:
            with packs:
                _restore(store, spawned.monitor, spawned.process, image, packs, epoch, state_fd,
                         target, clock)
    except BaseException:
        if spawned is not None:
            spawned.monitor.close()
        raise
    finally:
        if state_fd is not None:
            os.close(state_fd)
    record = InstanceRecord(target.instance, machine.id, spawned.process, qemu.path, compatibility,
                            time.time(), trusted=False)
    return Ready(record, spawned.monitor, layers,
                 image.packs if image is not None else frozenset(), clock.laps)


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


def _restore(store: StoreFiles, monitor: Monitor, process: ProcessId, image: memsave.Image,
             packs: memsave.PackStore, epoch: EpochRecord, state_fd: int, target: Target,
             clock: _Clock) -> None:
    blocks = ramblocks.locate(monitor, process.pid, command.RAM_BLOCK)
    layout = layout_of(blocks)
    if layout != image.layout:
        raise Incompatible(f"epoch {epoch.id[:12]} has RAM blocks {_describe(image.layout)}, but "
                           f"this QEMU would have {_describe(layout)}")
    addresses = {block.name: block.address for block in blocks}
    with memsave.GuestMemory(process.pid, layout, addresses) as guest:
        guest.patch(image, packs, image.flat_view())
    points.hit("launch.patched")
    clock.lap("patch")
    load_state(monitor, state_fd, store.instance_dir(target.instance))
    # Not durable: a power cut ends the instance, too.
    image.save(store.base_map(target.instance), durable=False)
    points.hit("launch.loaded")
    clock.lap("load")


def layout_of(blocks: list[ramblocks.RamBlock]) -> memsave.Layout:
    """The memory layout that a list of located RAM blocks has."""
    return memsave.Layout(tuple(memsave.Block(block.name, block.size) for block in blocks))


def _describe(layout: memsave.Layout) -> str:
    return ", ".join(f"{block.name} ({block.size} B)" for block in layout.blocks)


def load_state(monitor: Monitor, state_fd: int, directory: Any) -> None:
    """Load device state from an inherited descriptor and wait until it is loaded."""
    monitor.execute("migrate-set-capabilities",
                    capabilities=[{"capability": "events", "state": True}])
    events = monitor.listen("MIGRATION")
    try:
        monitor.execute("migrate-incoming", uri=f"fd:{state_fd}")
        while True:
            status = monitor.wait_event(events)["data"]["status"]
            if status == "completed":
                return
            if status == "failed":
                raise Failed("QEMU cannot load the device state: " + last_words(directory))
    except HypervisorDied as error:
        raise HypervisorDied("QEMU ended while it loaded the device state: "
                             + (last_words(directory) or str(error))) from error
    finally:
        monitor.forget(events)


def undo(store: StoreFiles, target: Target, backends: Mapping[str, str]) -> None:
    """Remove whatever a launch may have left behind; ``backends`` maps disk names to backends."""
    end_processes(store, target.instance)
    for disk, layer_id in target.layers.items():
        store.backend(backends[disk]).discard(layer_id)
    remove_tree(store.instance_dir(target.instance))


def end_processes(store: StoreFiles, instance_id: str) -> None:
    """SIGKILL every process of an instance, recorded or not, and wait until they are gone."""
    for process in working_in(store.instance_dir(instance_id)):
        try:
            process.kill()
        except TimeoutError as error:
            raise EpochsError(f"QEMU of instance {instance_id[:12]} cannot be ended: "
                              f"{error}") from error


class _Clock:
    """Named laps in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
