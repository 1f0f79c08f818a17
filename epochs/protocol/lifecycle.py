"""Machines as such: ``add``, ``stop``, ``remove``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blockcow
from blockcow import Layer
from blockcow.source import probe
from epochs.catalog import DiskRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree, write_file
from epochs.errors import Failed, HypervisorDied, Refused
from epochs.processes import boot_id
from epochs.protocol import launch, upkeep
from epochs.protocol.instances import open_monitor, state
from epochs.protocol.journal import operation
from epochs.protocol.switch import put_off
from epochs.qemu import agent, binary, command
from epochs.qemu.process import AGENT_SOCKET
from epochs.spec import DiskSpec, MachineSpec, check, check_name
from epochs.store import StoreFiles, new_id

MACHINE_ALIAS = "q35"
STOP_LIMIT = 60.0  # seconds that a guest has to power itself off


def add(store: StoreFiles, name: str, spec: MachineSpec,
        progress: Callable[[str, int, int], None] | None = None) -> MachineRecord:
    """Register a machine. Its disks are checked, checksummed, and never written to."""
    check_name(name)
    if store.catalog.find_machine(name) is not None:
        raise Refused(f"there is a machine '{name}' already; choose another name")
    check(spec)
    qemu = binary.find(spec.qemu)
    with store.shared():
        sources = [(disk, _backend(store, disk), probe(Path(disk.file), disk.format))
                   for disk in spec.disks]
        _refuse_shared_disks(store, sources)
        accel = _accelerator(store, spec, qemu)
        machine = MachineRecord(new_id(), name, _absolute(spec, sources), time.time(),
                                binary.machine_type(qemu, MACHINE_ALIAS), "", accel, None)
        machine = replace(machine, mac=command.mac_address(machine.id))
        plan = {"machine": machine.id,
                "layers": [[backend, new_id()] for _, backend, _ in sources]}
        with operation(store, "add", machine.id, plan, undo_add) as under_way:
            make_directory(store.machine_dir(machine.id))
            layers: list[Layer] = []
            for (disk, backend, source), (_, layer_id) in zip(sources, plan["layers"],
                                                              strict=True):
                layers.append(store.backend(backend).adopt(
                    source, layer_id, _disk_progress(progress, disk, source)))
            with store.catalog.transaction():
                for layer in layers:
                    store.catalog.put_layer(layer)
                store.catalog.add_machine(machine, [
                    DiskRecord(disk.name, backend, layer.id, None)
                    for (disk, backend, _), layer in zip(sources, layers, strict=True)])
                under_way.end()
    return machine


def _disk_progress(progress: Callable[[str, int, int], None] | None, disk: DiskSpec,
                   source: blockcow.Source) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(f"disk {disk.name}", done, source.size)

    return advance


def _backend(store: StoreFiles, disk: DiskSpec) -> str:
    if disk.backend is None:
        return blockcow.choose(store.layers_dir)
    if disk.backend not in blockcow.BACKENDS:
        raise Refused(f"disk '{disk.name}': there is no backend '{disk.backend}'; there are "
                      + ", ".join(sorted(blockcow.BACKENDS)))
    refusal = store.backend(disk.backend).available()
    if refusal:
        raise Refused(f"disk '{disk.name}' cannot use the {disk.backend} backend: {refusal}")
    return disk.backend


def _refuse_shared_disks(store: StoreFiles,
                         sources: list[tuple[DiskSpec, str, blockcow.Source]]) -> None:
    """A store's own files are no disks to add."""
    for disk, _, source in sources:
        if source.path.resolve().is_relative_to(store.path):
            raise Refused(f"disk '{disk.name}': {source.path} belongs to the store itself; fork an "
                          "epoch instead")


def _absolute(spec: MachineSpec,
              sources: list[tuple[DiskSpec, str, blockcow.Source]]) -> MachineSpec:
    def path(text: str | None) -> str | None:
        return str(Path(text).resolve()) if text else None

    return replace(spec, kernel=path(spec.kernel), initrd=path(spec.initrd),
                   disks=tuple(replace(disk, file=str(source.path.resolve()),
                                       format=source.format, backend=backend)
                               for disk, backend, source in sources))


def _accelerator(store: StoreFiles, spec: MachineSpec, qemu: binary.Qemu) -> str:
    if spec.accel == "tcg":
        return "tcg"
    refusal = _kvm_refusal(store, qemu)
    if refusal is None:
        return "kvm"
    if spec.accel == "kvm":
        raise Refused(f"KVM does not work here: {refusal}; use --accel tcg")
    return "tcg"


