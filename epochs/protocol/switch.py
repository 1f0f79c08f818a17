"""Operations that put instances in place: ``start``, ``rollback`` and ``fork``.

All three launch instances aside, paused and complete, and then switch in one transaction. Before
that transaction ``recover`` removes what was launched; after it, it finishes the switch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from blockcow import LayerDamaged
from epochs import points
from epochs.catalog import (
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    JournalRecord,
    MachineRecord,
)
from epochs.durable import make_directory, remove_tree
from epochs.errors import HypervisorDied, Refused
from epochs.hypervisor import (
    OFF,
    PAUSED,
    RUNNING,
    Laps,
    Progress,
    Ready,
    State,
    Target,
    hypervisor,
    hypervisor_named,
    no_progress,
)
from epochs.protocol import create as creation
from epochs.protocol import launch, standby, upkeep, verify
from epochs.protocol.instances import asked, state
from epochs.protocol.journal import operation
from epochs.spec import check_name, check_publish
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
        hypervisor(machine.spec).go_on(store, found.instance)
        return "resumed"
    with store.shared(), store.publishing(machine.spec.publish):
        disks = store.catalog.disks(machine.id)
        target = launch.new_target(store, machine.id, disks, cold=True)
        if found.instance is not None:
            # The old process (dead, or a powered-off guest's) still has the disks open.
            launch.put_off(store, machine)
        plan = _plan([target], disks, kind=machine.spec.hypervisor, running=True,
                     kept=[disk.active for disk in disks if disk.active])
        for disk in disks:  # what cannot be undone now is better not begun
            store.backend(disk.backend).check(store.catalog.layer(disk.base), full=False)
        with operation(store, "start", machine.id, plan, undo) as under_way:
            points.hit("start.intended")
            ready = launch.launch(store, machine, disks, target, None)
            with ready:
                points.hit("start.launched")
                with store.catalog.transaction():
                    _put(store, [ready])
                    under_way.phase("switched")
                points.hit("start.committed")
                hypervisor(machine.spec).alone(store, machine, target.instance)
                ready.go_on()
            under_way.end()
    return "started"


def rollback(store: StoreFiles, machine: MachineRecord, epoch: EpochRecord, *, keep: bool,
             same_generation: bool = False, running: bool | None = None,
             progress: Progress = no_progress) -> dict[str, Any]:
    """Put the machine back to ``epoch``; ``keep`` first seals its present state as an epoch.
    ``same_generation``: its guest is not to notice. ``running`` afterwards, or paused; None: as it
    is now.

    The caller holds the machine's lock. Returns {"kept": id or None, "seconds": …, "steps": …},
    the steps with "take" if there was a standby instance.
    """
    began, clock = time.perf_counter(), Laps()
    disks = store.catalog.disks(machine.id)
    needed = keep or running is None or _in_one_place(store, disks)
    with asked(store, machine) if needed else nullcontext() as found, store.shared():
        if keep and found is not None:
            _refuse_unsealed(machine, found.result())
        epoch = store.catalog.epoch(epoch.id)  # it may just have been deleted
        verify.before_use(store, epoch)
        launch.check_same_disks(store, machine, disks, epoch)
        kept = None
        if keep:
            kept = creation.create(store, machine, progress=progress,
                                   message=f"before rollback to {epoch.id[:12]}").id
            machine = store.catalog.machine(machine.name)
            disks = store.catalog.disks(machine.id)
            began, clock = time.perf_counter(), Laps()
        clock.lap("check")
        old = store.catalog.instance_of(machine.id)
        with store.publishing(machine.spec.publish if old is None else ()), \
                standby.taken(store, epoch.id, [lambda _: machine], owner=machine,
                              same_generation=same_generation) as spares:
            target = (spares[0].target if spares
                      else launch.new_target(store, machine.id, disks, cold=False))
            ran = _in_one_place(store, disks) and found is not None and _runs(found.result())
            plan = _plan([target], disks, kind=machine.spec.hypervisor, running=running, ran=ran,
                         spares=spares, old=old.id if old else None,
                         old_layers=[disk.active for disk in disks if disk.active])
            if spares:
                clock.lap("take")
            # A spare is there already: until the switch there is nothing to undo.
            with operation(store, "rollback", machine.id, plan, undo,
                           early=not spares) as under_way:
                points.hit("rollback.intended")
                ready = (spares[0].ready if spares
                         else launch.launch(store, machine, disks, target, epoch,
                                            same_generation=same_generation))
                clock.rest(ready.timings)
                with ready:
                    points.hit("rollback.prepared")
                    if running is None:
                        running = found is None or found.result().word != PAUSED
                    with _ready_to_take_over(store, machine, ready, disks, old, ran), \
                            store.catalog.transaction():
                        _put(store, [ready])
                        store.catalog.set_head(machine.id, epoch.id)
                        under_way.phase("switched", running=running)
                    points.hit("rollback.switched")
                    clock.lap("switch")
                    _replace(store, machine, disks, old, target)
                    clock.lap("replace")
                    if running:
                        ready.go_on()
                    clock.lap("resume")
                    seconds = clock.last - began
                    if old is not None:
                        hypervisor(machine.spec).end(store, old.id)
                points.hit("rollback.resumed")
                _finish(store, under_way.record)
    return {"kept": kept, "seconds": seconds, "steps": clock.steps}


def _refuse_unsealed(machine: MachineRecord, found: State) -> None:
    """Refused if the present state cannot be kept."""
    if found.instance is None or found.word not in (RUNNING, PAUSED):
        why = "is off" if found.word == OFF else f"is not in a state to be sealed ({found.word})"
        raise Refused(f"machine '{machine.name}' {why}, so its present state cannot be kept as "
                      "an epoch; use --discard to give it up")


def _runs(found: State) -> bool:
    """Whether the guest runs, or is held by something that a user did not do."""
    return found.alive and found.word != PAUSED


def _in_one_place(store: StoreFiles, disks: list[DiskRecord]) -> bool:
    """Whether a disk has one place only."""
    return any(store.backend(disk.backend).takes_over for disk in disks)


def _replace(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord],
             old: InstanceRecord | None, target: Target) -> None:
    """The old guest runs no more, and the new instance has what there is once. Where the disks
    have one place only, the old one is gone altogether before."""
    driver = hypervisor(machine.spec)
    if old is not None:
        if _in_one_place(store, disks):
            driver.end(store, old.id)
        else:
            driver.strike(store, machine, old)
    points.hit("rollback.old-gone")
    _take_over(store, [target])
    driver.alone(store, machine, target.instance)
    points.hit("rollback.taken-over")


def fork(store: StoreFiles, epoch: EpochRecord, names: list[str], *,
         publish: tuple[str, ...] = (), paused: bool = False,
         same_generation: bool = False) -> list[MachineRecord]:
    """New machines from an epoch, all or none; running unless ``paused``. ``same_generation``:
    their guests are not to notice. ``publish``: ports of the host that lead to the only one; those
    of the source stay the source's."""
    spec = replace(epoch.spec, publish=publish)
    check_publish(spec)
    if publish and len(names) > 1:
        raise Refused("one port cannot lead to several machines; publish it with one fork")
    for name in names:
        check_name(name)
        if store.catalog.find_machine(name) is not None or names.count(name) > 1:
            raise Refused(f"there is a machine '{name}' already; choose another name")
    with store.shared(), store.publishing(publish):
        epoch = store.catalog.epoch(epoch.id)  # it may just have been deleted
        verify.before_use(store, epoch)
        _refuse_forks(store, epoch)
        disks = launch.disks_of(store, epoch)
        source = store.catalog.machine_by_id(epoch.machine)
        new = [MachineRecord(new_id(), name, spec, time.time(), "", "", "", epoch.id)
               for name in names]
        forked = [hypervisor(epoch.spec).forked(machine, epoch, source) for machine in new]
        # Only a launch looks whether ports are free, and a standby must not have any.
        becoming = [] if publish else [_called(machine) for machine in forked]
        with standby.taken(store, epoch.id, becoming, owner=None,
                           same_generation=same_generation) as spares:
            machines = [*(spare.machine for spare in spares), *forked[len(spares):]]
            _fork(store, epoch, machines, disks, spares, paused, same_generation)
    return machines


