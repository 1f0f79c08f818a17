"""Standby instances: complete and held ahead of need, so that rollbacks and forks only switch.

A standby is a machine that nobody sees, with an instance and active layers like any other: what
asks what is needed finds it, and a fork only gives it a name. It goes with its epoch, which may be
deleted at any time. Who takes one holds its machine lock; whoever cannot get that leaves it alone.

How many are wanted is recorded (:func:`wish`). They are made by :func:`fill`, by one command at a
time; :func:`refill` has that done by a process in the background.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import memsave
from blockcow import BlockError
from epochs import locks, points
from epochs.catalog import (
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    JournalRecord,
    MachineRecord,
    StandbyRecord,
    StandbyWish,
)
from epochs.durable import remove_tree
from epochs.errors import EpochsError, NotFound, Refused
from epochs.hypervisor import Ready, Target, hypervisor, hypervisor_named
from epochs.processes import host_memory, private_bytes
from epochs.protocol import launch, upkeep, verify
from epochs.protocol.journal import operation
from epochs.store import StoreFiles, new_id

LOCK = "standbys"  # who makes some
LOG = "standbys.log"
SHARE = 4  # all standbys together may have one in so many bytes of the host's memory
MOST = 64  # of one kind

_fillers: list[subprocess.Popen[bytes]] = []  # reaped when the next one is started


# -- what is wanted -------------------------------------------------------------------------------
def wish(store: StoreFiles, epoch: EpochRecord, count: int, *, owner: MachineRecord | None,
         same_generation: bool) -> None:
    """Have so many standbys of an epoch from now on, for rollbacks of ``owner`` or, None, for
    forks; 0: none. Refused where there can be none."""
    if not 0 <= count <= MOST:
        raise Refused(f"there can be 0 to {MOST} standbys of a kind, not {count}")
    with store.shared():
        epoch = store.catalog.epoch(epoch.id)  # both may just have been removed
        owner = store.catalog.machine(owner.name) if owner else None
        if count:
            _refuse(store, epoch, owner)
        with store.catalog.transaction():
            store.catalog.put_standby_wish(StandbyWish(
                epoch.id, owner.id if owner else None, same_generation, count, None))
    drop_unwanted(store)


def _refuse(store: StoreFiles, epoch: EpochRecord, owner: MachineRecord | None) -> None:
    if not hypervisor(epoch.spec).has_standbys:
        raise Refused(f"epoch {epoch.id[:12]} is of a {epoch.spec.hypervisor} domain, which has no "
                      "standby instances")
    frozen = store.catalog.epoch_layers(epoch.id)
    for disk, layer in frozen.items():
        backend = store.catalog.layer(layer).backend
        if store.backend(backend).takes_over:
            raise Refused(f"disk '{disk}' has one place only ({backend}), so epoch "
                          f"{epoch.id[:12]} can have no standby instances")
    if owner is not None:
        launch.check_same_disks(store, owner, store.catalog.disks(owner.id), epoch)


def missing(store: StoreFiles) -> list[StandbyWish]:
    """Wishes that are not fulfilled, one entry for each standby that is missing. A machine that is
    off gets none."""
    there = [one for one in store.catalog.standbys() if _instance(store, one) is not None]
    return [wanted for wanted in store.catalog.standby_wishes()
            if wanted.owner is None or store.catalog.instance_of(wanted.owner) is not None
            for _ in range(wanted.count - sum(map(wanted.wants, there)))]


def _instance(store: StoreFiles, standby: StandbyRecord) -> InstanceRecord | None:
    """Its instance, if that lives."""
    instance = store.catalog.instance_of(standby.machine)
    return instance if instance is not None and instance.process.alive() else None


# -- making ---------------------------------------------------------------------------------------
def refill(store: StoreFiles) -> None:
    """Have a process in the background make what is missing; it ends when it has. Why it could not
    is noted in the wish."""
    if not missing(store):
        return
    _fillers[:] = [child for child in _fillers if child.poll() is None]
    try:
        with open(store.path / LOG, "wb", opener=_private) as log:
            _fillers.append(subprocess.Popen(
                [sys.executable, "-P", "-m", "epochs", "--store", str(store.path), "standby",
                 "--fill"], cwd=store.path, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True))
    except OSError as error:  # what was asked for is done
        store.notice(f"standby instances are not made again: {error}; 'epochs standby EPOCH' does")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def fill(store: StoreFiles, *, wait: bool) -> None:
    """Make what is missing and drop what is not wanted or has died. If somebody is at it: ``wait``
    for that, or leave it to them. What cannot be made is noted in its wish."""
    path = store.path / "locks" / LOCK
    if wait:
        with locks.hold(path, "standby instances", notice=store.notice):
            if not _fill(store):
                return
    while missing(store):  # asked again when the lock is free: who found it held relies on that
        with locks.attempt(path) as got:
            if not got or not _fill(store):
                return


def _fill(store: StoreFiles) -> bool:
    """Whether nothing went wrong."""
    drop_unwanted(store)
    failed: list[StandbyWish] = []
    while left := [one for one in missing(store) if not any(_same(one, f) for f in failed)]:
        wanted = left[0]
        trouble = None
        try:
            _make(store, wanted)
        except (EpochsError, BlockError, memsave.errors.MemsaveError, OSError) as error:
            trouble = str(error)
            failed.append(wanted)
        with store.catalog.transaction():
            if any(_same(one, wanted) for one in store.catalog.standby_wishes()):
                store.catalog.put_standby_wish(replace(wanted, trouble=trouble))
    return not failed


def _same(one: StandbyWish, other: StandbyWish) -> bool:
    return replace(one, trouble=None) == replace(other, trouble=None)


def _make(store: StoreFiles, wanted: StandbyWish) -> None:
    """One more standby."""
    with store.shared():
        try:
            epoch = store.catalog.epoch(wanted.epoch)
        except NotFound:
            return  # deleted meanwhile, and the wish with it
        _refuse_without_memory(store)
        verify.before_use(store, epoch)
        machine, shown, disks = _machine(store, epoch, wanted)
        target = launch.new_target(store, machine.id, disks, cold=False)
        plan = {"targets": [target.to_plan()], "hypervisor": epoch.spec.hypervisor,
                "backends": {disk.name: disk.backend for disk in disks}, "owner": wanted.owner}
        with operation(store, "standby", None, plan, undo) as under_way:
            points.hit("standby.intended")
            with launch.launch(store, shown, disks, target, epoch, fork=wanted.owner is None,
                               same_generation=wanted.same_generation) as ready:
                points.hit("standby.launched")
                with store.catalog.transaction():
                    _refuse_unwanted(store, wanted)
                    _record(store, machine, disks, ready, wanted)
                    under_way.end()
                points.hit("standby.recorded")


def _machine(store: StoreFiles, epoch: EpochRecord, wanted: StandbyWish) -> (
        tuple[MachineRecord, MachineRecord, list[DiskRecord]]):
    """The machine that nobody sees, the one whose console and network its instance is to have, and
    its disks."""
    hidden, now = new_id(), time.time()
    name = f".standby-{hidden}"
    if wanted.owner is not None:
        owner = store.catalog.machine_by_id(wanted.owner)
        if owner is None:
            raise Refused("the standby instance is not wanted any more")
        machine = replace(owner, id=hidden, name=name, created=now, head=epoch.id)
        return machine, owner, [replace(disk, active=None)
                                for disk in store.catalog.disks(owner.id)]
    machine = hypervisor(epoch.spec).forked(
        MachineRecord(hidden, name, replace(epoch.spec, publish=()), now, "", "", "", epoch.id),
        epoch, store.catalog.machine_by_id(epoch.machine))
    return machine, machine, launch.disks_of(store, epoch)


def _record(store: StoreFiles, machine: MachineRecord, disks: list[DiskRecord], ready: Ready,
            wanted: StandbyWish) -> None:
    catalog = store.catalog
    catalog.add_machine(machine, disks)
    for disk, layer in ready.layers.items():
        catalog.put_layer(layer)
        catalog.set_active(machine.id, disk, layer.id)
    catalog.put_instance(replace(ready.record, machine=machine.id), ready.packs)
    catalog.add_standby(StandbyRecord(machine.id, wanted.epoch, wanted.owner,
                                      wanted.same_generation))
    store.moved_on((layer.backend, layer.id) for layer in ready.layers.values())


def _refuse_unwanted(store: StoreFiles, wanted: StandbyWish) -> None:
    if not any(_same(one, wanted) for one in missing(store)):
        raise Refused("the standby instance is not wanted any more")


def memory(store: StoreFiles) -> int:
    """Bytes that the standbys do not share with others."""
    return sum(private_bytes(instance.process.pid) for one in store.catalog.standbys()
               if (instance := _instance(store, one)) is not None)


def _refuse_without_memory(store: StoreFiles) -> None:
    total, free = host_memory()
    used = memory(store)
    if used > total // SHARE:
        raise Refused(f"the standby instances have {used / 2**20:.0f} MiB, as much as they may")
    if free < total // (2 * SHARE):
        raise Refused(f"the host has only {free / 2**20:.0f} MiB of memory left")


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Remove what was launched; once it was recorded there is no journal row any more."""
    driver = hypervisor_named(record.plan["hypervisor"])
    targets = [Target.from_plan(plan) for plan in record.plan["targets"]]
    for target in targets:
        launch.undo(store, driver, target, record.plan["backends"])
        driver.released(store, target.machine)
        remove_tree(store.machine_dir(target.machine))
        store.forget_machine_lock(target.machine)
    with store.catalog.transaction():
        store.moved_on((record.plan["backends"][disk], layer) for target in targets
                       for disk, layer in target.layers.items())
        store.catalog.end(record.id)


