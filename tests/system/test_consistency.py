"""300 random operations with the witness writing throughout: memory and disks never part.

CI runs one fixed seed with each QEMU, so that what it says of a commit can be repeated.
EPOCHS_SEED=N runs another, EPOCHS_SEED=random a new one, which is printed; EPOCHS_OPERATIONS
changes the number.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store

from .guest import check_disks, ctl, wait_console, wait_witness

pytestmark = [pytest.mark.guest, pytest.mark.slow]
OPERATIONS = int(os.environ.get("EPOCHS_OPERATIONS", "300"))
MAX_MACHINES = 3
MAX_EPOCHS = 24


class Model:
    """What every machine's and epoch's nonce must be, and the operations on both."""

    def __init__(self, store: Store, first: Machine, random_: random.Random) -> None:
        self.store = store
        self.random = random_
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
        assert ctl(machine, "nonce", "get") == self.nonce[machine.name]
        wait_witness(machine, 0)

    # -- operations ----------------------------------------------------------------------------
    def create(self) -> None:
        machine = self.pick()
        if self.random.random() < 0.5:
            self.set_nonce(machine)
        self.sealed[machine.create().id] = self.nonce[machine.name]

    def rollback(self) -> None:
        if not self.sealed:
            return
        machine = self.pick()
        epoch = self.random.choice(sorted(self.sealed))
        done = machine.rollback(epoch, keep=self.random.random() < 0.3)
        if done["kept"]:
            self.sealed[done["kept"]] = self.nonce[machine.name]
        self.nonce[machine.name] = self.sealed[epoch]
        self.check(machine)

    def fork(self) -> None:
        if not self.sealed:
            return
        if len(self.machines) >= MAX_MACHINES:
            name = self.random.choice([n for n in sorted(self.machines) if n != "web"])
            self.machines.pop(name).remove(force=True)
        epoch = self.random.choice(sorted(self.sealed))
        self.forks += 1
        machine = self.store.fork(epoch, f"fork-{self.forks}")
        self.machines[machine.name] = machine
        self.nonce[machine.name] = self.sealed[epoch]
        self.check(machine)

    def delete(self) -> None:
        if not self.sealed:
            return
        many = min(len(self.sealed), 1 if len(self.sealed) < MAX_EPOCHS else 8)
        gone = self.random.sample(sorted(self.sealed), many)
        self.store.delete(gone)
        for epoch in gone:
            del self.sealed[epoch]

    def restart(self) -> None:
        machine = self.pick()
        said = machine.console_log.stat().st_size
        machine.stop(kill=self.random.random() < 0.5)
        machine.start()
        wait_console(machine, "TINY READY", since=said)
        machine.wait_agent()
        self.set_nonce(machine)
        self.check(machine)


@pytest.mark.timeout(2700)
def test_random_operations_never_mix_memory_and_disks(
        store: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    wanted = os.environ.get("EPOCHS_SEED", "20261124")
    seed = random.randrange(10**6) if wanted == "random" else int(wanted)
    print(f"EPOCHS_SEED={seed}")
    model = Model(store, boot(), random.Random(seed))
    weights = {model.create: 40, model.rollback: 25, model.fork: 12, model.delete: 15,
               model.restart: 4}
    for number in range(OPERATIONS):
        operation = model.random.choices(list(weights), list(weights.values()))[0]
        try:
            operation()
            for machine in model.machines.values():
                assert machine.status()["state"] == "running"
            if number % 10 == 0:
                for machine in model.machines.values():
                    model.check(machine)
        except BaseException as error:
            error.add_note(f"operation {number} ({operation.__name__}), EPOCHS_SEED={seed}")
            raise
    assert {epoch.id for epoch in store.epochs()} == set(model.sealed)
    assert store.verify() == []
    for epoch in store.epochs():
        check_disks(store, epoch, tmp_path)
    web = model.machines["web"]
    for epoch, nonce in sorted(model.sealed.items()):
        web.rollback(epoch, keep=False)
        model.nonce["web"] = nonce
        model.check(web)
