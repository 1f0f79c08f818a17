"""The table of docs/design.md part 8, measured in one run beside savevm and loadvm.

Run by scripts/bench, which builds the tiny guest and sets $EPOCHS_TINY. Prints a table and writes
JSON. Every figure is a median; the guest has 512 MiB, one disk, and about 95 MiB resident. With
--large: a guest of 4 GiB with 2 GiB resident instead, and only what its size could bear on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store
from epochs.qemu.connection import open_monitor

MEMORY = 512 * 2**20
CTL = "/bin/witness-ctl"
MIB = 2**20


@dataclass
class Row:
    """One line of the table. ``unit`` "ms", "s", "MiB", "x" or "GB/s"; for GB/s more is better."""

    name: str
    value: float
    unit: str
    least: float | None
    aim: float | None
    samples: int

    @property
    def verdict(self) -> str:
        if self.least is None:
            return ""
        good = self.value >= self.least if self.unit == "GB/s" else self.value <= self.least
        best = self.aim is not None and (
            self.value >= self.aim if self.unit == "GB/s" else self.value <= self.aim)
        return "aim met" if best else "met" if good else "MISSED"


rows: list[Row] = []


def add(name: str, values: list[float], unit: str, least: float | None = None,
        aim: float | None = None) -> float:
    """Record the median of some values and print the row at once."""
    row = Row(name, statistics.median(values), unit, least, aim, len(values))
    rows.append(row)
    bars = ("" if least is None else f"at least {least:g}") + (f", aim {aim:g}" if aim else "")
    print(f"{row.name:<62} {row.value:9.2f} {unit:<5} {bars:<26} {row.verdict}", flush=True)
    return row.value


steps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))


def note(what: str, measured: Mapping[str, float]) -> None:
    """Keep the steps of an operation for the profile at the end (seconds by name)."""
    for name, seconds in measured.items():
        steps[what][name].append(seconds * 1e3)


def profile() -> dict[str, dict[str, float]]:
    """Print where the milliseconds of each operation go, medians; returns them."""
    found = {what: {name: statistics.median(values) for name, values in named.items()}
             for what, named in steps.items()}
    print("\nwhere the milliseconds go (medians of each step):")
    for what, named in found.items():
        print(f"  {what:<36} " + ", ".join(f"{name} {ms:.2f}" for name, ms in named.items()))
    return found


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spec(guest: Path, backend: str | None = None) -> MachineSpec:
    return MachineSpec(memory=MEMORY, cpus=1, accel="tcg",
                       disks=(DiskSpec("a", str(guest / "a.img"), "raw", backend),),
                       kernel=str(guest / "vmlinuz"), initrd=str(guest / "initrd"),
                       append=(guest / "append").read_text().strip())


def ctl(machine: Machine, *words: str) -> str:
    done = machine.exec([CTL, *words], timeout=120)
    assert done.status == 0, done
    return done.stdout.decode().strip()


def ready(store: Store, guest: Path) -> Machine:
    """A booted guest with about 95 MiB resident whose witness writes nothing now."""
    machine = store.add("web", spec(guest))
    machine.start()
    machine.wait_agent(120)
    ctl(machine, "dirty", "48")
    ctl(machine, "pause")
    return machine


def resident(machine: Machine, store: Store) -> float:
    return float(machine.create("resident").stats["pages_resident"] * 4096 / MIB)


def pid(machine: Machine) -> int:
    return int(machine.status()["pid"])


def anonymous_kib(number: int) -> int:
    """Private dirty memory: what the kernel cannot share with other processes or drop."""
    text = Path(f"/proc/{number}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines()
                if line.startswith("Private_Dirty:"))


def idle_create(machine: Machine, label: str, count: int) -> dict[str, list[float]]:
    """Creates on an idle guest: pause, whole, bytes on disk."""
    found: dict[str, list[float]] = {"pause": [], "whole": [], "disk": []}
    for _ in range(count):
        began = time.perf_counter()
        epoch = machine.create(label)
        found["whole"].append((time.perf_counter() - began) * 1e3)
        found["pause"].append(epoch.stats["pause_seconds"] * 1e3)
        note(f"pause, {label}", epoch.stats["pause_steps"])
        stats = epoch.stats
        found["disk"].append((stats["pack_bytes"] + stats["map_bytes"] + stats["state_bytes"]
                              + sum(stats["disk_bytes"].values())) / MIB)
    return found


def rollbacks(machine: Machine, epoch: Epoch, count: int) -> list[float]:
    found = []
    for _ in range(count):
        done = machine.rollback(epoch, keep=False, fixup=False)
        assert "spawn" in done["steps"], "a standby was taken"
        found.append(done["seconds"] * 1e3)
        note("rollback", done["steps"])
    return found


def from_standby(store: Store, machine: Machine, epoch: Epoch, count: int) -> list[float]:
    """Milliseconds of rollbacks each of which finds a standby instance ready."""
    found = []
    store.standby(epoch, 1, machine=machine.name, fixup=False)
    for _ in range(count):
        store.fill_standbys()
        time.sleep(0.3)  # the process that looked for something to do has ended, too
        done = machine.rollback(epoch, keep=False, fixup=False)
        assert "take" in done["steps"], "no standby was taken"
        found.append(done["seconds"] * 1e3)
        note("standby", done["steps"])
    store.standby(epoch, 0, machine=machine.name, fixup=False)
    return found


def fork_times(store: Store, epoch: Epoch, count: int) -> list[float]:
    """Milliseconds to fork one machine."""
    found = []
    for number in range(count):
        began = time.perf_counter()
        fork = store.fork(epoch, f"timed-{number}", fixup=False)
        found.append((time.perf_counter() - began) * 1e3)
        fork.remove(force=True)
    return found


def savevm(guest: Path, place: Path, count: int) -> tuple[list[float], list[float]]:
    """savevm and loadvm of the same guest, on a QEMU of their own with a qcow2 overlay."""
    with Store(place / "peer") as store:
        machine = ready(store, guest)
        try:
            record = store.files.catalog.instance_of(machine.record.id)
            assert record is not None
            saved, loaded = [], []
            with open_monitor(store.files, record) as monitor:
                for _ in range(count):
                    saved.append(timed(lambda: monitor.human("savevm peer")))
                    loaded.append(timed(lambda: monitor.human("loadvm peer")))
                said = monitor.human("info snapshots")
                assert "peer" in said, said
            return [s * 1e3 for s in saved], [s * 1e3 for s in loaded]
        finally:
            machine.remove(force=True, with_epochs=True)


def many_forks(store: Store, epoch: Epoch, count: int) -> None:
    names = [f"fork-{number}" for number in range(count)]
    forks: list[Machine] = []
    store.standby(epoch, count, fixup=False)
    assert [one["ready"] for one in store.standbys()] == [count], store.standbys()
    standing = timed(lambda: forks.extend(store.fork_many(epoch, names, fixup=False)))
    store.standby(epoch, 0, fixup=False)
    for fork in forks:
        fork.remove(force=True)
    forks.clear()

    def start() -> None:
        forks.extend(store.fork_many(epoch, names, fixup=False))

    add(f"{count} forks running", [timed(start)], "s", 3.0, 0.8)
    add("  the same, from standby instances", [standing], "s")
    for fork in forks:
        assert fork.status()["state"] == "running"
    time.sleep(4)  # the figure of FACTS.md is "after four seconds of running"
    blank = blank_process_kib(store, epoch)
    used = [anonymous_kib(pid(fork)) for fork in forks]
    add("private memory per idle fork beyond the process itself",
        [(kib - blank) / 1024 for kib in used], "MiB", 4.0, 2.0)
    add("  the process itself (paused, nothing run)", [blank / 1024], "MiB")
    for fork in forks:
        fork.remove(force=True)


def blank_process_kib(store: Store, epoch: Epoch) -> int:
    """Private dirty memory of a fork that never ran."""
    held = store.fork(epoch, "held", paused=True, fixup=False)
    try:
        return anonymous_kib(pid(held))
    finally:
        held.remove(force=True)


def cold_reads(machine: Machine, count: int) -> list[float]:
    """Milliseconds to read the guest's whole disk past its page cache."""
    found = []
    for _ in range(count):
        done = machine.exec(["/bin/sh", "-c", "echo 3 >/proc/sys/vm/drop_caches; "
                             "t0=$(cut -d' ' -f1 /proc/uptime); cat /dev/vda >/dev/null; "
                             "t1=$(cut -d' ' -f1 /proc/uptime); echo $t0 $t1"], timeout=120)
        start, end = done.stdout.split()
        found.append((float(end) - float(start)) * 1e3)
    return found


