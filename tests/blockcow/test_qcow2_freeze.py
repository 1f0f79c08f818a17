"""Freezing qcow2 disks in a running QEMU."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from blockcow_qemu import MIB, Live, QmpRefused, assert_same, image_bytes

from blockcow import Backend, BlockError, Freeze, Layer


def running(disks: Backend, start: Callable[..., Live], base: Layer) -> tuple[Live, Layer]:
    active = disks.clone([base], "a0")
    return start(disks.blockdev([active, base], "n0")), active


def test_freeze_leaves_the_old_layer_frozen_and_the_guest_on_a_new_one(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer, base: object
) -> None:
    live, active = running(disks, start, adopted)
    live.write("n0", 0, 4096, 1)
    ticket = disks.prepare_freeze(
        live, [(Freeze("root", active, "a1", "n0", "n1"), [active, adopted])]
    )
    before = len(live.executed)
    ticket.freeze()
    assert live.executed[before:] == ["transaction"]
    (frozen,) = ticket.seal()
    assert frozen.frozen.id == "a0" and frozen.active.backing == "a0"
    assert frozen.active == Layer("a1", "qcow2", "qcow2", "a1.qcow2", 8 * MIB, "a0")
    expected = b"\x01" * 4096 + bytes(MIB - 4096) + b"\x11" * MIB + bytes(6 * MIB)
    assert_same(image_bytes(layers / "a0.qcow2"), expected)
    content, inode = (layers / "a0.qcow2").read_bytes(), (layers / "a0.qcow2").stat()
    live.write("n1", 0, 2 * MIB, 7)
    live.io("n1", "flush")
    assert_same((layers / "a0.qcow2").read_bytes(), content)
    assert (layers / "a0.qcow2").stat().st_mtime_ns == inode.st_mtime_ns
    disks.check(frozen.frozen, full=True)
    with pytest.raises(QmpRefused, match=r"Block node is read-only|Operation not permitted"):
        live.write("n0", 0, 4096, 9)
    opened = live.open_files()
    assert opened[str(layers / "a0.qcow2")] == {os.O_RDONLY}
    assert opened[str(layers / "a1.qcow2")] == {os.O_RDWR}
    live.close()
    assert_same(image_bytes(layers / "a1.qcow2"), b"\x07" * (2 * MIB) + bytes(6 * MIB))


def test_files_are_private(disks: Backend, layers: Path, adopted: Layer) -> None:
    disks.clone([adopted], "a0")
    assert stat.S_IMODE((layers / "a0.qcow2").stat().st_mode) == 0o600


def two_disks(
    disks: Backend, start: Callable[..., Live], base: Layer
) -> tuple[Live, list[tuple[Freeze, list[Layer]]]]:
    one, two = disks.clone([base], "one"), disks.clone([base], "two")
    graph = [*disks.blockdev([one, base], "d1"), *disks.blockdev([two, base], "d2")]
    unique = {entry["node-name"]: entry for entry in graph}
    live = start(list(unique.values()))
    parts = [
        (Freeze("root", one, "one1", "d1", "d1n"), [one, base]),
        (Freeze("data", two, "two1", "d2", "d2n"), [two, base]),
    ]
    return live, parts


def test_two_disks_freeze_as_one(
    disks: Backend, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    ticket = disks.prepare_freeze(live, parts)
    ticket.freeze()
    outcome = ticket.seal()
    assert [(f.disk, f.frozen.id, f.active.id) for f in outcome] == [
        ("root", "one", "one1"),
        ("data", "two", "two1"),
    ]


def test_a_freeze_that_fails_for_the_second_disk_leaves_the_first_untouched(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    ticket = disks.prepare_freeze(live, parts)
    live.execute("blockdev-del", **{"node-name": "d2n"})
    with pytest.raises(BlockError, match="QEMU did not freeze the disks"):
        ticket.freeze()
    ticket.abort()
    live.write("d1", 0, 4096, 5)
    live.write("d2", 0, 4096, 6)
    nodes = {n["node-name"] for n in live.execute("query-named-block-nodes", flat=True)}
    assert not {"d1n", "d2n"} & nodes
    assert sorted(p.name for p in layers.iterdir()) == ["one.qcow2", "two.qcow2"]
    live.close()
    assert image_bytes(layers / "one.qcow2")[:4096] == b"\x05" * 4096
    assert image_bytes(layers / "two.qcow2")[:4096] == b"\x06" * 4096


def test_prepare_that_fails_leaves_nothing(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    (layers / "two1.qcow2").write_text("in the way")
    with pytest.raises(BlockError, match=r"two1\.qcow2 exists already"):
        disks.prepare_freeze(live, parts)
    assert (layers / "two1.qcow2").read_text() == "in the way"
    assert sorted(p.name for p in layers.iterdir()) == ["one.qcow2", "two.qcow2", "two1.qcow2"]
    nodes = {n["node-name"] for n in live.execute("query-named-block-nodes", flat=True)}
    assert "d1n" not in nodes


def test_abort_before_the_freeze_removes_nodes_and_files(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    disks.prepare_freeze(live, parts).abort()
    assert sorted(p.name for p in layers.iterdir()) == ["one.qcow2", "two.qcow2"]
    disks.prepare_freeze(live, parts).freeze()  # the names are free again


def test_abort_after_the_freeze_touches_nothing(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    ticket = disks.prepare_freeze(live, parts)
    ticket.freeze()
    live.write("d1n", 0, 4096, 3)
    ticket.abort()
    live.io("d1n", "read -P 3 0 4096")
    assert len(ticket.seal()) == 2


def test_seal_before_freeze_is_refused(
    disks: Backend, start: Callable[..., Live], adopted: Layer
) -> None:
    live, parts = two_disks(disks, start, adopted)
    ticket = disks.prepare_freeze(live, parts)
    with pytest.raises(BlockError, match=r"call freeze\(\) before seal\(\)"):
        ticket.seal()


def test_frozen_layers_are_shared_by_processes(
    disks: Backend, start: Callable[..., Live], adopted: Layer
) -> None:
    live, active = running(disks, start, adopted)
    live.write("n0", 0, 4096, 1)
    ticket = disks.prepare_freeze(
        live, [(Freeze("root", active, "a1", "n0", "n1"), [active, adopted])]
    )
    ticket.freeze()
    frozen = ticket.seal()[0].frozen
    for number in range(3):
        fork = disks.clone([frozen, adopted], f"fork{number}")
        other = start(disks.blockdev([fork, frozen, adopted], "n"))
        other.io("n", "read -P 1 0 4096")
        other.write("n", 0, 4096, 50 + number)
    live.io("n1", "read -P 1 0 4096")


def test_an_active_layer_is_not_shared(
    disks: Backend, start: Callable[..., Live], adopted: Layer
) -> None:
    """Negative control of the locks: two writers of one file are refused by QEMU."""
    _, active = running(disks, start, adopted)
    with pytest.raises(QmpRefused, match="lock"):
        start(disks.blockdev([active, adopted], "n0"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("alive", [False, True])
def test_recover_after_a_kill(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer,
    frozen: bool, alive: bool,
) -> None:  # fmt: skip
    live, parts = two_disks(disks, start, adopted)
    live.write("d1", 0, 4096, 1)
    live.io("d1", "flush")
    ticket = disks.prepare_freeze(live, parts)
    if frozen:
        ticket.freeze()
        live.write("d1n", 4096, 4096, 2)
        live.io("d1n", "flush")
    if not alive:
        live.kill()
    for _ in range(2):  # recovering twice says the same
        state = disks.recover_freeze(live if alive else None, parts)
        ids = {disk: [layer.id for layer in held] for disk, held in state.items()}
        kept = {"root": ["one1", "one"], "data": ["two1", "two"]}
        if not frozen:
            kept = {"root": ["one"], "data": ["two"]}
        elif not alive:
            kept["data"] = ["two"]  # its overlay holds nothing
        assert ids == kept
    names = {f"{i}.qcow2" for held in kept.values() for i in held}
    assert {p.name for p in layers.iterdir()} == names
    for layer in [layer for held in state.values() for layer in held if layer.checksum]:
        disks.check(layer, full=True)
    if alive:
        live.io("d1n" if frozen else "d1", "read -P 1 0 4096")
        live.close()
    content = image_bytes(layers / f"{kept['root'][0]}.qcow2")
    assert content[:4096] == b"\x01" * 4096
    assert content[4096:8192] == (b"\x02" if frozen else b"\x00") * 4096


def test_recover_drops_an_overlay_whose_header_never_reached_the_disk(
    disks: Backend, layers: Path, adopted: Layer
) -> None:
    active = disks.clone([adopted], "a0")
    for content in (b"", bytes(1 << 19), b"QFI\xfb" + bytes(50)):
        (layers / "a1.qcow2").write_bytes(content)
        (layers / "a1.qcow2.tmp").write_bytes(content)
        part = (Freeze("root", active, "a1", "n0", "n1"), [active, adopted])
        assert disks.recover_freeze(None, [part]) == {"root": [active]}
        assert [p.name for p in layers.iterdir()] == ["a0.qcow2"]
