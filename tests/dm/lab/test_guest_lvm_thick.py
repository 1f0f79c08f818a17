"""A guest on ordinary volumes of LVM, with classic snapshots: the story without forks, and random
operations with the witness writing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.points import FaultInjected
from tests.commands import run_cli
from tests.dm.lab.story import OPERATIONS, negative_control, story
from tests.dm.lab.volumes import GROUP, group, lvm, volume, volumes
from tests.system.files import files_story, shell
from tests.system.guest import Artefacts, check_disks, ctl, wait_console, wait_witness
from tests.system.model import Model

UML = ["--disk", "3G"]


@pytest.fixture
def given(tiny: Artefacts) -> Iterator[dict[str, str]]:
    """The guest's disks as volumes; nothing of ours is left in the group afterwards."""
    with group("/dev/ubdb"):
        yield {name: volume(name, tiny.directory / f"{name}.img", thin=False) for name in "ab"}
        assert {one["lv_name"] for one in volumes()} == {"a", "b"}
        lvm("lvchange", "--activate", "n", GROUP)


@pytest.fixture
def web(given: dict[str, str], store: Store, boot: Callable[..., Machine]) -> Machine:
    return boot("lvm", **given)


def test_story(web: Machine, store: Store, tmp_path: Path) -> None:
    assert {disk["backend"] for disk in web.status()["disks"]} == {"lvm-thick"}
    story(store, web, tmp_path, forks=False)
    files_story(store, web, tmp_path)
    negative_control(store, web, forks=False)


def test_a_snapshot_that_gets_full(given: dict[str, str], store: Store, tiny: Artefacts,
                                   tmp_path: Path) -> None:
    """Its epoch is damaged and said to be; the guest, and what came later, are as they were."""
    spec = tiny.spec()
    web = store.add("web", replace(spec, disks=tuple(
        replace(disk, backend="lvm", file=given[disk.name], snapshot=8 * 2**20)
        for disk in spec.disks)))
    web.start()
    wait_console(web, "TINY READY", limit=180)
    web.wait_agent()
    first = web.create()
    shell(web, "dd if=/dev/urandom of=/a/fill bs=64k count=256 conv=fsync 2>/dev/null; sync")
    count = wait_witness(web, 0)
    done = run_cli(store.files.path, "rollback", "web", first.id, "--discard", check=False)
    assert done.returncode == 6, done.stderr
    assert "is full and what it kept is lost" in done.stderr
    assert "snapshot=SIZE" in done.stderr
    assert "is full" in (store.epoch(first.id).record.damaged or "")
    assert web.status()["state"] == "running"
    wait_witness(web, count + 10)
    ctl(web, "nonce", "set", "later")
    second = web.create()
    assert store.verify([second]) == []
    assert [finding.epoch for finding in store.verify()] == [first.id]
    ctl(web, "nonce", "set", "lost")
    web.rollback(second, keep=False)
    assert ctl(web, "nonce", "get") == "later"
    wait_witness(web, count)
    check_disks(store, second, tmp_path)
    # Going back must not fill up the snapshot of another epoch.
    third = web.create()
    shell(web, "for i in 1 2 3; do dd if=/dev/urandom of=/b/fill bs=64k count=70 seek=$((i*70)) "
               "conv=fsync,notrunc 2>/dev/null; done; sync")
    refused = run_cli(store.files.path, "rollback", "web", third.id, "--discard", check=False)
    assert refused.returncode == 6, "the third one's is full now, too"
    assert web.status()["state"] == "running"
    wait_witness(web, wait_witness(web, 0) + 10)
    store.delete([first, second, third])
    assert store.verify([web.create()]) == []


@pytest.mark.timeout(2000)
def test_a_rollback_that_fails_leaves_a_paused_guest_paused(
        web: Machine, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was to run afterwards. One that ran goes on: the old guest is held before."""
    epoch = web.create()
    monkeypatch.setenv("EPOCHS_FAULT", "rollback.prepared:fail")
    for state in ("running", "paused"):
        with pytest.raises(FaultInjected):
            web.rollback(epoch, keep=False, running=True)
        assert web.status()["state"] == state
        web.pause()
    monkeypatch.undo()
    web.rollback(epoch, keep=False, running=True)
    assert web.status()["state"] == "running"


def test_random_operations(web: Machine, store: Store, tmp_path: Path) -> None:
    model = Model(store, web, random.Random(20261127), forks=False, boot_limit=180,
                  epochs=8)
    model.run(OPERATIONS, "lvm-thick")
    model.check_everything(tmp_path)