def help_time(count: int) -> list[float]:
    binary = [sys.executable, "-m", "epochs", "--help"]
    return [timed(lambda: subprocess.run(binary, check=True, capture_output=True)) * 1e3
            for _ in range(count)]


def canonicaliser() -> None:
    answer = subprocess.run([sys.executable, "-m", "memsave.bench"], check=True,
                            capture_output=True, text=True).stdout
    found = json.loads(answer)
    add("canonicaliser, per core, pages unchanged or zero",
        [found["unchanged_or_zero_gb_s"]], "GB/s", 4.0)
    add("canonicaliser, per core, new pages", [found["new_gb_s"]], "GB/s", 1.5)
    add("  as many bytes compared by memcmp", [found["memcmp_gb_s"]], "GB/s")


DEPTHS = (50, 200, 500)
ROUNDS = 5
# QEMU reads the tables of every layer then, once; the bar is for reads as such.
UNBARRED = ("the first read of the disk after a start",)


def at_depth(store: Store, web: Machine, epoch: Epoch, found: dict[str, list[float]]) -> None:
    """One round of figures of a machine that is put back to an epoch."""
    found["rollback"] += rollbacks(web, epoch, 3)
    time.sleep(0.5)  # what the guest does at once when it goes on is over
    made = idle_create(web, "at a depth", 5)
    found["pause"] += made["pause"]
    found["create"] += made["whole"]
    found["rollback, standby"] += from_standby(store, web, epoch, 2)
    found["fork"] += fork_times(store, epoch, 3)
    reads = cold_reads(web, 5)
    found["the first read of the disk after a start"] += reads[:1]
    found["reading the disk"] += reads[1:]


