"""Killed anywhere, on the backends other than pools of ours (test_kills_dmthin.py): thin and
ordinary volumes of LVM, and stacked snapshots. The machine never gets beyond its firmware, which
is enough for all that devices and the catalog can get wrong; at the points between which disks
change hands a guest with the witness is killed under, too.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store
from epochs.errors import Refused
from epochs.points import POINTS
from tests.commands import run_cli
from tests.dm.lab.disks import MIB, random_image
from tests.dm.lab.volumes import GROUP, group, lvm, volume, volumes
from tests.system.guest import Artefacts, assert_tidy, check_disks, ctl, wait_witness

UML = ["--disk", "1500M"]
DEVICE = "/dev/ubdb"
FORKS = {"lvm-thin": True, "lvm-thick": False, "dmsnap": True}
SWITCHED = ("rollback.switched", "rollback.old-gone", "rollback.taken-over", "rollback.resumed")

pytestmark = pytest.mark.timeout(900)


@dataclass
class Ground:
    """Where disks are: ``put`` makes one of an image and returns what to give to `add`."""

    backend: str
    put: Callable[[str, Path], str]

    @property
    def forks(self) -> bool:
        return FORKS[self.backend]


@pytest.fixture(params=list(FORKS))
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    backend = request.param
    if backend == "dmsnap":
        yield Ground(backend, lambda _name, image: str(image))
        return
    thin = backend == "lvm-thin"
    given: set[str] = {"pool"} if thin else set()

    def put(name: str, image: Path) -> str:
        given.add(name)
        return volume(name, image, thin=thin)

    with group(DEVICE, pool="800M" if thin else None):
        yield Ground(backend, put)
        assert {one["lv_name"] for one in volumes()} == given, "nothing of ours is left"
        lvm("lvchange", "--activate", "n", GROUP)


@pytest.fixture
def bare(ground: Ground, store: Store, tmp_path: Path) -> Machine:
    disks = []
    for number, name in enumerate("ab"):
        image = tmp_path / f"{name}.img"
        random_image(image, 8 * MIB, number)
        disks.append(DiskSpec(name, ground.put(f"bare{name}", image), "raw", ground.backend))
    machine = store.add("bare", MachineSpec(memory=32 * MIB, accel="tcg", net="none",
                                            disks=tuple(disks)))
    machine.start()
    return machine


def live() -> list[str]:
    """Devices of ours: in use, or left behind."""
    done = subprocess.run(["dmsetup", "ls"], capture_output=True, text=True, check=True)
    return sorted(line.split()[0] for line in done.stdout.splitlines()
                  if line.startswith("epochs-"))


def suspended() -> list[str]:
    done = subprocess.run(["dmsetup", "info", "--columns", "--noheadings", "--options",
                           "name,suspended"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.endswith(":Suspended")]


def strike(store: Store, point: str, *command: str) -> None:
    """Run a command that is killed at a point; it must have got there."""
    done = run_cli(store.files.path, *command, fault=f"{point}:kill", check=False)
    assert done.returncode == -signal.SIGKILL, (point, done.returncode, done.stderr)


def settle(store: Store) -> None:
    run_cli(store.files.path, "recover")
    assert store.settle() == []
    assert_tidy(store)
    assert suspended() == []


def ids(store: Store) -> set[str]:
    return {epoch.id for epoch in store.epochs()}


def test_create_and_delete(ground: Ground, bare: Machine, store: Store) -> None:
    first = bare.create()
    devices = len(live())
    for point in POINTS["create"]:
        before = ids(store)
        strike(store, point, "create", "bare")
        settle(store)
        made = ids(store) - before
        assert len(made) == (point == "create.committed"), point
        assert bare.status()["state"] == "running", point
        store.delete(made)
    assert store.verify([bare.create()]) == []
    store.delete(ids(store) - {first.id})
    strike(store, "create.disks-frozen", "create", "bare")
    for point in POINTS["undo-create"]:
        strike(store, point, "recover")
    settle(store)
    for point in POINTS["delete"]:
        middle = bare.create()
        last = bare.create()
        strike(store, point, "delete", middle.id)
        settle(store)
        assert ids(store) == {first.id, last.id}, point
        assert store.verify([last]) == [], point
        store.delete([last])
    if ground.backend != "dmsnap":  # there, what lies under the active layer may have been merged
        assert len(live()) == devices, "no device is left behind"


def test_rollback_and_fork(ground: Ground, bare: Machine, store: Store) -> None:
    first = bare.create()
    for point in ("rollback.intended", *POINTS["launch"], *POINTS["rollback"][1:]):
        strike(store, point, "rollback", "bare", first.id, "--discard")
        settle(store)
        assert bare.status()["state"] == "running", point
    assert store.verify([first, bare.create()]) == []
    for struck in ("rollback.prepared", "rollback.switched"):
        strike(store, struck, "rollback", "bare", first.id, "--discard")
        strike(store, POINTS["undo-switch"][struck == "rollback.prepared"], "recover")
        settle(store)
        assert bare.status()["state"] == "running", struck
    if ground.forks:
        for point in POINTS["fork"]:  # those of launch were in the rollback
            strike(store, point, "fork", first.id, "trial")
            settle(store)
            names = [machine.name for machine in store.machines()]
            done = point in ("fork.committed", "fork.resumed")
            assert names == (["bare", "trial"] if done else ["bare"]), point
            if done:
                store.machine("trial").remove(force=True)
    bare.stop(kill=True)
    for point in POINTS["start"]:
        strike(store, point, "start", "bare")
        settle(store)
        if bare.status()["state"] != "off":
            bare.stop(kill=True)
    assert live() == [], "nothing is live once the machine is off"
    bare.start()
    assert store.verify([bare.create()]) == []


def test_under_a_guest(ground: Ground, store: Store, tiny: Artefacts, tmp_path: Path,
                       boot: Callable[..., Machine]) -> None:
    web = boot(ground.backend, **{name: ground.put(f"web{name}", tiny.directory / f"{name}.img")
                                  for name in "ab"})
    ctl(web, "nonce", "set", "sealed")
    first: Epoch = web.create()
    ctl(web, "nonce", "set", "present")
    count = wait_witness(web, 0)
    for point in ("create.disks-prepared", "create.disks-frozen", "create.disks-sealed"):
        strike(store, point, "create", "web")
        settle(store)
        assert ctl(web, "nonce", "get") == "present", point
        count = wait_witness(web, count + 5)
    check_disks(store, web.create(), tmp_path)
    for point in ("rollback.prepared", "rollback.switched", "rollback.old-gone",
                  "rollback.taken-over"):
        strike(store, point, "rollback", "web", first.id, "--discard")
        settle(store)
        assert ctl(web, "nonce", "get") == ("sealed" if point in SWITCHED else "present"), point
        wait_witness(web, wait_witness(web, 0) + 5)
        ctl(web, "nonce", "set", "present")
    check_disks(store, first, tmp_path)
    assert store.verify() == []


def test_thin_and_ordinary_volumes_together(store: Store, tmp_path: Path) -> None:
    """One machine with both in one group: nobody waits for the lock that the other one has. And
    going back is refused to another machine's volume."""
    with group(DEVICE, pool="200M"):
        disks = []
        for name, thin in (("a", True), ("b", False), ("c", True)):
            random_image(tmp_path / f"{name}.img", 8 * MIB)
            disks.append(DiskSpec(name, volume(name, tmp_path / f"{name}.img", thin=thin), "raw",
                                  "lvm"))
        spec = MachineSpec(memory=32 * MIB, accel="tcg", net="none", disks=tuple(disks))
        both = store.add("both", spec)
        both.start()
        first = both.create()
        strike(store, "create.paused", "create", "both")
        settle(store)
        second = both.create()
        both.rollback(first, keep=True)
        assert store.verify() == []
        store.delete([second])
        other = volume("other", tmp_path / "b.img", thin=False)
        two = store.add("two", MachineSpec(memory=32 * MIB, accel="tcg", net="none", disks=(
            disks[0], DiskSpec("b", other, "raw", "lvm"), disks[2])))
        with pytest.raises(Refused, match="is on another volume"):
            two.rollback(first, keep=False)
        for machine in (both, two):
            machine.remove(force=True, with_epochs=True)
        store.delete(store.epochs())
        assert {one["lv_name"] for one in volumes()} == {"a", "b", "c", "other", "pool"}
        lvm("lvchange", "--activate", "n", GROUP)
