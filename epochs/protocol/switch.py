"""Operations that put instances in place: ``start``, ``rollback`` and ``fork``.

All three launch instances aside, paused and complete, and then switch in one transaction. Before
that transaction ``recover`` removes what was launched; after it, it finishes the switch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from epochs import points
from epochs.catalog import DiskRecord, EpochRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import HypervisorDied, Refused
from epochs.protocol import create as creation
from epochs.protocol import launch, upkeep, verify
from epochs.protocol.instances import RUNNING, open_monitor, state
from epochs.protocol.journal import operation
from epochs.protocol.launch import Ready, Target
from epochs.spec import check_name
from epochs.store import StoreFiles, new_id

SPAWNERS = 4  # instances launched at once; QEMU's start is part computing, part waiting


def start(store: StoreFiles, machine: MachineRecord) -> str:
    """Boot a machine that is off or died, or let a paused one go on; returns what was done.

    The caller holds the machine's lock.
    """
    found = state(store, machine)
    if found.word == RUNNING:
        raise Refused(f"machine '{machine.name}' is running already")
    if found.alive and found.instance is not None:
        with open_monitor(store, found.instance) as monitor:
            monitor.execute("cont")
        return "resumed"
    with store.shared():
        disks = store.catalog.disks(machine.id)
        target = launch.new_target(machine.id, disks, cold=True)
        if found.instance is not None:
            # The old process (dead, or a powered-off guest's) still has the disks open.
            put_off(store, machine)
        with operation(store, "start", machine.id, _plan([target], disks, running=True),
                       undo) as under_way:
            points.hit("start.intended")
            for disk in disks:
                layer = store.catalog.layer(disk.base)
                store.backend(disk.backend).check(layer, full=False)
            ready = launch.launch(store, machine, disks, target, None)
            with ready.monitor:
                points.hit("start.launched")
                with store.catalog.transaction():
                    _put(store, ready)
                    under_way.phase("switched")
                points.hit("start.committed")
                ready.monitor.execute("cont")
            under_way.end()
    return "started"


def rollback(store: StoreFiles, machine: MachineRecord, epoch: EpochRecord, *, keep: bool,
             progress: creation.Progress = creation.no_progress) -> dict[str, Any]:
    """Put the machine back to ``epoch``; ``keep`` first seals its present state as an epoch.

    The caller holds the machine's lock. Returns {"kept": id or None, "seconds": …, "steps": …}.
    """
    found = state(store, machine)
    if keep and not (found.instance is not None and found.word in (RUNNING, "paused")):
        why = "is off" if found.word == "off" else f"is not in a state to be sealed ({found.word})"
        raise Refused(f"machine '{machine.name}' {why}, so its present state cannot be kept as "
                      "an epoch; use --discard to give it up")
    running = found.word != "paused"
    disks = store.catalog.disks(machine.id)
    with store.shared():
        epoch = store.catalog.epoch(epoch.id)  # it may just have been deleted
        verify.before_use(store, epoch)
        _check_same_disks(store, machine, disks, epoch)
        kept = None
        if keep:
            kept = creation.create(store, machine, progress=progress,
                                   message=f"before rollback to {epoch.id[:12]}").id
            machine = store.catalog.machine(machine.name)
            disks = store.catalog.disks(machine.id)
        began = time.perf_counter()
        target = launch.new_target(machine.id, disks, cold=False)
        old = store.catalog.instance_of(machine.id)
        plan = _plan([target], disks, running=running, old=old.id if old else None,
                     old_layers=[disk.active for disk in disks if disk.active])
        with operation(store, "rollback", machine.id, plan, undo) as under_way:
            points.hit("rollback.intended")
            ready = launch.launch(store, machine, disks, target, epoch)
            with ready.monitor:
                points.hit("rollback.prepared")
                with store.catalog.transaction():
                    _put(store, ready)
                    store.catalog.set_head(machine.id, epoch.id)
                    under_way.phase("switched")
                points.hit("rollback.switched")
                if old is not None:
                    launch.end_processes(store, old.id)
                points.hit("rollback.old-gone")
                if running:
                    ready.monitor.execute("cont")
                seconds = time.perf_counter() - began
            points.hit("rollback.resumed")
            _finish(store, under_way.record)
    return {"kept": kept, "seconds": seconds, "steps": ready.timings}


def _check_same_disks(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord],
                      epoch: EpochRecord) -> None:
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


def fork(store: StoreFiles, epoch: EpochRecord, names: list[str], *,
         paused: bool = False) -> list[MachineRecord]:
    """New machines from an epoch, all or none; running unless ``paused``."""
    for name in names:
        check_name(name)
        if store.catalog.find_machine(name) is not None or names.count(name) > 1:
            raise Refused(f"there is a machine '{name}' already; choose another name")
    with store.shared():
        epoch = store.catalog.epoch(epoch.id)  # it may just have been deleted
        verify.before_use(store, epoch)
        now = time.time()
        source = store.catalog.machine_by_id(epoch.machine)
        disks = [DiskRecord(disk, store.catalog.layer(layer).backend,
                            store.catalog.chain(layer)[-1].id, None)
                 for disk, layer in store.catalog.epoch_layers(epoch.id).items()]
        machines = [
            MachineRecord(new_id(), name, epoch.spec, now, epoch.compatibility["machine_type"],
                          _mac(epoch, source), epoch.compatibility["accelerator"], epoch.id)
            for name in names]
        targets = [launch.new_target(m.id, disks, cold=False) for m in machines]
        with operation(store, "fork", None, _plan(targets, disks, running=not paused),
                       undo) as under_way:
            points.hit("fork.intended")
            for machine in machines:
                make_directory(store.machine_dir(machine.id))
            launched = _launch_all(store, machines, disks, targets, epoch)
            try:
                points.hit("fork.prepared")
                with store.catalog.transaction():
                    for machine, ready in zip(machines, launched, strict=True):
                        store.catalog.add_machine(machine, disks)
                        _put(store, ready)
                    under_way.phase("switched")
                points.hit("fork.committed")
                if not paused:
                    for ready in launched:
                        ready.monitor.execute("cont")
                points.hit("fork.resumed")
            finally:
                for ready in launched:
                    ready.monitor.close()
            under_way.end()
    return machines


def _mac(epoch: EpochRecord, source: MachineRecord | None) -> str:
    """The MAC that the epoch's memory remembers (the device list records it)."""
    for device in epoch.compatibility["devices"]:
        for option in device.split(","):
            if option.startswith("mac="):
                return str(option[4:])
    return source.mac if source else "52:54:00:00:00:00"  # a machine without network


