"""Fix-ups after a rollback or forks: all guests at once, each through its hypervisor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from epochs.catalog import InstanceRecord, MachineRecord
from epochs.fixup import Fixup, Wishes
from epochs.hypervisor import RUNNING, hypervisor
from epochs.protocol.instances import state
from epochs.store import StoreFiles

AT_ONCE = 16


def fix_up(store: StoreFiles, machines: list[MachineRecord], event: str, epoch: str,
           wishes: Wishes) -> list[Fixup]:
    """Tell the guests of ``machines`` that they go on from ``epoch``; what each was told."""
    found = [state(store, machine) for machine in machines]

    def one(machine: MachineRecord, word: str, instance: InstanceRecord | None) -> Fixup:
        if word != RUNNING or instance is None:
            return Fixup.nothing(machine.name, f"the guest is {word}", wishes)
        return hypervisor(machine.spec).fix_up(store, machine, instance, event, epoch, wishes)

    jobs = [(machine, now.word, now.instance)
            for machine, now in zip(machines, found, strict=True)]
    if len(jobs) == 1:
        return [one(*jobs[0])]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda job: one(*job), jobs))