def _kvm_refusal(store: StoreFiles, qemu: binary.Qemu) -> str | None:
    """The probe's outcome, remembered until the host boots anew or QEMU changes: where KVM does
    not work it takes its full time limit to say so."""
    memory = store.path / "kvm-probe.json"
    key = [boot_id(), qemu.path, qemu.version, os.access("/dev/kvm", os.R_OK | os.W_OK)]
    try:
        known = json.loads(memory.read_text())
        if known["key"] == key:
            return None if known["refusal"] is None else str(known["refusal"])
    except (FileNotFoundError, ValueError, KeyError):
        pass  # not probed yet
    refusal = binary.kvm_refusal(qemu)
    write_file(memory, json.dumps({"key": key, "refusal": refusal}).encode())
    return refusal


def undo_add(store: StoreFiles, record: JournalRecord) -> None:
    """Remove what an unfinished ``add`` made."""
    if store.catalog.machine_by_id(record.plan["machine"]) is None:
        for backend, layer_id in record.plan["layers"]:
            for file in store.backend(backend).files(layer_id):
                file.unlink(missing_ok=True)
        remove_tree(store.machine_dir(record.plan["machine"]))
    with store.catalog.transaction():
        store.catalog.end(record.id)


def pull_plug(store: StoreFiles, machine: MachineRecord) -> None:
    """End the hypervisor's process at once, whatever it is in the middle of."""
    instance = store.catalog.instance_of(machine.id)
    if instance is not None:
        launch.end_processes(store, instance.id)


def stop(store: StoreFiles, machine: MachineRecord, *, kill: bool = False,
         limit: float = STOP_LIMIT) -> None:
    """Power a machine off: by its guest agent or ACPI, or at once with ``kill``.

    Raises Refused if it is off, Failed if the guest did not go within ``limit`` seconds.
    """
    found = state(store, machine)
    if found.instance is None:
        raise Refused(f"machine '{machine.name}' is off already")
    if found.alive and found.word != "off" and not kill:
        _power_down(store, machine, limit)
    put_off(store, machine)


def _power_down(store: StoreFiles, machine: MachineRecord, limit: float) -> None:
    instance = store.catalog.instance_of(machine.id)
    if instance is None:
        return
    with open_monitor(store, instance) as monitor:
        events = monitor.listen("SHUTDOWN")
        try:
            if monitor.status() == "paused":
                monitor.execute("cont")  # a paused guest cannot shut itself down
            try:
                with agent.Agent(store.instance_dir(instance.id) / AGENT_SOCKET, 5.0) as guest:
                    guest.shutdown()
            except (agent.AgentSilent, OSError):
                monitor.execute("system_powerdown")
            try:
                monitor.wait_event(events, limit)
                # The event comes before QEMU has flushed the disks; its next answer after that.
                monitor.status()
            except TimeoutError:
                raise Failed(f"the guest of '{machine.name}' did not power off within "
                             f"{limit:.0f} s; 'epochs stop --kill {machine.name}' pulls the plug"
                             ) from None
        except HypervisorDied:
            if instance.process.alive():
                raise
            # else gone is what was asked for
        finally:
            monitor.forget(events)


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
    with store.shared():
        put_off(store, machine)
    gone = store.catalog.epochs_of(machine.id) if with_epochs else []
    with store.exclusive():
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
    store.forget_machine_lock(machine.id)
    return Removal(machine.name, gone)


def describe(store: StoreFiles, machine: MachineRecord) -> dict[str, Any]:
    """A machine as plain data for ``list``, ``status`` and --json (docs/json.md)."""
    found = state(store, machine)
    instance = found.instance
    return {
        "name": machine.name, "id": machine.id, "state": found.word, "detail": found.detail,
        "head": machine.head, "epochs": len(store.catalog.epochs_of(machine.id)),
        "memory": machine.spec.memory,
        "cpus": machine.spec.cpus, "accelerator": machine.accel,
        "machine_type": machine.machine_type, "net": machine.spec.net, "vga": machine.spec.vga,
        "pid": instance.process.pid if instance and found.alive else None,
        "qemu": instance.compatibility["qemu"] if instance else None,
        "started": instance.started if instance else None,
        "created": machine.created,
        "console_log": str(store.console_log(machine.id)),
        "disks": [{"name": disk.name, "backend": disk.backend,
                   "chain": len(store.catalog.chain(disk.active or disk.base))}
                  for disk in store.catalog.disks(machine.id)],
    }