def _launch_all(store: StoreFiles, machines: list[MachineRecord], disks: list[DiskRecord],
                targets: list[Target], epoch: EpochRecord) -> list[Ready]:
    """Launch several instances side by side; on failure the ready ones are closed again."""
    def one(machine: MachineRecord, target: Target) -> Ready:
        own = StoreFiles(store.path, store.notice)  # SQLite connections stay in their thread
        try:
            return launch.launch(own, machine, disks, target, epoch)
        finally:
            own.close()

    if len(machines) == 1:
        return [launch.launch(store, machines[0], disks, targets[0], epoch)]
    with ThreadPoolExecutor(SPAWNERS) as pool:
        futures = [pool.submit(one, *pair) for pair in zip(machines, targets, strict=True)]
    failures = [error for future in futures if (error := future.exception())]
    if failures:
        for future in futures:
            if future.exception() is None:
                future.result().monitor.close()
        raise failures[0]
    return [future.result() for future in futures]


def _plan(targets: Iterable[Target], disks: list[DiskRecord], *, running: bool,
          old: str | None = None, old_layers: Iterable[str] = ()) -> dict[str, Any]:
    return {"targets": [target.to_plan() for target in targets],
            "backends": {disk.name: disk.backend for disk in disks}, "running": running,
            "old": old, "old_layers": list(old_layers)}


def _put(store: StoreFiles, ready: Ready) -> None:
    """Record a ready instance with its layers (inside the switching transaction)."""
    for disk, layer in ready.layers.items():
        store.catalog.put_layer(layer)
        store.catalog.set_active(ready.record.machine, disk, layer.id)
    store.catalog.put_instance(ready.record, ready.packs)


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Before the switch: remove what was launched. After it: finish the switch."""
    targets = [Target.from_plan(plan) for plan in record.plan["targets"]]
    if record.phase == "switched":
        if record.plan["old"]:
            launch.end_processes(store, record.plan["old"])
        points.hit("undo-switch.processes-gone")
        if record.plan["running"]:
            for target in targets:
                _go_on(store, target)
        _finish(store, record)
        return
    for target in targets:
        launch.undo(store, target, record.plan["backends"])
        if store.catalog.machine_by_id(target.machine) is None:
            remove_tree(store.machine_dir(target.machine))
    points.hit("undo-switch.files-gone")
    with store.catalog.transaction():
        store.catalog.end(record.id)


def _go_on(store: StoreFiles, target: Target) -> None:
    instance = store.catalog.instance_of(target.machine)
    if instance is None or instance.id != target.instance:
        return  # stopped or replaced since
    try:
        with open_monitor(store, instance) as monitor:
            if monitor.status() in ("paused", "prelaunch", "postmigrate"):
                monitor.execute("cont")
    except HypervisorDied:
        if instance.process.alive():
            raise
        # else reported as died by whatever looks at the machine next


def _finish(store: StoreFiles, record: JournalRecord) -> None:
    """After the switch: the old instance's directory and layers go."""
    if record.plan["old"]:
        remove_tree(store.instance_dir(record.plan["old"]))
    upkeep.drop_layers(store, record.plan["old_layers"])
    upkeep.drop_packs(store)
    with store.catalog.transaction():
        store.catalog.end(record.id)


def put_off(store: StoreFiles, machine: MachineRecord) -> None:
    """End a machine's hypervisor at once and forget the instance (its disks stay)."""
    instance = store.catalog.instance_of(machine.id)
    if instance is None:
        return
    launch.end_processes(store, instance.id)
    with store.catalog.transaction():
        store.catalog.remove_instance(instance.id)
    remove_tree(store.instance_dir(instance.id))
    upkeep.drop_packs(store)
