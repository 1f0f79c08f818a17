"""The binding to libdevmapper against the real driver."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from blockcow import BlockError
from blockcow.devmapper import (
    DeviceMapper,
    DmBusy,
    DmError,
    DmExists,
    DmMissing,
    Target,
)
from blockcow.nodes import wait_for

UML = ["--disk", "64M"]
DISK = "/dev/ubdb"
NOTHING = Target(0, 2048, "error", "")


def test_a_device_comes_and_goes(dm: DeviceMapper) -> None:
    node = dm.create("one", "EPOCHS-one", [NOTHING])
    assert node == Path("/dev/mapper/one")
    assert node.is_block_device()
    assert dm.devices() == ["one"]
    assert dm.devices("o") == ["one"]
    assert dm.devices("x") == []
    info = dm.info("one")
    assert info is not None
    assert (info.suspended, info.live_table, info.read_only, info.open_count) == (
        False, True, False, 0)
    assert dm.table("one") == [NOTHING]
    dm.remove("one")
    dm.remove("one")
    assert not node.exists()
    assert dm.info("one") is None


def test_tables_of_several_targets(dm: DeviceMapper) -> None:
    targets = [Target(0, 8, "linear", f"{DISK} 100"), Target(8, 8, "error", ""),
               Target(16, 16, "linear", f"{DISK} 0")]
    dm.create("parts", "EPOCHS-parts", targets, read_only=True)
    found = dm.table("parts")
    assert [(one.start, one.length, one.kind) for one in found] == [
        (0, 8, "linear"), (8, 8, "error"), (16, 16, "linear")]
    assert [one.kind for one in dm.status("parts")] == ["linear", "error", "linear"]
    info = dm.info("parts")
    assert info is not None
    assert info.read_only
    stat = Path(DISK).stat()
    assert dm.deps("parts") == [(stat.st_rdev >> 8, stat.st_rdev & 0xFF)]
    dm.remove("parts")


def test_another_table_while_it_is_suspended(dm: DeviceMapper) -> None:
    with Path(DISK).open("r+b") as disk:
        disk.write(b"first".ljust(512, b"\0") + b"second".ljust(512, b"\0"))
    dm.create("moves", "EPOCHS-moves", [Target(0, 1, "linear", f"{DISK} 0")])
    with Path("/dev/mapper/moves").open("rb", buffering=0) as moves:
        assert moves.read(5) == b"first"
        dm.load("moves", [Target(0, 1, "linear", f"{DISK} 1")])
        dm.suspend("moves")
        dm.suspend("moves")
        info = dm.info("moves")
        assert info is not None
        assert info.suspended
        assert info.inactive_table
        dm.rename("moves", "moved")
        cookie = dm.cookie()
        dm.resume_later("moved", cookie)
        cookie.wait()
        cookie.wait()
        assert dm.table("moved")[0].params.endswith(" 1")
        with pytest.raises(DmBusy, match="cannot remove moved: Device or resource busy"):
            dm.remove("moved")
    dm.remove("moved")


def test_errors_have_their_kind_and_the_kernels_reason(dm: DeviceMapper) -> None:
    dm.create("one", "EPOCHS-one", [NOTHING])
    with pytest.raises(DmExists):
        dm.create("one", "EPOCHS-two", [NOTHING])
    assert dm.table("one") == [NOTHING], "the one that was there is left alone"
    with pytest.raises(DmError, match="too small for target") as caught:
        dm.create("two", "EPOCHS-two", [Target(0, 8, "linear", f"{DISK} 99999999")])
    assert caught.value.errno == 22
    with pytest.raises(DmError, match="unknown target type"):
        dm.create("two", "EPOCHS-two", [Target(0, 8, "no-such-target", "")])
    assert dm.devices() == ["one"], "what could not be made is gone"
    for ask in (dm.status, dm.table, dm.resume):
        with pytest.raises(DmMissing):
            ask("two")
    with pytest.raises(DmError, match="does not support messages"):
        dm.message("one", "hello")
    for name in ("", "a/b", "x" * 128, "a b"):
        with pytest.raises(BlockError, match="not a name"):
            dm.create(name, "EPOCHS-x", [NOTHING])
    dm.remove("one")


def test_a_node_is_waited_for(dm: DeviceMapper) -> None:
    def later() -> None:
        time.sleep(0.5)  # so that the other side waits
        dm.create("late", "EPOCHS-late", [NOTHING])

    thread = threading.Thread(target=later)
    thread.start()
    assert wait_for(Path("/dev/mapper/late"), 10).is_block_device()
    thread.join()
    dm.remove("late")
    with pytest.raises(BlockError, match="did not appear within 0 s"):
        wait_for(Path("/dev/mapper/never"), 0.2)
