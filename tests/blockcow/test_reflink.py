"""The reflink backend on real XFS and btrfs."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blockcow_qemu import MIB, Live, assert_same, tool

from blockcow import (
    Backend,
    BlockError,
    Freeze,
    Layer,
    LayerDamaged,
    Source,
    backend,
    choose,
)

pytestmark = pytest.mark.root


@pytest.fixture
def place(reflinking: Path) -> Iterator[Path]:
    directory = reflinking / "layers"
    directory.mkdir(mode=0o700)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def links(place: Path) -> Backend:
    return backend("reflink", place)


@pytest.fixture
def bottom(links: Backend, base: Source) -> Layer:
    return links.adopt(base, "base")


def running(links: Backend, start: Callable[..., Live], base: Layer) -> tuple[Live, Layer]:
    active = links.clone([base], "a0")
    return start(links.blockdev([active], "n0")), active


def frozen_as(links: Backend, live: Live, active: Layer, name: str) -> Layer:
    part = Freeze("root", active, name, "n0", "unused")
    ticket = links.prepare_freeze(live, [(part, [active])])
    ticket.freeze()
    (done,) = ticket.seal()
    assert done.active == active and done.frozen.id == name
    return done.frozen


def test_chosen_where_it_works_and_only_there(place: Path, tmp_path: Path) -> None:
    assert choose(place) == "reflink"
    assert choose(tmp_path) == "qcow2"
    assert "has no reflinks" in str(backend("reflink", tmp_path).available())
    assert "cannot be written to" in str(backend("reflink", place / "no").available())


def test_adopt_from_the_same_file_system_shares_the_blocks(links: Backend, place: Path) -> None:
    path = place.parent / "user.raw"
    path.write_bytes(os.urandom(32 * MIB))
    os.sync()
    free = os.statvfs(place).f_bfree * os.statvfs(place).f_frsize
    layer = links.adopt(Source(path, "raw", 32 * MIB), "base")
    os.sync()
    assert free - os.statvfs(place).f_bfree * os.statvfs(place).f_frsize < 8 * MIB
    path.write_bytes(bytes(32 * MIB))  # the user's disk is free again
    links.check(layer, full=True)
    path.unlink()


def test_adopt_from_elsewhere_copies_with_progress(
    links: Backend, place: Path, base: Source
) -> None:
    done: list[int] = []
    layer = links.adopt(base, "base", done.append)
    path = place / layer.file
    assert_same(path.read_bytes(), base.path.read_bytes())
    assert sum(done) >= MIB and links.usage(layer) <= 2 * MIB
    assert layer.backing is None and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_adopt_converts_qcow2(links: Backend, place: Path, base: Source, tmp_path: Path) -> None:
    path = tmp_path / "user.qcow2"
    tool("qemu-img", "convert", "-O", "qcow2", base.path, path)
    layer = links.adopt(Source(path, "qcow2", 8 * MIB), "base")
    assert_same((place / layer.file).read_bytes(), base.path.read_bytes())
    assert layer.format == "raw"


def test_adopt_that_fails_leaves_nothing(links: Backend, place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"no qcow2")
    with pytest.raises(BlockError, match="qemu-img convert failed"):
        links.adopt(Source(tmp_path / "bad", "qcow2", 512), "base")
    with pytest.raises(BlockError, match="changed its size"):
        links.adopt(Source(tmp_path / "bad", "raw", 512), "base")
    assert not list(place.iterdir())


def test_freeze_keeps_the_instant(
    links: Backend, place: Path, start: Callable[..., Live], bottom: Layer
) -> None:
    live, active = running(links, start, bottom)
    live.write("n0", 0, MIB, 1)
    frozen = frozen_as(links, live, active, "f1")
    live.write("n0", 0, MIB, 2)
    live.io("n0", "flush")
    assert (place / frozen.file).read_bytes()[:MIB] == b"\x01" * MIB
    links.check(frozen, full=True)
    fork = links.clone([frozen], "fork")
    other = start(links.blockdev([fork], "n0"))
    other.io("n0", f"read -P 1 0 {MIB}")
    live.io("n0", f"read -P 2 0 {MIB}")


def test_two_disks_or_none(
    links: Backend, place: Path, start: Callable[..., Live], bottom: Layer
) -> None:
    live, one = running(links, start, bottom)
    two = links.clone([bottom], "b0")
    parts = [
        (Freeze("root", one, "f1", "n0", "x"), [one]),
        (Freeze("data", two, "f2", "n1", "y"), [two]),
    ]
    ticket = links.prepare_freeze(live, parts)
    # what makes the second ioctl fail, as a full file system would: another file system
    with (place.parent / "immutable").open("wb"):
        pass
    target, _ = ticket._pairs[1]  # type: ignore[attr-defined]
    elsewhere = os.open("/tmp", os.O_RDWR | os.O_TMPFILE)
    os.dup2(elsewhere, target)
    os.close(elsewhere)
    with pytest.raises(BlockError, match="were not frozen"):
        ticket.freeze()
    with pytest.raises(BlockError, match="nothing is frozen yet"):
        ticket.seal()
    ticket.abort()
    (place.parent / "immutable").unlink()
    assert sorted(p.name for p in place.iterdir()) == [
        "a0.raw",
        "a0.ref",
        "b0.raw",
        "b0.ref",
        "base.raw",
    ]
    live.write("n0", 0, 4096, 5)
    again = links.prepare_freeze(live, parts)
    again.freeze()
    assert len(again.seal()) == 2


def test_recover_removes_the_copies(
    links: Backend, place: Path, start: Callable[..., Live], bottom: Layer
) -> None:
    live, active = running(links, start, bottom)
    parts = [(Freeze("root", active, "f1", "n0", "x"), [active])]
    ticket = links.prepare_freeze(live, parts)
    ticket.freeze()
    (place / "f1.raw.tmp").touch()
    assert {place / "f1.raw", place / "f1.raw.tmp"} < set(links.files("f1"))
    assert links.recover_freeze(None, parts) == {"root": [active]}
    assert sorted(p.name for p in place.iterdir()) == ["a0.raw", "a0.ref", "base.raw"]
    ticket.abort()


def test_names_in_the_way_are_refused(links: Backend, place: Path, bottom: Layer) -> None:
    active = links.clone([bottom], "a0")
    with pytest.raises(BlockError, match="exists already"):
        links.clone([bottom], "a0")
    with pytest.raises(BlockError, match="exists already"):
        links.prepare_freeze(None, [(Freeze("d", active, "a0", "n", "m"), [active])])  # type: ignore[arg-type]
    assert (place / "a0.raw").stat().st_size == 8 * MIB


def test_damage_is_named(links: Backend, place: Path, bottom: Layer) -> None:
    with (place / bottom.file).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(LayerDamaged, match=r"base .*is damaged"):
        links.check(bottom, full=False)
    links.drop(bottom)
    links.drop(bottom)
    with pytest.raises(LayerDamaged, match="missing"):
        links.clone([bottom], "c")
    assert not list(place.iterdir())


def test_difference_is_exact(
    links: Backend, place: Path, start: Callable[..., Live], bottom: Layer
) -> None:
    live, active = running(links, start, bottom)
    live.write("n0", MIB, 64 << 10, 0x11)  # the same bytes again
    live.write("n0", 3 * MIB + 4096, 512, 6)
    one = frozen_as(links, live, active, "f1")
    live.write("n0", 5 * MIB, 12288, 7)
    two = frozen_as(links, live, active, "f2")
    assert links.difference([bottom], [one]).ranges == ((3 * MIB + 4096, 4096),)
    assert links.difference([one], [two]).ranges == ((5 * MIB, 12288),)
    assert links.difference([two], [bottom]).bytes == 16384
    assert links.difference([two], [two]).ranges == ()


def test_seal_reads_only_what_changed(
    links: Backend, place: Path, start: Callable[..., Live]
) -> None:
    path = place.parent / "user.raw"
    path.write_bytes(os.urandom(32 * MIB))
    base = links.adopt(Source(path, "raw", 32 * MIB), "base")
    path.unlink()
    live, active = running(links, start, base)
    hints = [None, b"", b"{}", b"[]", b'{"file": "/etc/passwd", "checksum": 1, "signature": 2}']
    for number, hint in enumerate(hints):
        live.write("n0", number * MIB + 4096, 4096, number)
        if hint is not None:  # a hint that is lost or wrong costs time and nothing else
            (place / "a0.ref").write_bytes(hint)
        part = Freeze("root", active, f"f{number}", "n0", "x")
        ticket = links.prepare_freeze(live, [(part, [active])])
        ticket.freeze()
        done: list[int] = []
        (out,) = ticket.seal(done.append)
        links.check(out.frozen, full=True)
        assert sum(done) == (65536 if hint is None else 32 * MIB)
    with (place / "f4.raw").open("r+b") as file:
        file.write(b"changed")  # the layer it refers to is no longer what it was
    live.write("n0", 0, 4096, 9)
    links.check(frozen_as(links, live, active, "f9"), full=True)


def test_no_chains(links: Backend, bottom: Layer) -> None:
    active = links.clone([bottom], "a0")
    links.rebacking(None, active, "n0", [])  # type: ignore[arg-type]
    with pytest.raises(BlockError, match="stand alone"):
        links.consolidate([active], 2)
    assert links.seal_layer(active) != active  # type: ignore[attr-defined]


def test_random_walk(
    links: Backend, place: Path, start: Callable[..., Live], bottom: Layer
) -> None:
    rng = random.Random(7)
    model = bytearray((place / bottom.file).read_bytes())
    live, active = running(links, start, bottom)
    kept: dict[str, tuple[Layer, bytes]] = {}
    for number in range(40):
        length = rng.choice([512, 4096, 100_352])
        offset = rng.randrange((8 * MIB - length) // 512) * 512
        value = rng.randrange(256)
        live.write("n0", offset, length, value)
        model[offset : offset + length] = bytes([value]) * length
        if number % 4 == 3:
            kept[f"f{number}"] = (frozen_as(links, live, active, f"f{number}"), bytes(model))
        if len(kept) > 5:
            links.drop(kept.pop(rng.choice(sorted(kept)))[0])
    for layer, expected in kept.values():
        assert_same((place / layer.file).read_bytes(), expected)
        assert links.check(layer, full=True) == replace(layer)
