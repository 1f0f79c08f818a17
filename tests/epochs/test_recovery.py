"""Recovery where a first attempt at it was cut off, or where the world moved on meanwhile.

No guest runs here: layers are real qcow2 files, and an interrupted command is a journal row whose
process is gone. tests/system/test_faults.py does the same with guests and kills.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from blockcow import Layer, LayerDamaged
from blockcow.source import probe
from epochs import Store
from epochs.catalog import (
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    JournalRecord,
    MachineRecord,
    new_journal,
)
from epochs.errors import Failed, NotFound
from epochs.points import FaultInjected
from epochs.processes import ProcessId, boot_id
from epochs.protocol import create, recover, upkeep, verify
from epochs.protocol.instances import state
from epochs.protocol.journal import operation
from epochs.qemu.connection import open_monitor
from epochs.spec import MachineSpec
from epochs.store import StoreFiles, new_id

DEAD = ProcessId(2**22 + 1, 1, boot_id())  # above the largest pid that Linux gives
MIB = 2**20


class World:
    """A store with machine "web", which has one disk: base, and an active overlay over it."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(directory / "store")
        self.files: StoreFiles = self.store.files
        self.disks = self.files.backend("qcow2")
        image = directory / "base.img"
        image.write_bytes(bytes(64 * MIB))
        self.base = self.disks.adopt(probe(image, "raw"), new_id())
        self.active = self.disks.clone([self.base], new_id())
        self.machine = MachineRecord(new_id(), "web", MachineSpec(memory=64 * MIB), 1.0,
                                     "pc-q35-7.2", "52:54:00:00:00:01", "tcg", None)
        with self.files.catalog.transaction():
            for layer in (self.base, self.active):
                self.files.catalog.put_layer(layer)
            self.files.catalog.add_machine(
                self.machine, [DiskRecord("root", "qcow2", self.base.id, self.active.id)])
        (self.files.path / "machines" / self.machine.id).mkdir()

    def killed(self, kind: str, plan: dict[str, Any], phase: str = "preparing") -> JournalRecord:
        """A journal row that a killed command left."""
        row = replace(new_journal(new_id(), kind, self.machine.id, plan), operator=DEAD,
                      phase=phase)
        with self.files.catalog.transaction():
            self.files.catalog.begin(row)
        return row

    def killed_create(self) -> tuple[JournalRecord, Layer]:
        """A create that was killed after its freeze, its QEMU gone too: the overlay that it made
        lies over the active layer and holds what the guest wrote since."""
        above = self.disks.clone([self.active, self.base], new_id())
        write(self.files.layers_dir / above.file, 2)
        plan = {"epoch": new_id(), "pack": new_id(), "instance": new_id(), "running": True,
                "layers": {"root": above.id}, "active": {"root": self.active.id}}
        return self.killed("create", plan), above

    def present(self) -> str:
        (disk,) = self.files.catalog.disks(self.machine.id)
        assert disk.active is not None
        return disk.active


def write(overlay: Path, byte: int) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {byte} 0 64k", str(overlay)],
                   check=True, capture_output=True)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.store.close()