def depth_rows(store: Store, web: Machine, epochs: dict[int, Epoch]) -> None:
    """All depths in turns, so that whatever else the host does meanwhile meets all."""
    figures: dict[int, dict[str, list[float]]] = {depth: defaultdict(list) for depth in epochs}
    for _ in range(ROUNDS):
        for depth, epoch in epochs.items():
            at_depth(store, web, epoch, figures[depth])
    for key in figures[1]:
        add(f"at depth 1: {key}", figures[1][key], "ms")
        for depth in list(epochs)[1:]:
            ratio = statistics.median(figures[depth][key]) / statistics.median(figures[1][key])
            bars = () if key in UNBARRED else (1.3, 1.05)
            add(f"  at depth {depth}, as a multiple", [ratio], "x", *bars)


def go_down(store: Store, web: Machine, depth: int) -> Epoch:
    """Make epochs that write a little until there is one at a depth."""
    while store.depth(web.head or "") < depth:
        ctl(web, "resume")
        ctl(web, "sync")
        ctl(web, "pause")
        web.create("on the way down")
    assert web.head is not None
    return web.head


def measure(guest: Path, place: Path, quick: bool) -> None:
    count = 5 if quick else 15
    with Store(place / "store") as store:
        web = ready(store, guest)
        try:
            print(f"guest: 512 MiB, {resident(web, store):.0f} MiB resident, one disk, "
                  f"{web.status()['accelerator']}, QEMU {web.status()['qemu']}, tracking "
                  f"{web.head.stats['tracking'] if web.head else ''}")
            booted = idle_create(web, "idle, booted instance", count)
            add("pause of create, idle guest, one disk", booted["pause"], "ms", 20, 5)
            add("create, whole, idle guest", booted["whole"], "ms", 200, 50)
            add("epoch of an idle guest, on disk", booted["disk"], "MiB", 8, 2)
            busy = []
            for _ in range(max(3, count // 3)):
                ctl(web, "dirty", "64")
                busy.append(web.create("64 MiB written"))
            add("pause, 64 MiB written since the parent",
                [epoch.stats["pause_seconds"] * 1e3 for epoch in busy], "ms", 60, 10)
            for epoch in busy:
                note("pause, 64 MiB written", epoch.stats["pause_steps"])
            add("  create, whole, 64 MiB written",
                [epoch.stats["total_seconds"] * 1e3 for epoch in busy], "ms")
            first = web.create("depth 1", flat=True)
            web.rollback(first, keep=False)
            time.sleep(1)
            add("rollback to a running guest, no standby", rollbacks(web, first, count), "ms",
                200, 60)
            time.sleep(1)
            add("pause of create, idle, rolled back or forked",
                idle_create(web, "idle, rolled back", count)["pause"], "ms", 20, 5)
            add("rollback to a running guest, standby", from_standby(store, web, first, count),
                "ms", 20, 3)
            many_forks(store, first, 32)
            epochs = {1: first}
            for depth in DEPTHS[:2] if quick else DEPTHS:
                epochs[depth] = go_down(store, web, depth)
            long_lived = idle_create(web, "without a rollback", count)
            add(f"  at depth {depth}, one instance all the way: pause", long_lived["pause"], "ms")
            add(f"  at depth {depth}, one instance all the way: create", long_lived["whole"], "ms")
            depth_rows(store, web, epochs)
            print(f"links in the disk's chain at depth {depth}: "
                  f"{web.status()['disks'][0]['chain']}")
        finally:
            for machine in store.machines():
                machine.remove(force=True, with_epochs=True)
    add("epochs --help", help_time(count), "ms", 150, 80)
    canonicaliser()
    saved, loaded = savevm(guest, place, max(3, count // 3))
    save = add("savevm of the same guest (it stands still throughout)", saved, "ms")
    load = add("loadvm of the same guest", loaded, "ms")
    by_name = {row.name: row.value for row in rows}
    print(f"\nratios in this run: savevm / pause of create = "
          f"{save / by_name['pause of create, idle guest, one disk']:.0f}, savevm / whole create "
          f"= {save / by_name['create, whole, idle guest']:.1f}, loadvm / rollback = "
          f"{load / by_name['rollback to a running guest, no standby']:.1f}")


LARGE, LARGE_RESIDENT = 4 * 2**30, 2048  # bytes; MiB


def measure_large(guest: Path, place: Path, quick: bool) -> None:
    """What must not grow with the guest: pause and rollback of one of 4 GiB, half of it in use."""
    count = 3 if quick else 10
    with Store(place / "store") as store:
        web = store.add("web", dataclasses.replace(spec(guest), memory=LARGE))
        try:
            web.start()
            web.wait_agent(120)
            ctl(web, "pause")
            for _ in range(LARGE_RESIDENT // 512):  # files in RAM: each call is another half GiB
                done = web.exec(["/bin/sh", "-c", "mkdir -p /big; mountpoint -q /big || mount -t "
                                 "tmpfs -o size=3g tmpfs /big; n=$(ls /big | wc -l); dd "
                                 "if=/dev/urandom of=/big/$n bs=1M count=8 2>/dev/null; for i in "
                                 "$(seq 63); do cat /big/$n; done >/big/$n.more"], timeout=300)
                assert done.status == 0, done
            first = web.create("large", flat=True)
            print(f"guest: 4 GiB, {first.stats['pages_resident'] * 4096 / MIB:.0f} MiB resident")
            add("first create, whole (all of it is written)",
                [first.stats["total_seconds"]], "s")
            add("  its pause", [first.stats["pause_seconds"] * 1e3], "ms")
            made = idle_create(web, "idle", count)
            add("pause of create, idle guest, one disk", made["pause"], "ms", 20, 5)
            add("create, whole, idle guest", made["whole"], "ms")
            busy = []
            for _ in range(count):
                ctl(web, "dirty", "64")
                busy.append(web.create("64 MiB written").stats["pause_seconds"] * 1e3)
            add("pause, 64 MiB written since the parent", busy, "ms", 60, 10)
            add("rollback to a running guest, no standby", rollbacks(web, first, count), "ms",
                200, 60)
            add("rollback to a running guest, standby", from_standby(store, web, first, count),
                "ms", 20, 3)
            done = web.exec(["/bin/sh", "-c", "cat /big/* >/dev/null"], timeout=300)
            assert done.status == 0, done
            web.create("all of it read")
            add("pause, idle, rolled back, everything read since",
                idle_create(web, "idle, rolled back", count)["pause"], "ms", 20, 5)
        finally:
            for machine in store.machines():
                machine.remove(force=True, with_epochs=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--large", action="store_true", help="a guest of 4 GiB instead")
    parser.add_argument("--output", type=Path, default=Path("bench.json"),
                        help="where the JSON goes (default: bench.json)")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="epochs-bench-"))
    try:
        (measure_large if options.large else measure)(Path(os.environ["EPOCHS_TINY"]), place,
                                                     options.quick)
    finally:
        shutil.rmtree(place)
    document = {"rows": [{**row.__dict__, "verdict": row.verdict} for row in rows],
                "steps": profile()}
    options.output.write_text(json.dumps(document, indent=2) + "\n")
    missed = [row.name for row in rows if row.verdict == "MISSED"]
    print(f"\nwritten to {options.output}; " + (f"missed: {'; '.join(missed)}" if missed
                                                else "every bar is met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