def _called(fork: MachineRecord) -> standby.Becoming:
    """A standby becomes a fork: it keeps its id, which is that of its network and console."""
    return lambda hidden: replace(fork, id=hidden.id)


def _fork(store: StoreFiles, epoch: EpochRecord, machines: list[MachineRecord],
          disks: list[DiskRecord], spares: list[standby.Spare], paused: bool,
          same_generation: bool) -> None:
    """Launch those of ``machines`` that are not spares, the first ones, and switch."""
    driver = hypervisor(epoch.spec)
    fresh = machines[len(spares):]
    targets = [launch.new_target(store, m.id, disks, cold=False) for m in fresh]
    plan = _plan([*(spare.target for spare in spares), *targets], disks,
                 kind=epoch.spec.hypervisor, running=not paused, spares=spares)
    with operation(store, "fork", None, plan, undo) as under_way:
        points.hit("fork.intended")
        for machine in machines:
            make_directory(store.machine_dir(machine.id))
        launched = _launch_all(store, fresh, disks, targets, epoch, same_generation)
        ready = [*(spare.ready for spare in spares), *launched]
        try:
            points.hit("fork.prepared")
            with store.catalog.transaction():
                for spare in spares:
                    store.catalog.reveal(spare.machine)
                for machine in fresh:
                    store.catalog.add_machine(machine, disks)
                _put(store, ready)
                under_way.phase("switched")
            points.hit("fork.committed")
            for machine, one in zip(machines, ready, strict=True):
                driver.alone(store, machine, one.record.id)
            if not paused:
                _go_on_at_once(ready)
            points.hit("fork.resumed")
        finally:  # those of the spares, too: undoing a switch connects to all
            for one in ready:
                one.close()
        under_way.end()