def test_an_undo_that_is_killed_before_it_is_recorded(world: World,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    row, above = world.killed_create()
    monkeypatch.setenv("EPOCHS_FAULT", "undo-create.unfrozen:fail")
    with pytest.raises(FaultInjected):
        create.undo(world.files, row)
    monkeypatch.delenv("EPOCHS_FAULT")
    for _ in range(2):
        recover.recover(world.files)
        assert world.present() == above.id
        assert world.files.catalog.layer(above.id).backing == world.active.id
        assert (world.files.layers_dir / world.active.file).exists(), "what was frozen is kept"
    assert world.files.catalog.journal() == []
    assert [layer.id for layer in world.files.catalog.chain(above.id)] == [
        above.id, world.active.id, world.base.id]


@contextmanager
def files_cannot_grow(path: Path) -> Iterator[None]:
    """As a disk that is full: write(2) beyond a file's present length fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full", [True, False])
def test_a_commit_that_fails_is_undone_as_what_it_was(world: World, full: bool) -> None:
    undone: list[str] = []
    wal = world.files.path / "catalog.sqlite-wal"

    def run() -> None:
        with operation(world.files, "create", world.machine.id, {},
                       lambda _store, record: undone.append(record.phase)) as under_way:
            with world.files.catalog.transaction():
                world.files.catalog.set_head(world.machine.id, None)
                under_way.phase("committed")
                if full:
                    limit.enter()
            raise RuntimeError("after the commit")

    class Limit:
        def enter(self) -> None:
            self.held = files_cannot_grow(wal)
            self.held.__enter__()

        def leave(self) -> None:
            if full:
                self.held.__exit__(None, None, None)

    limit = Limit()
    try:
        with pytest.raises(Failed if full else RuntimeError):
            run()
    finally:
        limit.leave()
    assert undone == ["intended" if full else "committed"]


def test_nothing_is_done_to_a_machine_before_what_was_begun_on_it_is_settled(world: World) -> None:
    """A command that waited for the machine while another was killed comes after its undoing."""
    waiting = world.store.locked("web")  # has settled, does not hold the lock yet
    _, above = world.killed_create()
    with waiting:
        assert world.files.catalog.journal() == []
        assert world.present() == above.id


def test_a_row_of_a_living_process_that_gave_up(world: World) -> None:
    """Its undo failed; the process goes on. Whoever gets the machine's lock settles it."""
    row, above = world.killed_create()
    with world.files.catalog.transaction():
        world.files.catalog.end(row.id)
        world.files.catalog.begin(replace(row, operator=ProcessId.of(os.getppid())))
    assert recover.recover(world.files) == []
    assert world.present() == world.active.id
    with world.store.locked("web"):
        assert world.present() == above.id


def test_a_stale_undo_keeps_off_a_disk_that_moved_on(world: World) -> None:
    """Belt to the braces above: the layer that the create froze is not the active one any more."""
    world.killed_create()
    other = world.disks.clone([world.base], new_id())
    with world.files.catalog.transaction():
        world.files.catalog.put_layer(other)
        world.files.catalog.set_active(world.machine.id, "root", other.id)
    recover.recover(world.files)
    assert world.present() == other.id
    assert world.files.catalog.layer(other.id).checksum is None
    assert world.files.catalog.layer(other.id).backing == world.base.id


def test_a_machine_that_is_busy_is_left_to_who_holds_it(world: World) -> None:
    world.killed_create()
    with world.files.machine_lock(world.machine.id, "web"):
        done: list[object] = []
        other = threading.Thread(target=lambda: done.append(recover_elsewhere(world.files.path)))
        other.start()
        other.join(20)
        assert done == [[]], "neither waited nor settled"
    assert len(recover.recover(world.files)) == 1


def recover_elsewhere(path: Path) -> list[recover.Recovered]:
    with Store(path) as store:
        return recover.recover(store.files)


def test_what_cannot_be_settled_stops_only_its_machine(world: World,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    world.files.notice = told.append
    world.killed_create()

    def stuck(*_: object) -> None:
        raise Failed("QEMU's monitor did not answer")

    monkeypatch.setitem(recover.UNDO, "create", stuck)
    assert world.store.epochs() == []
    assert world.store.settle() == []
    assert told == ["an interrupted create cannot be settled yet: QEMU's monitor did not answer"]
    with pytest.raises(Failed, match="did not answer"), world.store.locked("web"):
        raise AssertionError("nothing may be done to it")
    monkeypatch.undo()
    with world.store.locked("web"):
        assert world.files.catalog.journal() == []


def test_a_living_hypervisor_is_never_taken_for_a_dead_one(world: World) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        instance = InstanceRecord(new_id(), world.machine.id, ProcessId.of(process.pid), "qemu",
                                  {}, 1.0, False)
        with world.files.catalog.transaction():
            world.files.catalog.put_instance(instance, [])
        try:
            for look in (lambda: open_monitor(world.files, instance),
                         lambda: state(world.files, world.machine)):
                with pytest.raises(Failed, match="runs but cannot be reached"):
                    look()
        finally:
            process.kill()
    assert state(world.files, world.machine).word == "died", "the control"


def merged(world: World) -> tuple[Layer, Layer, JournalRecord]:
    """A frozen layer, its replacement (built, not promoted), the row of who built it."""
    low = world.disks.seal_layer(world.active)  # type: ignore[attr-defined]
    top = world.disks.clone([low, world.base], new_id())
    write(world.files.layers_dir / top.file, 7)
    top = world.disks.seal_layer(top)  # type: ignore[attr-defined]
    with world.files.catalog.transaction():
        for layer in (low, top):
            world.files.catalog.put_layer(layer)
        world.files.catalog.add_epoch(
            EpochRecord("e" * 32, world.machine.id, "web", None, 1.0, "", world.machine.spec,
                        {}, "", "", 0, False, {}), {"root": top.id}, [])
        world.files.catalog.set_active(world.machine.id, "root", None)
    built = world.disks.consolidate([top, low, world.base], 2)
    row = replace(new_journal(new_id(), "consolidate", None, {
        "layer": top.id, "backend": "qcow2", "replacement": asdict(built)}), operator=DEAD,
        phase="built")
    with world.files.catalog.transaction():
        world.files.catalog.begin(row)
    return top, built, row


def test_an_undone_merge_that_is_killed_before_it_is_recorded(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    top, built, row = merged(world)
    monkeypatch.setenv("EPOCHS_FAULT", "undo-consolidate.dropped:fail")
    with pytest.raises(FaultInjected):
        upkeep.undo_consolidate(world.files, row)
    monkeypatch.delenv("EPOCHS_FAULT")
    assert not (world.files.layers_dir / built.file).exists()
    upkeep.undo_consolidate(world.files, row)
    assert world.files.catalog.journal() == []
    assert world.files.catalog.layer(top.id) == top


def test_a_merge_that_was_promoted_is_recorded(world: World) -> None:
    top, built, row = merged(world)
    promoted = world.disks.promote(built)
    upkeep.undo_consolidate(world.files, row)
    assert world.files.catalog.layer(top.id) == promoted


def test_a_merge_gone_with_its_layer_is_damage(world: World) -> None:
    top, built, row = merged(world)
    (world.files.layers_dir / built.file).unlink()
    with (world.files.layers_dir / top.file).open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(LayerDamaged):
        upkeep.undo_consolidate(world.files, row)


def test_a_layer_that_is_merged_while_it_is_verified_is_not_damaged(world: World) -> None:
    top, built, row = merged(world)
    promoted = world.disks.promote(built)  # in its place, but its row still says the old one
    verify._check_layer(world.files, top, full=True)
    with world.files.catalog.transaction():
        world.files.catalog.put_layer(promoted)
        world.files.catalog.end(row.id)
    verify._check_layer(world.files, top, full=True)  # read before, by now another one
    with (world.files.layers_dir / promoted.file).open("r+b") as file:
        file.seek(promoted.size // 1024)
        file.write(b"damage")
    with pytest.raises(LayerDamaged):  # the control
        verify._check_layer(world.files, top, full=True)


def test_a_machine_that_was_replaced_under_its_name(world: World) -> None:
    """Who waited for a machine's lock does not get another machine's row with it."""
    waiting = world.store.locked("web")
    entered = threading.Event()
    held: list[str] = []

    def wait() -> None:
        with Store(world.files.path) as store, store.locked("web") as record:
            held.append(record.id)
            entered.set()

    with world.files.machine_lock(world.machine.id, "web"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3)
        new = replace(world.machine, id=new_id())
        with world.files.catalog.transaction():
            world.files.catalog.remove_machine(world.machine.id)
            world.files.catalog.add_machine(new, [])
        world.files.forget_machine_lock(world.machine.id)
    thread.join(20)
    assert held == [new.id]
    with waiting as record:
        assert record.id == new.id
    with world.files.catalog.transaction():
        world.files.catalog.remove_machine(new.id)
    with pytest.raises(NotFound), world.store.locked("web"):
        raise AssertionError("it is gone")


def test_a_store_behind_a_link_is_the_store_itself(tmp_path: Path) -> None:
    """Hypervisors are found by their working directory, which the kernel tells without links."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for path in (tmp_path / "link" / "store", tmp_path / "real" / ".." / "link" / "store"):
        with Store(path) as store:
            assert store.files.path == tmp_path.resolve() / "real" / "store"
    shutil.rmtree(tmp_path / "real")
