"""Runs in User-Mode Linux for tests/dm/test_power_cut.py: looks at what the last power cut left of
a store, sees that its machine goes on, and makes the next power cut.

    python -m tests.dm.lab.cut LAST NEXT

Each is SWEEP:POINT (tests/dm/swept.py); LAST is "-" in the first boot, NEXT in the last one. The
machine has one disk in a pool on a device and one in a pool on a file. Its guest never gets beyond
the firmware: what is written to its disks is written here, from outside, one word at a time.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import call, patch

from blockcow import pool_label, pools
from blockcow.devmapper import DIRECTORY, Target, open_driver
from blockcow.dmthin import number_of
from blockcow.thin_layers import device
from blockcow.thin_pool import check_metadata
from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store
from epochs.catalog import InstanceRecord
from epochs.cli import cli
from epochs.cli.failures import run
from epochs.durable import write_file
from epochs.processes import boot_id
from tests.dm.swept import FORKED, SWITCHED
from tests.system.guest import assert_tidy

MIB = 2**20
PLACE = Path(os.environ.get("SCRATCH", "/mnt")) / "cut"
STORE, LEDGER, UNSYNCED = PLACE / "store", PLACE / "ledger.json", PLACE / "unsynced"
DEVICE, OTHER = Path("/dev/ubdb"), Path("/dev/ubdc")
SMALL, EXTRA = PLACE / "small.img", PLACE / "extra.img"
DISK_SIZE, WORD_AT, WORD_SIZE = 8 * MIB, MIB, 4096
STEP = 8 * MIB  # by which a pool is extended
HALT = 0xCDEF0123  # reboot(2): at once, nothing is written back


# -- pools and devices, for test_kills_dmthin.py too -------------------------------------------
def check_pools(store: Store) -> None:
    """Every pool holds the layers of the catalog and no other, and both are of one time."""
    catalog, thin = store.files.catalog, store.files.thin()
    for record in catalog.pools():
        with thin.live(record.id) as pool, pool.metadata_snapshot():
            numbers = set(pool.numbers())
            known = {number_of(layer) for layer in catalog.layers_in_pool(record.id)}
            assert numbers == known, f"{record.name}: {numbers}, in the catalog {known}"
            assert pool.status().transaction == record.transaction, record
    store.files.rest()


def check_devices(store: Store) -> None:
    """Live are the disks of the machines that run and the pools beneath them, nothing else; those
    of one whose hypervisor died may be until it is started again."""
    instances = store.files.catalog.instances()
    devices, files = set(open_driver().devices()), set(loop_files())
    least, files_least = live(store, [one for one in instances if one.process.alive()])
    most, files_most = live(store, instances)
    assert least <= devices <= most, (devices ^ most, devices ^ least)
    assert files_least <= files <= files_most, files


def live(store: Store, instances: list[InstanceRecord]) -> tuple[set[str], set[str]]:
    """The devices, and the files as block devices, that instances of machines need."""
    catalog = store.files.catalog
    layers = [disk.active for instance in instances for disk in catalog.disks(instance.machine)
              if disk.active]
    used = [pool for pool in catalog.pools() if any(layer.startswith(pool.id) for layer in layers)]
    return ({device(layer) for layer in layers}
            | {f"epochs-{pool.id}{part}" for pool in used for part in ("", "-data", "-meta")},
            {pool.path for pool in used if Path(pool.path).is_file()})


def check_closed(store: Store) -> None:
    """Pools that are not live: marked so, and with metadata that is whole."""
    assert open_driver().devices() == []
    for record in store.files.catalog.pools():
        held = store.files.thin().device_of(record.id)
        label = held.label()
        assert label.state == pool_label.CLOSED, record.name
        with held.locked(), held._device() as node:
            held._map("meta", label.metadata, node)
            try:
                check_metadata(DIRECTORY / f"{held.name.device}-meta")
            finally:
                held.close(mark=False)


def loop_files() -> list[str]:
    """The files that are block devices now."""
    done = subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"],
                          capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


def forked(store: Path, before: Callable[[], None], *command: str) -> int:
    """Run a command in a fork of this process, with something done before; returns how it ended,
    as subprocess does. Loading it once more in a process of its own takes longer than it runs."""
    pid = os.fork()
    if not pid:
        try:
            before()
            os._exit(run(cli, ["--store", str(store), *command]))
        finally:
            os._exit(70)  # whatever was raised: nobody else's code is left for another time
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def failing_disk(name: str) -> Path:
    """A disk that cannot be read."""
    return open_driver().create(name, f"test-{name}", [Target(0, DISK_SIZE // 512, "error", "")])


# -- what is known across power cuts -----------------------------------------------------------
@dataclass
class Ledger:
    """Written durably before each cut. ``present``: the word on the machine's disks; ``epochs``:
    the word that each epoch holds; ``first``: an epoch that stays; ``victim``: one that is being
    deleted; ``size``: bytes of the pool on a file; ``data``: how much of it takes data."""

    boot: str = ""
    present: str = ""
    epochs: dict[str, str] = field(default_factory=dict)
    first: str = ""
    victim: str = ""
    size: int = 64 * MIB
    data: int = 0

    def save(self) -> None:
        self.boot = boot_id()
        write_file(LEDGER, json.dumps(asdict(self)).encode())


def written(word: str) -> bytes:
    return word.encode().ljust(WORD_SIZE, b".")


def write(store: Store, ledger: Ledger, web: Machine, word: str) -> None:
    """As its guest would: durable when this returns, on both disks."""
    for disk in store.files.catalog.disks(web.record.id):
        assert disk.active is not None
        fd = os.open(DIRECTORY / device(disk.active), os.O_WRONLY | os.O_SYNC | os.O_CLOEXEC)
        try:
            assert os.pwrite(fd, written(word), WORD_AT) == WORD_SIZE
        finally:
            os.close(fd)
    ledger.present = word


def check_word(store: Store, layer: str, word: str, what: str) -> None:
    with store.files.thin().opened(store.files.catalog.layer(layer)) as fd:
        found = os.pread(fd, WORD_SIZE, WORD_AT)
    assert found == written(word), f"{what} holds {found[:24]!r}, not {word!r}"


def check_epoch(store: Store, epoch: Epoch, word: str) -> None:
    assert sorted(epoch.disks) == ["a", "b"]
    for disk, layer in epoch.disks.items():
        check_word(store, layer, word, f"disk {disk} of epoch {epoch.id[:12]}")


# -- after a cut -------------------------------------------------------------------------------
def look(ledger: Ledger, sweep: str, point: str) -> None:
    """What the cut left, before and after `recover`."""
    assert boot_id() != ledger.boot
    assert not UNSYNCED.exists() or not UNSYNCED.read_bytes(), "this was no power cut"
    UNSYNCED.unlink(missing_ok=True)
    assert open_driver().devices() == []
    with Store(STORE) as store, \
            patch.object(pools, "check_metadata", wraps=check_metadata) as check:
        used = [store.files.thin().device_of(record.id) for record in store.files.catalog.pools()
                if record.name in ("fast", "small")]
        found = {held.name.device: held.label() for held in used}
        for label in found.values():
            assert str(label.boot) == ledger.boot
            assert label.state == pool_label.OPEN or sweep == "start"  # of a machine that was off
        kinds = [one.kind for one in store.settle()]
        assert kinds == ([] if point == "pool-create.recorded" else [UNDER_WAY[sweep]]), kinds
        assert store.settle() == []
        assert_tidy(store)
        check_pools(store)
        for name, label in found.items():  # what was not closed is checked before it is opened
            checked = call(DIRECTORY / f"{name}-meta") in check.mock_calls
            assert checked == (label.state == pool_label.OPEN), name
        CHECKS[sweep](store, ledger, point)
        assert [pool.record.name for pool in store.pools()] == ["fast", "small"]
        assert {epoch.id for epoch in store.epochs()} == set(ledger.epochs)
        for epoch in store.epochs():
            check_epoch(store, epoch, ledger.epochs[epoch.id])
        assert store.verify() == []
        (web,) = store.machines()
        assert sweep == "start" or web.status()["state"] == "died"
        for disk in store.files.catalog.disks(web.record.id):
            assert disk.active is not None
            check_word(store, disk.active, ledger.present, f"disk {disk.name}")
        store.files.rest()
        check_closed(store)
    assert loop_files() == []


def after_create(store: Store, ledger: Ledger, point: str) -> None:
    made = [epoch for epoch in store.epochs() if epoch.id not in ledger.epochs]
    assert len(made) == (point == "create.committed")
    for epoch in made:
        ledger.epochs[epoch.id] = ledger.present
        assert store.machine("web").record.head == epoch.id


def after_rollback(store: Store, ledger: Ledger, point: str) -> None:
    switched = point in SWITCHED
    assert (store.machine("web").record.head == ledger.first) == switched
    if switched:
        ledger.present = ledger.epochs[ledger.first]


def after_fork(store: Store, ledger: Ledger, point: str) -> None:
    assert [one.name for one in store.machines()] == (
        ["trial", "web"] if point in FORKED else ["web"])
    if point in FORKED:
        trial = store.machine("trial")
        for disk in store.files.catalog.disks(trial.record.id):
            assert disk.active is not None
            check_word(store, disk.active, ledger.epochs[ledger.first], f"disk {disk.name}")
        assert trial.start() == "started"
        trial.remove(force=True)
        check_pools(store)


def after_delete(store: Store, ledger: Ledger, _point: str) -> None:
    """Behind both points it is decided that the epoch goes."""
    del ledger.epochs[ledger.victim]


def after_start(store: Store, _ledger: Ledger, point: str) -> None:
    state = store.machine("web").status()["state"]
    assert state == ("died" if point == "start.committed" else "off")


def after_add(store: Store, _ledger: Ledger, _point: str) -> None:
    assert [one.name for one in store.machines()] == ["web"]


def after_pool_create(store: Store, ledger: Ledger, point: str) -> None:
    if point == "pool-create.recorded":
        store.remove_pool("extra")
    after_pool_remove(store, ledger, point)


def after_pool_remove(_store: Store, _ledger: Ledger, _point: str) -> None:
    assert not EXTRA.exists()
    assert pool_label.read(OTHER) is None
    pools.check_device(OTHER)


def after_pool_extend(store: Store, ledger: Ledger, _point: str) -> None:
    """Extended, whatever the point; and once more."""
    ledger.size += STEP
    for more in (0, STEP):
        if more:
            ledger.size += more
            store.extend_pool("small", size=ledger.size)
        room = store.pool("small").room
        assert room is not None
        assert room.data_total > ledger.data
        ledger.data = room.data_total
        assert SMALL.stat().st_size == ledger.size


CHECKS = {
    "create": after_create, "rollback": after_rollback, "fork": after_fork,
    "start": after_start, "delete": after_delete, "undo-create": after_create,
    "undo-switch": after_rollback, "undo-add": after_add,
    "pool-create-device": after_pool_create, "pool-create-file": after_pool_create,
    "pool-extend": after_pool_extend,
    "pool-remove-device": after_pool_remove, "pool-remove-file": after_pool_remove,
}

# What the journal holds of each sweep.
UNDER_WAY = {
    "create": "create", "rollback": "rollback", "fork": "fork", "start": "start",
    "delete": "delete",
    "undo-create": "create", "undo-switch": "rollback", "undo-add": "add",
    "pool-create-device": "pool-create", "pool-create-file": "pool-create",
    "pool-extend": "pool-extend", "pool-remove-device": "pool-remove",
    "pool-remove-file": "pool-remove",
}


# -- before the next ---------------------------------------------------------------------------
def set_up() -> Ledger:
    PLACE.mkdir()
    for name in "ab":
        with (PLACE / f"{name}.img").open("wb") as file:
            file.truncate(DISK_SIZE)
            file.write(random.Random(name).randbytes(4 * WORD_SIZE))
    with Store(STORE) as store:
        store.create_pool("fast", DEVICE, force=True)
        room = store.create_pool("small", SMALL, size=Ledger.size).room
        assert room is not None
        ledger = Ledger(data=room.data_total)
        disks = tuple(DiskSpec(name, str(PLACE / f"{name}.img"), "raw", "dmthin", pool)
                      for name, pool in (("a", "fast"), ("b", "small")))
        web = store.add("web", MachineSpec(memory=64 * MIB, accel="tcg", net="none", disks=disks))
        web.start()
        write(store, ledger, web, "of the first epoch")
        ledger.first = web.create().id
        ledger.epochs = {ledger.first: ledger.present}
        web.stop(kill=True)
    return ledger


def go_on(ledger: Ledger) -> None:
    """The machine starts and can be checkpointed; of older epochs only the first one stays. The
    next boot reads what that epoch holds."""
    with Store(STORE) as store:
        web = store.machine("web")
        assert web.start() == "started"
        write(store, ledger, web, f"{time.time_ns()} of the machine that went on")
        new = web.create().id
        store.delete([old for old in ledger.epochs if old != ledger.first])
        ledger.epochs = {ledger.first: ledger.epochs[ledger.first], new: ledger.present}
        check_devices(store)


def strike(ledger: Ledger, sweep: str, point: str) -> None:
    """Bring about what the sweep strikes, and let it be cut off there."""
    command = ["recover"]
    with Store(STORE) as store:
        web = store.machine("web")
        write(store, ledger, web, f"{time.time_ns()} before {sweep}:{point}")
        if sweep == "create":
            command = ["create", "web"]
        elif sweep == "undo-create":
            killed("create.disks-frozen", "create", "web")
        elif sweep == "rollback":
            command = ["rollback", "web", ledger.first, "--discard"]
        elif sweep == "undo-switch":
            killed("rollback.switched" if point in SWITCHED else "rollback.prepared",
                   "rollback", "web", ledger.first, "--discard")
        elif sweep == "fork":
            command = ["fork", ledger.first, "trial"]
        elif sweep == "start":
            web.stop(kill=True)
            command = ["start", "web"]
        elif sweep == "delete":  # in the middle
            (ledger.victim,) = ledger.epochs.keys() - {ledger.first}
            ledger.epochs[web.create().id] = ledger.present
            command = ["delete", ledger.victim]
        elif sweep == "undo-add":  # which is what the command itself does when it fails
            command = ["add", "broken", "--memory", "64M",
                       "--disk", f"a={PLACE / 'a.img'},format=raw,backend=dmthin,pool=fast",
                       "--disk", f"b={failing_disk('broken')},format=raw,backend=dmthin,pool=small"]
        elif sweep == "pool-create-device":
            command = ["pool", "create", "extra", str(OTHER)]
        elif sweep == "pool-create-file":
            command = ["pool", "create", "extra", str(EXTRA), "--size", "32M"]
        elif sweep == "pool-extend":
            command = ["pool", "extend", "small", "--size", f"{(ledger.size + STEP) // MIB}M"]
        else:
            if sweep == "pool-remove-file":
                store.create_pool("extra", EXTRA, size=32 * MIB)
            else:
                store.create_pool("extra", OTHER)
            command = ["pool", "remove", "extra"]
        ledger.save()
    cut(sweep, point, *command)


def killed(point: str, *command: str) -> None:
    """Run a command that is killed at a point."""
    def wish() -> None:
        os.environ["EPOCHS_FAULT"] = f"{point}:kill"

    assert forked(STORE, wish, *command) == -signal.SIGKILL, point


def cut(sweep: str, point: str, *command: str) -> None:
    """Kill the command at its point, and the whole machine with it, as it stands."""
    killed(point, *command)
    UNSYNCED.write_bytes(b"lost" * 1024)
    print(f"cut at {sweep}:{point}", flush=True)
    ctypes.CDLL(None, use_errno=True).reboot(HALT)
    raise OSError(ctypes.get_errno(), "reboot(2) returned")


def tear_down() -> None:
    """Everything goes, and nothing of it is left."""
    with Store(STORE) as store:
        store.machine("web").remove(force=True, with_epochs=True)
        store.delete(store.epochs())
        assert store.files.catalog.layers() == []
        check_pools(store)
        for name in ("fast", "small"):
            store.remove_pool(name)
        assert_tidy(store)
    assert open_driver().devices() == []
    assert loop_files() == []
    assert not SMALL.exists()
    assert pool_label.read(DEVICE) is None


def main(last: str, following: str) -> None:
    began = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        print(f"{what} {now - began:.1f} s", end=", ", flush=True)
        began = now

    if last == "-":
        ledger = set_up()
        lap("set up")
    else:
        ledger = Ledger(**json.loads(LEDGER.read_text()))
        look(ledger, *last.split(":"))
        lap("looked")
    go_on(ledger)
    lap("went on")
    if following == "-":
        tear_down()
    else:
        strike(ledger, *following.split(":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
