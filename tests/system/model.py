"""Random operations on machines and epochs, and what every nonce and every disk must then be."""

from __future__ import annotations

import random
from pathlib import Path

from epochs import Machine, Store
from epochs.errors import Refused
from epochs.spec import XEN

from .guest import check_disks, ctl, wait_console, wait_witness

MAX_MACHINES = 3
MAX_EPOCHS = 24


class Model:
    """What every machine's and epoch's nonce must be, and the operations on both."""

    def __init__(self, store: Store, first: Machine, random_: random.Random, *,
                 forks: bool = True, boot_limit: float = 60.0, machines: int = MAX_MACHINES,
                 epochs: int = MAX_EPOCHS) -> None:
        """``forks``: whether the backend can; else it must refuse. ``machines``, ``epochs``: how
        many there are at most at a time."""
        self.store = store
        self.random = random_
        self.can_fork, self.boot_limit = forks, boot_limit
        self.most_machines, self.most_epochs = machines, epochs
        self.on_xen = first.record.spec.hypervisor == XEN  # which has no standbys
        self.machines: dict[str, Machine] = {first.name: first}
        self.nonce: dict[str, str] = {}  # of machines, as their RAM must hold it
        self.sealed: dict[str, str] = {}  # of epochs
        self.forks = 0
        self.set_nonce(first)

    def set_nonce(self, machine: Machine) -> None:
        word = f"n{self.random.randrange(10**9)}"
        ctl(machine, "nonce", "set", word)
        self.nonce[machine.name] = word

    def pick(self) -> Machine:
        return self.machines[self.random.choice(sorted(self.machines))]

    def check(self, machine: Machine) -> None:
        found = ctl(machine, "nonce", "get")
        assert found == self.nonce[machine.name], (machine.name, found, self.nonce)
        wait_witness(machine, 0)

    # -- operations ----------------------------------------------------------------------------
    def create(self) -> None:
        machine = self.pick()
        if self.random.random() < 0.5:
            self.set_nonce(machine)
        self.sealed[machine.create().id] = self.nonce[machine.name]

    def told(self) -> bool:
        """Whether a guest is told that it goes on from an epoch: now and then, as it takes long."""
        return self.random.random() < 0.2

    def rollback(self) -> None:
        if not self.sealed:
            return
        machine = self.pick()
        epoch = self.random.choice(sorted(self.sealed))
        done = machine.rollback(epoch, keep=self.random.random() < 0.3, fixup=self.told())
        if done["kept"]:
            self.sealed[done["kept"]] = self.nonce[machine.name]
        self.nonce[machine.name] = self.sealed[epoch]
        self.check(machine)

    def fork(self) -> None:
        if not self.sealed:
            return
        if len(self.machines) >= self.most_machines:
            name = self.random.choice([n for n in sorted(self.machines) if n != "web"])
            self.machines.pop(name).remove(force=True)
        epoch = self.random.choice(sorted(self.sealed))
        self.forks += 1
        if not self.can_fork:
            try:
                self.store.fork(epoch, f"fork-{self.forks}", fixup=self.told())
            except Refused:
                return
            raise AssertionError("a fork that was to be refused")
        machine = self.store.fork(epoch, f"fork-{self.forks}", fixup=self.told())
        self.machines[machine.name] = machine
        self.nonce[machine.name] = self.sealed[epoch]
        self.check(machine)

    def standby(self) -> None:
        """Have one ready for a rollback of a machine or for a fork, and none of the one before."""
        if not self.sealed:
            return
        for one in self.store.standbys():
            self.store.standby(one["epoch"], 0, machine=one["machine"], fixup=one["fixup"])
        machine = self.random.choice([None, self.pick()])
        epoch = self.random.choice(sorted(self.sealed))
        wanted = {"machine": machine.name if machine else None, "fixup": self.told()}
        try:
            self.store.standby(epoch, 1, **wanted)
        except Refused:
            assert not self.can_fork
            return
        [one] = self.store.standbys()
        assert one["ready"] == 1 or "memory left" in one["trouble"], one
        if machine:
            self.machines[machine.name].rollback(epoch, keep=False, fixup=wanted["fixup"])
            self.nonce[machine.name] = self.sealed[epoch]
            self.check(machine)

    def delete(self) -> None:
        if not self.sealed:
            return
        many = min(len(self.sealed), 1 if len(self.sealed) < self.most_epochs else 8)
        gone = self.random.sample(sorted(self.sealed), many)
        self.store.delete(gone)
        for epoch in gone:
            del self.sealed[epoch]

    def restart(self) -> None:
        machine = self.pick()
        said = machine.console_log.stat().st_size
        machine.stop(kill=self.random.random() < 0.5)
        machine.start()
        if machine.record.spec.hypervisor == XEN:  # which has no guest agent
            wait_console(machine, "DOMU READY", since=said, limit=self.boot_limit)
        else:
            wait_console(machine, "TINY READY", since=said, limit=self.boot_limit)
            machine.wait_agent()
        self.set_nonce(machine)
        self.check(machine)

    # -- running them --------------------------------------------------------------------------
    def run(self, operations: int, note: str, every: int = 10) -> None:
        """That many operations, one after the other; ``note`` goes with whatever fails. All
        machines are checked every so many."""
        weights = {self.create: 40, self.rollback: 25, self.fork: 12, self.delete: 15,
                   self.restart: 4,
                   self.standby: 0 if self.on_xen else 6}
        for number in range(operations):
            operation = self.random.choices(list(weights), list(weights.values()))[0]
            try:
                print(number, operation.__name__, flush=True)
                operation()
                for machine in self.machines.values():
                    found = machine.status()
                    assert found["state"] == "running", found
                if number % every == 0:
                    for machine in self.machines.values():
                        self.check(machine)
            except BaseException as error:
                error.add_note(f"operation {number} ({operation.__name__}), {note}")
                raise

    def check_everything(self, scratch: Path) -> None:
        """Every epoch verifies, its disks are whole, and a machine put back to it has its nonce."""
        assert {epoch.id for epoch in self.store.epochs()} == set(self.sealed)
        assert self.store.verify() == []
        for epoch in self.store.epochs():
            check_disks(self.store, epoch, scratch)
        web = self.machines["web"]
        for epoch_id, nonce in sorted(self.sealed.items()):
            web.rollback(epoch_id, keep=False, fixup=False)
            self.nonce["web"] = nonce
            self.check(web)