# -- taking ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spare:
    """A standby that the caller has: its lock is held, its hypervisor answers. ``machine`` is what
    it is to be, or to be the instance of."""

    machine: MachineRecord
    ready: Ready
    target: Target


Becoming = Callable[[MachineRecord], MachineRecord]
"""From the machine that nobody sees to what it is to be."""


@contextmanager
def taken(store: StoreFiles, epoch: str, becoming: list[Becoming], *,
          owner: MachineRecord | None, same_generation: bool) -> Iterator[list[Spare]]:
    """Up to ``len(becoming)`` standbys of an epoch, for rollbacks of ``owner``, or, None, forks.
    They are the caller's until the end of the block; what it has not switched to until then stays a
    standby. The caller holds the store's lock, shared."""
    wanted = StandbyWish(epoch, owner.id if owner else None, same_generation, 1, None)
    with ExitStack() as stack:
        spares: list[Spare] = []
        for standby in filter(wanted.wants, store.catalog.standbys()):
            if len(spares) == len(becoming):
                break
            if stack.enter_context(store.try_operation_lock(standby.machine, standby.machine)):
                spare = _take(store, standby, becoming[len(spares)])
                if spare is not None:
                    stack.callback(spare.ready.close)
                    spares.append(spare)
        yield spares


def _take(store: StoreFiles, standby: StandbyRecord, becoming: Becoming) -> Spare | None:
    """With its lock held; None if it is not there any more, or has died (:func:`refill` drops it
    then)."""
    catalog = store.catalog
    if standby not in catalog.standbys():
        _forget_lock(store, standby)
        return None  # another command was first
    hidden, instance = catalog.machine_by_id(standby.machine), _instance(store, standby)
    if hidden is None or instance is None:
        return None
    machine = becoming(hidden)
    layers = {disk.name: catalog.layer(disk.active) for disk in catalog.disks(hidden.id)
              if disk.active is not None}
    record = replace(instance, machine=machine.id, started=time.time())
    try:
        ready = hypervisor(machine.spec).held(store, machine, record, layers,
                                              catalog.instance_packs(instance.id))
    except EpochsError as error:
        store.notice(f"a standby instance is of no use any more: {error}")
        hypervisor(machine.spec).end(store, instance.id)
        return None
    ready.standby = hidden.id
    return Spare(machine, ready, Target(machine.id, instance.id,
                                        {disk: layer.id for disk, layer in layers.items()}))


