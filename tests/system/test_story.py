"""The main story on a real guest, on every supported QEMU: create, rollback, fork, delete."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Incompatible, Refused
from epochs.protocol import switch
from epochs.qemu import seal
from epochs.qemu.command import RAM_BLOCK
from epochs.qemu.connection import open_monitor
from epochs.qemu.ramblocks import locate

from .conftest import required
from .guest import (
    Artefacts,
    WitnessFailed,
    check_disks,
    ctl,
    mounted,
    wait_console,
    wait_witness,
)
from .oracle import assert_same_memory, image_of, memory_of_the_pause

pytestmark = pytest.mark.guest
Boot = Callable[..., Machine]


def test_memory_and_disks_come_back_as_one(store: Store, boot: Boot,
                                           tmp_path: Path) -> None:
    web = boot()
    ctl(web, "nonce", "set", "before")
    before = web.create("before the upgrade", tags=["before"])
    count = wait_witness(web, 0)
    ctl(web, "nonce", "set", "after")
    wait_witness(web, count + 50)
    done = web.rollback("web@before", keep=True)
    assert ctl(web, "nonce", "get") == "before", "resumed, not rebooted"
    wait_witness(web, count)
    kept = store.epoch(done["kept"])
    assert kept.parent == before.id
    trials = store.fork_many(kept, ["trial-1", "trial-2"])
    for trial in trials:
        assert ctl(trial, "nonce", "get") == "after"
        ctl(trial, "nonce", "set", trial.name)
    for trial in trials:
        assert ctl(trial, "nonce", "get") == trial.name, "forks share nothing that they change"
        wait_witness(trial, 0)
    assert ctl(web, "nonce", "get") == "before"
    for epoch in store.epochs():
        check_disks(store, epoch, tmp_path)
    assert store.verify() == []
    store.delete([before])
    assert ctl(web, "nonce", "get") == "before"
    wait_witness(web, count)
    assert store.verify() == []
    check_disks(store, store.epoch(kept.id), tmp_path)


def mixed_layers(original: Callable[[str], dict[str, str]], wrong: str,
                 epoch: str) -> dict[str, str]:
    """An epoch's layers with disk b of another epoch: what must never happen, on purpose."""
    return {**original(epoch), "b": original(wrong)["b"]}


