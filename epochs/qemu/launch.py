"""Starting a QEMU on an epoch: on its flat pack, the pages that differ patched, the device state
loaded, paused. Or on blank memory, about to boot."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import memsave
from epochs import points
from epochs.catalog import EpochRecord, InstanceRecord, MachineRecord
from epochs.errors import Failed, HypervisorDied, Incompatible
from epochs.hypervisor import Laps, Launch, Ready
from epochs.network import isolated, ports
from epochs.processes import ProcessId
from epochs.qemu import binary, command, forwards, ramblocks
from epochs.qemu.monitor import Monitor
from epochs.qemu.process import last_words, spawn
from epochs.store import Notice, StoreFiles

BLANK = "blank.ram"


@dataclass
class ReadyQemu(Ready):
    """A QEMU that is paused and complete."""

    monitor: Monitor
    machine: MachineRecord
    notice: Notice

    def go_on(self) -> None:
        forwards.publish(self.monitor, self.machine, self.notice)
        self.monitor.execute("cont")

    def close(self) -> None:
        self.monitor.close()


def launch(store: StoreFiles, wanted: Launch) -> ReadyQemu:
    """QEMU on these disks: paused, with the epoch's memory and devices, or about to boot."""
    machine, target, epoch = wanted.machine, wanted.target, wanted.epoch
    disks, chains, clock = wanted.disks, wanted.chains, wanted.clock
    directory = store.instance_dir(target.instance)
    qemu = binary.find(machine.spec.qemu)
    generation_id = str(uuid.uuid4())
    if epoch is not None and wanted.same_generation:
        generation_id = str(epoch.compatibility["generation_id"])
    compatibility = command.compatibility(machine.spec, qemu, machine.accel, machine.machine_type,
                                          machine.mac, generation_id)
    packs = memsave.PackStore(store.packs_dir)
    image: memsave.Image | None = None
    state_fd: int | None = None
    tap: int | None = None
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
        if store.catalog.instance_of(machine.id) is None:
            ports.refuse_taken(store, machine)  # else they are its own already
        if machine.spec.net == "isolated":
            isolated.put_up(store, machine)
            tap = isolated.plug(machine.id, target.instance)
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
                generation_id=generation_id, incoming=epoch is not None, tap=tap),
            {"LD_PRELOAD": str(memsave.preload_library())},
            pass_fds=tuple(fd for fd in (state_fd, tap) if fd is not None))
        points.hit("launch.spawned")
        clock.lap("spawn")
        if image is not None and epoch is not None and state_fd is not None:
            with packs:
                _restore(store, spawned.monitor, spawned.process, image, packs, epoch, state_fd,
                         target.instance, clock)
    except BaseException:
        if spawned is not None:
            spawned.monitor.close()
        raise
    finally:
        for fd in (state_fd, tap):
            if fd is not None:
                os.close(fd)
    record = InstanceRecord(target.instance, target.machine, spawned.process, qemu.path,
                            compatibility, time.time(), trusted=False)
    return ReadyQemu(record, wanted.layers, image.packs if image is not None else frozenset(),
                     clock.steps, spawned.monitor, machine, store.notice)


def _restore(store: StoreFiles, monitor: Monitor, process: ProcessId, image: memsave.Image,
             packs: memsave.PackStore, epoch: EpochRecord, state_fd: int, instance: str,
             clock: Laps) -> None:
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
    load_state(monitor, state_fd, store.instance_dir(instance))
    # Not durable: a power cut ends the instance, too.
    image.save(store.base_map(instance), durable=False)
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