# -- dropping -------------------------------------------------------------------------------------
def drop_unwanted(store: StoreFiles) -> None:
    """End standbys that have died, with the host or alone, whose end was cut short, or that no wish
    wants; the newest go first."""
    if _unwanted(store):
        with store.shared():
            for one in _unwanted(store):
                drop(store, one)


def _unwanted(store: StoreFiles) -> list[StandbyRecord]:
    wishes = store.catalog.standby_wishes()
    kept: list[StandbyRecord] = []
    found: list[StandbyRecord] = []
    for one in store.catalog.standbys():
        wanted = next((w for w in wishes if w.wants(one)), None)
        keep = (wanted is not None and _instance(store, one) is not None
                and sum(map(wanted.wants, kept)) < wanted.count)
        (kept if keep else found).append(one)
    return found


def drop_of(store: StoreFiles, *, epochs: list[str] | None = None,
            owner: str | None = None) -> None:
    """End the standbys of epochs that are to be deleted (the store's lock held exclusively), or of
    a machine that is off now. Who has one of those holds it for a moment only."""
    for one in store.catalog.standbys():
        if one.epoch in (epochs or ()) or (owner is not None and one.owner == owner):
            with store.machine_lock(one.machine, "a standby instance"):
                _drop(store, one)


def drop(store: StoreFiles, standby: StandbyRecord) -> None:
    """End one, unless somebody has it. The caller holds the store's lock."""
    with store.try_operation_lock(standby.machine, standby.machine) as got:
        if got:
            _drop(store, standby)