def test_the_witness_sees_memory_over_another_epoch_s_disk(
        store: Store, boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the check that the other tests rely on can fail."""
    web = boot()
    first = web.create()
    wait_witness(web, 200)
    second = web.create()
    for memory, disk in ((first, second), (second, first)):
        mixed = replace(memory.record, id=memory.id)
        with monkeypatch.context() as patch:
            patch.setattr(store.files.catalog, "epoch_layers",
                          partial(mixed_layers, store.files.catalog.epoch_layers, disk.id))
            (record,) = switch.fork(store.files, mixed, ["mixed"])
        broken = store.machine(record.name)
        with pytest.raises(WitnessFailed, match="MISMATCH"):
            for beyond in range(0, 3000, 50):
                wait_witness(broken, beyond)
        broken.remove(force=True)
    wait_witness(web, 200)


def test_a_stopped_machine_boots_from_its_present_disks(store: Store, boot: Boot) -> None:
    web = boot()
    web.create()
    count = wait_witness(web, 100)
    said = web.console_log.stat().st_size
    web.stop()
    assert web.status()["state"] == "off"
    with pytest.raises(Refused, match="is off"):
        web.create()
    with pytest.raises(Refused, match="--discard"):
        web.rollback()
    assert web.start() == "started"
    wait_console(web, "TINY READY", since=said)
    assert wait_witness(web, 0) >= count - 50, "the witness adopted what its disks hold"
    web.create("after a reboot")
    web.rollback(keep=False)
    wait_witness(web, 0)


def test_a_paused_machine_stays_paused(store: Store, boot: Boot) -> None:
    web = boot()
    web.pause()
    epoch = web.create()
    assert web.status()["state"] == "paused"
    web.rollback(epoch, keep=False)
    assert web.status()["state"] == "paused"
    fork = store.fork(epoch, "held", paused=True)
    assert fork.status()["state"] == "paused"
    assert web.start() == "resumed"
    wait_witness(web, 0)


def test_an_epoch_is_the_memory_of_its_pause(store: Store, boot: Boot,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was copied ahead while the guest went on writing."""
    web = boot(cpus=2)
    epochs = []
    with memory_of_the_pause(store, web, monkeypatch) as seen:
        for number in range(8):
            ctl(web, "dirty", "12")
            epochs.append(web.create(flat=number == 5 or None))
    assert max(epoch.stats["pages_precopied"] for epoch in epochs) > 3000
    for number, (epoch, memory) in enumerate(zip(epochs, seen, strict=True)):
        assert_same_memory(image_of(store, epoch), memory, f"epoch {number}")
    assert store.verify() == []
    with pytest.raises(AssertionError, match="pages differ"):  # the control
        assert_same_memory(image_of(store, epochs[0]), seen[1], "another epoch")


def test_memory_that_a_device_writes_in_the_pause(store: Store, boot: Boot,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """No device of ours does; one of the user's own might. Device state and memory are taken again
    then, so that they are of one instant."""
    web = boot()
    saved: list[str] = []
    write = False
    pid = web.status()["pid"]
    instance = store.files.catalog.instance_of(web.record.id)
    assert instance is not None
    with open_monitor(store.files, instance) as monitor:
        ram = locate(monitor, pid, RAM_BLOCK)[0]

    def hit(point: str) -> None:
        if point == "create.memory-sealed" and write:
            with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(ram.address)
                byte = memory.read(1)
                memory.seek(ram.address)
                memory.write(byte)

    original = seal._save_state
    monkeypatch.setattr(seal.points, "hit", hit)
    monkeypatch.setattr(seal, "_save_state", lambda work: (saved.append(""), original(work)))
    web.create()
    assert len(saved) == 1, "the control: nobody wrote"
    write = True
    epoch = web.create()
    assert len(saved) == 3
    with store.fork(epoch, "trial") as trial:
        wait_witness(trial, 0)


def test_every_ram_block_comes_back(store: Store, boot: Boot) -> None:
    """The picture on the screen is that of the epoch, after the screen changed in between."""
    web = boot(vga=True)
    ctl(web, "pause")
    web.exec(["/bin/sh", "-c", "printf '\\033[?25l\\033[2J\\033[H epoch one ' > /dev/tty1"])
    web.pause()
    shot = web.screenshot()
    epoch = web.create()
    web.start()
    web.exec(["/bin/sh", "-c", "printf '\\033[2J\\033[H something else ' > /dev/tty1"])
    web.pause()
    assert web.screenshot() != shot
    web.rollback(epoch, keep=False)
    assert web.screenshot() == shot
    assert store.files.thumbnail_file(epoch.id).read_bytes().startswith(b"\x89PNG")


def test_an_epoch_of_another_release_is_refused(any_qemu: str, store: Store, boot: Boot,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    web = boot()
    epoch = web.create()
    count = wait_witness(web, 0)
    other = (Path("/usr/bin") if any_qemu == "10.0" else required("EPOCHS_QEMU10"))
    monkeypatch.setenv("EPOCHS_QEMU", str(other / "qemu-system-x86_64"))
    made = rf"made by QEMU {re.escape(any_qemu)}.*cannot be loaded"
    with pytest.raises(Incompatible, match=made):
        web.rollback(epoch, keep=False)
    wait_witness(web, count)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_reflink_disks(tmp_path: Path, tiny: Artefacts, kind: str) -> None:
    """A store on a file system with reflinks chooses that backend by itself, and mixes it with
    qcow2 where asked to."""
    with mounted(tmp_path, kind) as mount, Store(mount / "store") as store:
        spec = tiny.spec()
        disks = (spec.disks[0], replace(spec.disks[1], backend="qcow2"))
        web = store.add("web", replace(spec, disks=disks))
        try:
            assert [disk["backend"] for disk in web.status()["disks"]] == ["reflink", "qcow2"]
            web.start()
            wait_console(web, "TINY READY")
            web.wait_agent()
            count = wait_witness(web, 0)
            ctl(web, "nonce", "set", "one")
            first = web.create()
            ctl(web, "nonce", "set", "two")
            wait_witness(web, count + 50)
            second = web.create()
            web.rollback(first, keep=False)
            assert ctl(web, "nonce", "get") == "one"
            wait_witness(web, count)
            trial = store.fork(second, "trial")
            assert ctl(trial, "nonce", "get") == "two"
            wait_witness(trial, count + 50)
            store.delete([first])
            assert store.verify() == []
            check_disks(store, second, tmp_path)
            wait_witness(web, count)
        finally:
            for machine in store.machines():
                machine.remove(force=True, with_epochs=True)
        assert list(store.files.layers_dir.iterdir()) == []
