"""The hypervisor of a machine as it is now: alive, dead, paused, powered off."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from epochs.catalog import InstanceRecord, MachineRecord
from epochs.errors import Refused
from epochs.hypervisor import DIED, OFF, PAUSED, RUNNING, SUSPENDED, State, hypervisor
from epochs.store import StoreFiles


def state(store: StoreFiles, machine: MachineRecord) -> State:
    """What the machine's hypervisor says now."""
    return _state(store, machine, store.catalog.instance_of(machine.id))


@contextmanager
def asked(store: StoreFiles, machine: MachineRecord) -> Iterator[Future[State]]:
    """The same, asked beside what the caller does until it needs the answer."""
    instance = store.catalog.instance_of(machine.id)  # a connection of SQLite stays in its thread
    with ThreadPoolExecutor(1, "epochs-ask") as beside:
        yield beside.submit(_state, store, machine, instance)


def _state(store: StoreFiles, machine: MachineRecord, instance: InstanceRecord | None) -> State:
    if instance is None:
        return State(OFF)
    return hypervisor(machine.spec).state(store, machine, instance)


def require_live(store: StoreFiles, machine: MachineRecord) -> InstanceRecord:
    """The instance of a machine that runs or is paused; Refused with the reason otherwise."""
    found = state(store, machine)
    if found.instance is not None and found.word in (RUNNING, PAUSED):
        return found.instance
    if found.word == DIED:
        raise Refused(f"machine '{machine.name}' has died ({found.detail}); "
                      f"start it with 'epochs start {machine.name}' or roll it back")
    if found.word == OFF:
        raise Refused(f"machine '{machine.name}' is off; start it with "
                      f"'epochs start {machine.name}'")
    if found.word == SUSPENDED:
        raise Refused(f"machine '{machine.name}' is suspended: {found.detail}")
    raise Refused(f"machine '{machine.name}' is stuck ({found.word}); mend the cause "
                  f"(a full disk?), then 'epochs start {machine.name}' lets it go on")
