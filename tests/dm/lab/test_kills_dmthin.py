"""Killed anywhere, with disks in pools: as tests/system/test_faults.py, for every point that an
operation on thin pools gets to. After each kill `recover`, and then nothing is left: in the pools
is what the catalog names, and live is what runs. One guest, booted once, goes through it all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from blockcow import pool_label
from blockcow.devmapper import open_driver
from blockcow.dmthin import DmThinBackend
from blockcow.pools import check_device
from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store
from tests.commands import run_cli
from tests.dm.lab.cut import (
    check_closed,
    check_devices,
    check_pools,
    failing_disk,
    forked,
    loop_files,
)
from tests.dm.lab.disks import MIB, random_image
from tests.dm.swept import FORKED, SWEEPS, SWITCHED, VISITED
from tests.system.guest import (
    Artefacts,
    assert_tidy,
    check_disks,
    ctl,
    processes_in,
    wait_console,
    wait_witness,
)

UML = ["--disk", "512M", "--disk", "64M"]
DEVICE, OTHER = Path("/dev/ubdb"), Path("/dev/ubdc")

pytestmark = pytest.mark.timeout(900)


@dataclass
class Home:
    """A store with one running guest, `web`: disk a in a pool on a device, b in one on a file.
    Epoch `first` has the nonce "sealed", the guest has "present". ``struck``: points at which a
    command was killed."""

    place: Path
    store: Store
    web: Machine
    first: Epoch
    struck: set[str] = field(default_factory=set)

    @property
    def small(self) -> Path:
        return self.place / "small.img"

    def strike(self, point: str, *command: str) -> None:
        """Run a command that is killed at a point; it must have got there."""
        done = run_cli(self.store.files.path, *command, fault=f"{point}:kill", check=False)
        assert done.returncode == -signal.SIGKILL, (point, done.returncode, done.stderr)
        self.struck.add(point)

    def settle(self, *, idle: bool = False) -> None:
        """`recover` settles it, a second one finds nothing, and nothing is left of it. ``idle``:
        it was done when the kill came."""
        settled = self.store.settle()
        assert bool(settled) != idle, settled
        assert self.store.settle() == []
        self.check()

    def check(self) -> None:
        assert_tidy(self.store)
        check_pools(self.store)
        check_devices(self.store)

    def runs(self, machine: Machine, nonce: str, count: int = 0) -> int:
        """The guest runs, with its memory and its disks of one instant."""
        assert machine.status()["state"] == "running"
        assert ctl(machine, "nonce", "get") == nonce
        return wait_witness(machine, count)

    def epochs(self) -> set[str]:
        return {epoch.id for epoch in self.store.epochs()}

    def whole(self, epoch: Epoch, nonce: str) -> None:
        """An epoch has all its bytes, file systems that are whole, and its guest goes on."""
        assert self.store.verify([epoch]) == []
        check_disks(self.store, epoch, self.place)
        with self.store.fork(epoch, "probe") as probe:
            self.runs(probe, nonce)


@pytest.fixture(scope="module")
def home(tiny: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    assert open_driver().devices() == []
    place = tmp_path_factory.mktemp("kills")
    with Store(place / "store") as store:
        store.create_pool("fast", DEVICE, force=True)
        store.create_pool("small", place / "small.img", size=160 * MIB)
        spec = tiny.spec()
        web = store.add("web", replace(spec, disks=tuple(
            replace(disk, backend="dmthin", pool=pool)
            for disk, pool in zip(spec.disks, ("fast", "small"), strict=True))))
        web.start()
        wait_console(web, "TINY READY", limit=180)
        web.wait_agent()
        wait_witness(web, 0)
        ctl(web, "nonce", "set", "sealed")
        first = web.create(tags=["first"])
        ctl(web, "nonce", "set", "present")
        yield Home(place, store, web, first)
        store.settle()
        for machine in store.machines():
            machine.remove(force=True, with_epochs=True)
        store.delete(store.epochs())
        assert store.files.catalog.layers() == []
        check_pools(store)
        for pool in store.pools():
            store.remove_pool(pool.record.name)
        assert_tidy(store)
    assert open_driver().devices() == []
    assert loop_files() == []
    assert processes_in(place) == []


@pytest.fixture
def bare(home: Home) -> Iterator[Machine]:
    """A machine that never gets beyond its firmware: quick to start."""
    disks = []
    for name, pool in (("a", "fast"), ("b", "small")):
        random_image(home.place / f"{name}.img", 4 * MIB)
        disks.append(DiskSpec(name, str(home.place / f"{name}.img"), "raw", "dmthin", pool))
    with home.store.add("bare", MachineSpec(memory=32 * MIB, accel="tcg", net="none",
                                            disks=tuple(disks))) as machine:
        yield machine


def test_create(home: Home) -> None:
    count = home.runs(home.web, "present")
    for point in SWEEPS["create"]:
        before = home.epochs()
        home.strike(point, "create", "web")
        home.settle()
        made = home.epochs() - before
        assert len(made) == (point == "create.committed"), point
        count = home.runs(home.web, "present", count)
        after = home.web.create(f"after {point}")
        assert home.store.verify([after, *made]) == [], point
        for epoch in made:
            home.whole(home.store.epoch(epoch), "present")
        home.store.delete([after, *made])
    after = home.web.create()
    home.whole(after, "present")
    home.store.delete([after])


def test_rollback(home: Home) -> None:
    for point in SWEEPS["rollback"]:
        home.strike(point, "rollback", "web", "web@first", "--discard")
        home.settle()
        home.runs(home.web, "sealed" if point in SWITCHED else "present")
        ctl(home.web, "nonce", "set", "present")
    home.whole(home.first, "sealed")


def test_fork(home: Home) -> None:
    count = home.runs(home.web, "present")
    for point in SWEEPS["fork"]:
        home.strike(point, "fork", "web@first", "trial")
        home.settle()
        names = [machine.name for machine in home.store.machines()]
        assert names == (["trial", "web"] if point in FORKED else ["web"]), point
        if point in FORKED:
            trial = home.store.machine("trial")
            home.runs(trial, "sealed")
            trial.remove(force=True)
            home.check()
        count = home.runs(home.web, "present", count)


def test_delete(home: Home) -> None:
    """In the middle of the graph."""
    for point in SWEEPS["delete"]:
        middle = home.web.create()
        count = home.runs(home.web, "present")
        last = home.web.create()
        home.strike(point, "delete", middle.id)
        home.settle()
        assert home.epochs() == {home.first.id, last.id}, point
        home.whole(last, "present")
        home.store.delete([last])
        home.runs(home.web, "present", count)


def test_start(home: Home, bare: Machine) -> None:
    for point in SWEEPS["start"]:
        home.strike(point, "start", "bare")
        home.settle()
        committed = point == "start.committed"
        assert bare.status()["state"] == ("running" if committed else "off"), point
        if not committed:
            assert bare.start() == "started"
        bare.create()
        home.check()
        bare.stop(kill=True)
        home.check()
    assert home.store.verify() == []


def test_recovery_of_a_create_is_killed_too(home: Home, bare: Machine) -> None:
    """With the hypervisor there, and without: a guest in the middle of its work for the one."""
    count = home.runs(home.web, "present")
    before = home.epochs()
    for struck in ("create.paused", "create.disks-frozen", "create.disks-sealed"):
        home.strike(struck, "create", "web")
        for point in SWEEPS["undo-create"]:
            home.strike(point, "recover")
        home.settle()
        assert home.epochs() == before
        count = home.runs(home.web, "present", count)
    bare.start()
    home.strike("create.disks-frozen", "create", "bare")
    record = home.store.files.catalog.instance_of(bare.record.id)
    assert record is not None
    record.process.kill()
    for point in SWEEPS["undo-create"]:
        home.strike(point, "recover")
    home.settle()
    assert home.epochs() == before
    assert bare.status()["state"] == "died"
    assert bare.start() == "started"
    assert home.store.verify([bare.create()]) == []


def test_recovery_of_a_rollback_is_killed_too(home: Home) -> None:
    for struck in ("rollback.prepared", "rollback.switched"):
        switched = struck in SWITCHED
        home.strike(struck, "rollback", "web", "web@first", "--discard")
        for point in SWEEPS["undo-switch"]:
            if (point in SWITCHED) == switched:
                home.strike(point, "recover")
        home.settle()
        home.runs(home.web, "sealed" if switched else "present")
        ctl(home.web, "nonce", "set", "present")


def test_recovery_of_an_add_is_killed_too(home: Home) -> None:
    """One disk is copied, the other one cannot be read; undoing that is killed. A disk may then be
    added where it was to be."""
    random_image(home.place / "good.img", 4 * MIB)
    good = f"a={home.place / 'good.img'},format=raw,backend=dmthin,pool=fast"
    bad = failing_disk("bad")
    try:
        for point in SWEEPS["undo-add"]:
            home.strike(point, "add", "broken", "--memory", "64M", "--disk", good,
                        "--disk", f"b={bad},format=raw,backend=dmthin,pool=small")
    finally:
        open_driver().remove("bad")
    home.settle()
    assert [machine.name for machine in home.store.machines()] == ["web"]
    run_cli(home.store.files.path, "add", "broken", "--memory", "64M", "--disk", good)
    home.store.machine("broken").remove()
    home.check()


@pytest.mark.parametrize("kind", ["device", "file"])
def test_pool_create(home: Home, kind: str) -> None:
    path = home.place / "extra.img" if kind == "file" else OTHER
    size = ["--size", "32M"] if kind == "file" else []
    pool_label.erase(OTHER)
    for point in SWEEPS[f"pool-create-{kind}"]:
        recorded = point == "pool-create.recorded"
        home.strike(point, "pool", "create", "extra", str(path), *size)
        home.settle(idle=recorded)
        names = [pool.record.name for pool in home.store.pools()]
        assert names == (["extra"] if recorded else []) + ["fast", "small"], point
        if recorded:
            assert home.store.pool("extra").trouble is None
            home.store.remove_pool("extra")
        gone(path)
    home.store.create_pool("extra", path, size=32 * MIB if kind == "file" else None)
    home.store.remove_pool("extra")
    gone(path)
    home.check()


def gone(path: Path) -> None:
    """Nothing of a pool is left on a file or device: another one could be made there."""
    if path == OTHER:
        check_device(path)
    else:
        assert not path.exists()


def test_pool_extend(home: Home) -> None:
    """The pool is in use meanwhile. Killed, it is extended nevertheless; and again after that."""
    count = home.runs(home.web, "present")
    for point in SWEEPS["pool-extend"]:
        room, size = home.store.pool("small").room, home.small.stat().st_size
        assert room is not None
        home.strike(point, "pool", "extend", "small", "--size", f"{size // MIB + 8}M")
        home.settle()
        for more in (8, 16):
            if more == 16:
                home.store.extend_pool("small", size=size + more * MIB)
            larger = home.store.pool("small").room
            assert larger is not None
            assert larger.data_total == room.data_total + more * MIB, point
            assert home.small.stat().st_size == size + more * MIB
        home.check()
        count = home.runs(home.web, "present", count)
    after = home.web.create()
    home.whole(after, "present")
    home.store.delete([after])


@pytest.mark.parametrize("kind", ["device", "file"])
def test_pool_remove(home: Home, kind: str) -> None:
    path = home.place / "extra.img" if kind == "file" else OTHER
    for point in SWEEPS[f"pool-remove-{kind}"]:
        home.store.create_pool("extra", path, size=32 * MIB if kind == "file" else None)
        home.strike(point, "pool", "remove", "extra")
        home.settle()
        assert [pool.record.name for pool in home.store.pools()] == ["fast", "small"], point
        gone(path)


@pytest.mark.parametrize("moved", [1, 2])
def test_killed_between_pool_and_catalog(home: Home, moved: int) -> None:
    """A pool has moved on (one of two, or both), the transaction in the catalog is not committed:
    however often that happens they come together again."""
    count = home.runs(home.web, "present")
    before = home.epochs()
    for command in (["create", "web"], ["recover"], ["recover"]):
        assert forked(home.store.files.path, partial(kill_in_commit, moved),
                      *command) == -signal.SIGKILL, command
    home.settle()
    assert home.epochs() == before
    home.runs(home.web, "present", count)


def kill_in_commit(moved: int) -> None:
    """From now on this process dies when it has moved on so many pools."""
    advance = DmThinBackend.advance
    left = moved

    def then_die(self: DmThinBackend, pool_id: str) -> int:
        nonlocal left
        number = advance(self, pool_id)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    DmThinBackend.advance = then_die  # type: ignore[method-assign]


def test_the_metadata_is_whole(home: Home) -> None:
    """Of the pools in which all this was done."""
    home.web.stop(kill=True)
    home.store.files.rest()
    check_closed(home.store)


def test_every_point_was_struck(home: Home) -> None:
    """Of a whole run of this file."""
    assert home.struck == VISITED