def _drop(store: StoreFiles, standby: StandbyRecord) -> None:
    """With its lock held."""
    machine = store.catalog.machine_by_id(standby.machine)
    if machine is None or standby not in store.catalog.standbys():
        _forget_lock(store, standby)
        return
    layers = [disk.active for disk in store.catalog.disks(machine.id) if disk.active]
    launch.put_off(store, machine)
    hypervisor(machine.spec).released(store, machine.id)
    plan: dict[str, Any] = {"epochs": [], "layers": layers, "machine": machine.id}
    with operation(store, "remove", machine.id, plan, upkeep.redo_delete) as under_way:
        with store.catalog.transaction():
            store.catalog.remove_machine(machine.id)
        points.hit("standby.ended")
        upkeep.redo_delete(store, under_way.record)


def _forget_lock(store: StoreFiles, standby: StandbyRecord) -> None:
    """Looking for the lock of one that was gone made its file anew; if it has become a fork, that
    is the fork's."""
    if store.catalog.machine_by_id(standby.machine) is None:
        store.forget_machine_lock(standby.machine)


def listed(store: StoreFiles) -> list[dict[str, Any]]:
    """The wishes as plain data (docs/json.md)."""
    found = []
    for wanted in store.catalog.standby_wishes():
        owner = store.catalog.machine_by_id(wanted.owner) if wanted.owner else None
        there = [instance for one in store.catalog.standbys() if wanted.wants(one)
                 if (instance := _instance(store, one)) is not None]
        found.append({
            "epoch": wanted.epoch, "machine": owner.name if owner else None,
            "fixup": not wanted.same_generation, "count": wanted.count, "ready": len(there),
            "trouble": wanted.trouble,
            "memory": sum(private_bytes(instance.process.pid) for instance in there)})
    return found

