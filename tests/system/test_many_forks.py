"""Forks by the dozen, and hundreds one after another, each with a network of its own.

`EPOCHS_MANY=1` makes them 32 and 200, which takes some minutes under emulation.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from epochs import Machine, Store

from .guest import Artefacts, ctl, processes_in, wait_console, wait_witness, witness_count
from .networks import NOTHING, alone, answer, asked, inside, left, serve

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.slow]

AT_ONCE, IN_A_ROW = (32, 200) if "EPOCHS_MANY" in os.environ else (8, 40)
IDLE_MIB = 4.0  # private memory of an idle fork beyond that of one that never ran: the bar
LOST_MIB = 64  # that the host may have less than before


@pytest.fixture
def any_qemu() -> str:
    """One will do: nothing here depends on which it is."""
    return "7.2"


@pytest.fixture
def web(store: Store, tiny: Artefacts) -> Iterator[Machine]:
    spec = tiny.spec(memory=96 * 2**20, disks=("a",))
    machine = store.add("web", replace(spec, net="isolated", append=f"{spec.append} tiny.net"))
    with alone():
        machine.start()
        wait_console(machine, "TINY READY")
        machine.wait_agent()
        wait_witness(machine, 0)
        yield machine
        for one in store.machines():
            one.remove(with_epochs=True, force=True)
        assert left() == NOTHING


def private_mib(machine: Machine) -> float:
    """Private dirty memory of a machine's QEMU, but for the emulator's translated code, which comes
    2 MiB at a time and is not there under KVM."""
    found, writable_code = 0, False
    for line in Path(f"/proc/{machine.status()['pid']}/smaps").read_text().splitlines():
        if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) ", line):
            writable_code = mapping[1].startswith("rwx")
        elif line.startswith("Private_Dirty:") and not writable_code:
            found += int(line.split()[1])
    return found / 1024


@pytest.mark.timeout(900)
def test_at_once(store: Store, web: Machine) -> None:
    """Each writes, computes, and answers under an address of its own; idle, it takes little."""
    ctl(web, "pause")
    epoch = web.create()
    web.stop(kill=True)
    forks = store.fork_many(epoch, [f"fork-{number}" for number in range(AT_ONCE)], fixup=False)
    held = store.fork(epoch, "held", paused=True, fixup=False)
    time.sleep(4)  # what is measured is that they ran for so long
    blank = private_mib(held)
    idle = statistics.median(private_mib(fork) - blank for fork in forks)
    assert idle <= IDLE_MIB, idle
    held.remove(force=True)

    for fork in forks:
        ctl(fork, "resume")

    def work(name: str) -> tuple[str, str]:
        with Store(store.files.path) as own:
            machine = own.machine(name)
            before = witness_count(machine)
            serve(machine, name)
            status, summed = inside(machine, f"seq 1 20000 | sha256sum; echo {name} >/a/{name}; "
                                             "sync")
            assert status == 0
            wait_witness(machine, before, 300)
            return asked(answer(machine)), summed

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, [fork.name for fork in forks]))
    assert [name for name, _ in answers] == [fork.name for fork in forks]
    assert len({summed for _, summed in answers}) == 1, "they computed the same"
    assert len({answer(fork) for fork in forks}) == AT_ONCE
    for fork in forks:
        witness_count(fork)
        assert inside(fork, "ls /a | grep fork")[1] == fork.name, "its disk is its own"
        fork.remove(with_epochs=True, force=True)


def held_here() -> dict[str, int]:
    """What a fork that was not cleared away would add to."""
    memory = {line.split(":")[0]: int(line.split()[1]) // 1024
              for line in Path("/proc/meminfo").read_text().splitlines()}
    return {"anonymous": memory["AnonPages"], "kernel": memory["SUnreclaim"],
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines())}


@pytest.mark.timeout(1200)
def test_in_a_row(store: Store, web: Machine) -> None:
    ctl(web, "nonce", "set", "ready")
    epoch = web.create()
    mine = left()
    for _ in range(3):  # what is made once, like caches
        store.fork(epoch, "trial", fixup=False).remove(force=True)
    files = sorted(store.files.path.rglob("*"))
    processes = processes_in(store.files.path)
    before = held_here()
    for number in range(IN_A_ROW):
        fork = store.fork(epoch, "trial", fixup=False)
        if number % 20 == 0:
            assert ctl(fork, "nonce", "get") == "ready"
        fork.remove(force=True)
    after = held_here()
    assert left() == mine
    assert processes_in(store.files.path) == processes
    assert sorted(store.files.path.rglob("*")) == files
    assert (after["descriptors"], after["mounts"]) == (before["descriptors"], before["mounts"])
    for kind in ("anonymous", "kernel"):
        print(f"{kind} memory of this host: {before[kind]} MiB before, {after[kind]} after")
        if os.environ.get("PYTEST_XDIST_WORKER") is None:  # else others are at work, too
            assert after[kind] - before[kind] < LOST_MIB, (kind, before, after)
    wait_witness(web, 0)