def _go_on_at_once(ready: list[Ready]) -> None:
    """Guests that go on are busy at first; none is to keep another's hypervisor from answering."""
    if len(ready) == 1:
        ready[0].go_on()
        return
    with ThreadPoolExecutor(len(ready), "epochs-go-on") as pool:
        under_way = [pool.submit(one.go_on) for one in ready]
    for one in under_way:
        one.result()


def _refuse_forks(store: StoreFiles, epoch: EpochRecord) -> None:
    for disk, layer_id in store.catalog.epoch_layers(epoch.id).items():
        layer = store.catalog.layer(layer_id)
        reason = store.backend(layer.backend).fork_refusal(layer)
        if reason is not None:
            raise Refused(f"epoch {epoch.id[:12]} cannot be forked because of disk '{disk}': "
                          + reason)


def _launch_all(store: StoreFiles, machines: list[MachineRecord], disks: list[DiskRecord],
                targets: list[Target], epoch: EpochRecord,
                same_generation: bool) -> list[Ready]:
    """Launch several instances side by side; on failure the ready ones are closed again."""
    def one(machine: MachineRecord, target: Target) -> Ready:
        own = StoreFiles(store.path, store.notice)  # SQLite connections stay in their thread
        try:
            return launch.launch(own, machine, disks, target, epoch, fork=True,
                                 same_generation=same_generation)
        finally:
            own.close()

    if not machines:
        return []
    if len(machines) == 1:
        return [launch.launch(store, machines[0], disks, targets[0], epoch, fork=True,
                              same_generation=same_generation)]
    with ThreadPoolExecutor(SPAWNERS) as pool:
        futures = [pool.submit(one, *pair) for pair in zip(machines, targets, strict=True)]
    failures = [error for future in futures if (error := future.exception())]
    if failures:
        for future in futures:
            if future.exception() is None:
                future.result().close()
        raise failures[0]
    return [future.result() for future in futures]


def _plan(targets: Iterable[Target], disks: list[DiskRecord], *, kind: str, running: bool | None,
          ran: bool = False, spares: Iterable[standby.Spare] = (), old: str | None = None,
          old_layers: Iterable[str] = (), kept: Iterable[str] = ()) -> dict[str, Any]:
    """``kept``: active layers that a cold start goes on with. ``running``: None if only the switch
    will say. ``ran``: the old guest is held before the switch, and goes on if that does not come.
    ``spares`` are noted by instance, with the machine that nobody sees: until the switch they are
    the standby's own."""
    return {"targets": [target.to_plan() for target in targets], "hypervisor": kind,
            "backends": {disk.name: disk.backend for disk in disks}, "running": running,
            "ran": ran, "old": old, "old_layers": list(old_layers), "kept": list(kept),
            "spares": {spare.target.instance: spare.ready.standby for spare in spares}}


def _put(store: StoreFiles, instances: list[Ready]) -> None:
    """Record ready instances with their layers (inside the switching transaction)."""
    for ready in instances:
        if ready.standby not in (None, ready.record.machine):
            store.catalog.remove_machine(ready.standby)
        for disk, layer in ready.layers.items():
            store.catalog.put_layer(layer)
            store.catalog.set_active(ready.record.machine, disk, layer.id)
        store.catalog.put_instance(ready.record, ready.packs)
    store.moved_on((layer.backend, layer.id) for ready in instances if ready.standby is None
                   for layer in ready.layers.values())


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Before the switch: remove what was launched. After it: finish the switch."""
    targets = [Target.from_plan(plan) for plan in record.plan["targets"]]
    driver = hypervisor_named(record.plan["hypervisor"])
    if record.phase == "switched":
        if record.plan["old"]:
            driver.end(store, record.plan["old"])
        points.hit("undo-switch.processes-gone")
        try:
            _take_over(store, targets)
        except LayerDamaged as error:
            _give_up(store, targets, error)
        for target in targets:
            _alone(store, target.machine, target.instance)
        if record.plan["running"]:
            for target in targets:
                _go_on(store, target)
        _finish(store, record)
        return
    if record.plan["old"] and record.plan["ran"]:
        _let_go_on(store, record.machine or "", record.plan["old"])
    targets = [target for target in targets if target.instance not in record.plan["spares"]]
    for target in targets:
        launch.undo(store, driver, target, record.plan["backends"])
        if store.catalog.instance_of(target.machine) is None:
            driver.released(store, target.machine)
        if store.catalog.machine_by_id(target.machine) is None:
            remove_tree(store.machine_dir(target.machine))
    if record.plan["old"]:
        _alone(store, record.machine or "", record.plan["old"])
    upkeep.deactivate(store, record.plan["kept"])
    points.hit("undo-switch.files-gone")
    with store.catalog.transaction():
        store.moved_on((record.plan["backends"][disk], layer) for target in targets
                       for disk, layer in target.layers.items())
        store.catalog.end(record.id)


def _take_over(store: StoreFiles, targets: Iterable[Target]) -> None:
    """The old hypervisors are gone, the new ones' guests have not run yet: let backends that have
    only one place for a machine's disk go there."""
    for target in targets:
        for layer_id in target.layers.values():
            if store.catalog.find_layer(layer_id) is None:
                continue  # replaced since
            chain = store.catalog.chain(layer_id)
            taken = store.backend(chain[0].backend).take_over(chain)
            if taken != chain[0]:
                with store.catalog.transaction():
                    store.catalog.put_layer(taken)


@contextmanager
def _ready_to_take_over(store: StoreFiles, machine: MachineRecord, ready: Ready,
                        disks: list[DiskRecord], old: InstanceRecord | None,
                        ran: bool) -> Iterator[None]:
    """Where the new instance will take a disk's only place: the old guest stands still, and whether
    that can be done is looked at once more. If the switch does not come, it goes on if it
    ``ran``."""
    if not _in_one_place(store, disks):
        yield
        return
    backends = {disk.name: store.backend(disk.backend) for disk in disks}
    held = old is not None and ran and state(store, machine).alive
    if held and old is not None:
        hypervisor(machine.spec).hold(store, old)
    try:
        for name, layer in ready.layers.items():
            below = store.catalog.chain(layer.backing) if layer.backing else []
            backends[name].ready_to_take_over([layer, *below])
        yield
    except BaseException:
        if held and old is not None:
            _let_go_on(store, old.machine, old.id)
        raise


def _give_up(store: StoreFiles, targets: Iterable[Target], error: LayerDamaged) -> None:
    """What a disk was to go back to was lost after the switch, and the machine must not stay stuck:
    it is off, with its disks as they are now."""
    for target in targets:
        machine = store.catalog.machine_by_id(target.machine)
        if machine is not None:
            hypervisor(machine.spec).end(store, target.instance)
        for layer_id in target.layers.values():
            chain = store.catalog.chain(layer_id)
            if not store.backend(chain[0].backend).takes_over:
                continue  # its own place is whole: only the other disk's was lost
            with store.catalog.transaction():
                store.catalog.put_layer(replace(chain[0], backing=chain[-1].id))
        if machine is not None:
            launch.put_off(store, machine)
            store.notice(f"machine '{machine.name}' is off, and its disks may be a mixture of two "
                         f"states ({error}); roll it back to another epoch")


def _go_on(store: StoreFiles, target: Target) -> None:
    _let_go_on(store, target.machine, target.instance)


def _let_go_on(store: StoreFiles, machine_id: str, instance_id: str) -> None:
    """Let a guest go on that a command of ours holds, if that instance is still the machine's."""
    instance = store.catalog.instance_of(machine_id)
    if instance is None or instance.id != instance_id:
        return  # stopped or replaced since
    machine = store.catalog.machine_by_id(machine_id)
    if machine is None:
        return
    try:
        hypervisor(machine.spec).go_on(store, instance, only_held=True)
    except HypervisorDied:
        if state(store, machine).alive:
            raise
        # else reported as died by whatever looks at the machine next


def _alone(store: StoreFiles, machine_id: str, instance_id: str) -> None:
    """What :meth:`epochs.hypervisor.Hypervisor.alone` does, if it is still the machine's."""
    machine = store.catalog.machine_by_id(machine_id)
    instance = store.catalog.instance_of(machine_id)
    if machine is not None and instance is not None and instance.id == instance_id:
        hypervisor(machine.spec).alone(store, machine, instance_id)


def _finish(store: StoreFiles, record: JournalRecord) -> None:
    """After the switch: the old instance's directory and layers go."""
    if record.plan["old"]:
        remove_tree(store.instance_dir(record.plan["old"]))
    upkeep.deactivate(store, record.plan["old_layers"])
    upkeep.drop_layers(store, record.plan["old_layers"])
    upkeep.drop_packs(store)
    for hidden in record.plan["spares"].values():
        if store.catalog.machine_by_id(hidden) is None:  # a fork is now what nobody saw
            remove_tree(store.machine_dir(hidden))
            store.forget_machine_lock(hidden)
    with store.catalog.transaction():
        store.catalog.end(record.id)
