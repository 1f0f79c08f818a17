"""Layers in a pool, without a guest: what a freeze holds, what deleting leaves, what it costs."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockcow import BlockError, Freeze, Layer, LayerDamaged, pool_label
from blockcow.devmapper import DeviceMapper
from blockcow.dmthin import DmThinBackend, device, number_of
from blockcow.pools import allocate
from blockcow.source import probe
from blockcow.thin_pool import PoolFailed, check_metadata
from tests.dm.lab.disks import MIB, Book, Disk, NoHypervisor, random_image

UML = ["--disk", "512M"]
DEVICE = Path("/dev/ubdb")
SIZE = 16 * MIB


@pytest.fixture
def book(dm: DeviceMapper) -> Book:
    return Book(DEVICE)


@pytest.fixture
def disks(book: Book, tmp_path: Path) -> Iterator[DmThinBackend]:
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    pool_label.erase(DEVICE)
    made = DmThinBackend(tmp_path / "layers", tmp_path / "locks", book)
    made.device_of(book.name.id).make()
    yield made
    for name in made.device_of(book.name.id).devices():
        made.dm.remove(name)
    made.device_of(book.name.id).close(mark=False)


@pytest.fixture
def base(disks: DmThinBackend, book: Book, tmp_path: Path) -> tuple[Layer, bytes]:
    model = random_image(tmp_path / "disk.img", SIZE)
    return disks.adopt(probe(tmp_path / "disk.img", "raw"), book.new_id()), model


def content(disks: DmThinBackend, layer: Layer) -> bytes:
    with disks.opened(layer) as fd:
        return os.pread(fd, layer.size, 0)


def same(found: bytes, expected: bytes | bytearray) -> bool:
    return found == bytes(expected)


def test_a_disk_is_copied_in(disks: DmThinBackend, base: tuple[Layer, bytes], book: Book,
                             tmp_path: Path) -> None:
    layer, model = base
    assert same(content(disks, layer), model)
    assert disks.check(layer, full=True) == layer
    written = sum(1 for at in range(0, SIZE, 65536) if any(model[at:at + 65536]))
    assert disks.usage(layer) == written * 65536, "what is zero takes no space"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "disk.img"),
                    str(tmp_path / "disk.qcow2")], check=True)
    other = disks.adopt(probe(tmp_path / "disk.qcow2", "qcow2"), book.new_id())
    assert other.checksum == layer.checksum
    assert disks.usage(other) <= disks.usage(layer)
    assert disks.difference([other], [layer]).ranges == ()


def test_a_frozen_layer_stays_what_it_was(disks: DmThinBackend, base: tuple[Layer, bytes],
                                          book: Book) -> None:
    layer, model = base
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    disk.write(MIB, b"\x11" * 8192)
    one = disk.freeze(book.new_id())
    kept = bytes(disk.model)
    disk.write(MIB + 4096, b"\x22" * 4096)
    disk.write(5 * MIB, b"\x33" * 512)
    two = disk.freeze(book.new_id())
    assert same(content(disks, one), kept)
    assert same(content(disks, two), disk.model)
    assert disks.difference([one], [two]).ranges == ((MIB + 4096, 4096), (5 * MIB, 4096))
    assert disks.difference([two], [one]).ranges == ((MIB + 4096, 4096), (5 * MIB, 4096))
    for frozen in (one, two):
        assert disks.check(frozen, full=True) == frozen
        assert disks.check(frozen, full=False) == frozen
    with pytest.raises(LayerDamaged, match="its checksum differs"):  # the control
        disks.check(replace(two, checksum=one.checksum), full=True)
    disks.drop(one)
    with pytest.raises(LayerDamaged, match="missing from its pool"):
        disks.check(one, full=False)
    assert same(content(disks, two), disk.model)
    disk.write(0, b"\x44" * 100_352)
    three = disk.freeze(book.new_id())  # its reference is there, the one before that is not
    assert disks.check(three, full=True) == three
    disk.close()


def test_nothing_writes_to_a_frozen_layer(disks: DmThinBackend, base: tuple[Layer, bytes]) -> None:
    layer, _ = base
    with disks.opened(layer), Path(layer.file).open("r+b", buffering=0) as file, \
            pytest.raises(OSError, match="not permitted"):
        file.write(b"x" * 512)


def test_a_freeze_that_is_given_up(disks: DmThinBackend, base: tuple[Layer, bytes], book: Book,
                                   dm: DeviceMapper) -> None:
    layer, model = base
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    new = book.new_id()
    part = Freeze("disk", disk.active, new, "n", "m")
    ticket = disks.prepare_freeze(NoHypervisor(), [(part, disk.chain)])
    ticket.freeze()
    ticket.abort()
    with disks.live(book.name.id) as pool:
        pool.create(number_of(new))  # the number is free again
        pool.delete(number_of(new))
    disk.write(0, b"\x55" * 4096)
    # Killed in the middle: suspended, and with one of two copies made.
    dm.suspend(device(disk.active.id))
    with disks.live(book.name.id) as pool:
        pool.snapshot(number_of(new), number_of(disk.active.id))
    held = disks.recover_freeze(None, [(part, disk.chain)])
    assert held == {"disk": [disk.active]}
    disk.write(4096, b"\x66" * 4096)
    with pytest.raises(LayerDamaged):
        disks.check(replace(layer, id=new), full=False)
    disk.close()


def test_a_freeze_of_several_disks_is_all_or_nothing(disks: DmThinBackend, book: Book,
                                                     base: tuple[Layer, bytes],
                                                     dm: DeviceMapper) -> None:
    layer, model = base
    both = [Disk(disks, [disks.clone([layer], book.new_id())], model) for _ in range(2)]
    new = [book.new_id(), book.new_id()]
    with disks.live(book.name.id) as pool:
        pool.create(number_of(new[1]))  # so that the second one fails
    parts = [(Freeze(str(at), disk.active, new[at], "n", "m"), disk.chain)
             for at, disk in enumerate(both)]
    ticket = disks.prepare_freeze(NoHypervisor(), parts)
    with pytest.raises(BlockError, match="File exists"):
        ticket.freeze()
    for disk in both:
        info = dm.info(device(disk.active.id))
        assert info is not None
        assert not info.suspended
    ticket.abort()
    with disks.live(book.name.id) as pool, pool.metadata_snapshot():
        assert set(pool.numbers()) == {number_of(layer.id), *(number_of(d.active.id) for d in both)}
    for disk in both:
        disk.close()


def test_random_operations(disks: DmThinBackend, base: tuple[Layer, bytes], book: Book) -> None:
    layer, model = base
    rng = random.Random(7)
    kept: dict[str, tuple[Layer, bytes]] = {layer.id: (layer, model)}
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    for _ in range(120):
        action = rng.choice(("write", "write", "write", "freeze", "freeze", "go back", "drop"))
        if action == "write":
            size = rng.choice((512, 4096, 65536, 100_352))
            at = rng.randrange((SIZE - size) // 512) * 512
            disk.write(at, bytes([rng.randrange(256)]) * size)
        elif action == "freeze":
            frozen = disk.freeze(book.new_id())
            kept[frozen.id] = (frozen, bytes(disk.model))
        elif action == "go back":
            old = disk.active
            disk.close()
            chosen, was = kept[rng.choice(sorted(kept))]
            disk = Disk(disks, [disks.clone([chosen], book.new_id())], was)
            disks.drop(old)
        elif len(kept) > 1:
            disks.drop(kept.pop(rng.choice(sorted(kept)))[0])
    for frozen, expected in kept.values():
        assert same(content(disks, frozen), expected)
        assert disks.check(frozen, full=True) == frozen
    with disks.live(book.name.id) as pool, pool.metadata_snapshot():
        numbers = pool.numbers()
    assert set(numbers) == {number_of(one) for one in (*kept, disk.active.id)}
    disk.close()
    for frozen, _ in kept.values():
        disks.drop(frozen)
    disks.drop(disk.active)
    with disks.live(book.name.id) as pool:
        assert pool.status().data_used == 0, "nothing leaks"


def test_discards_give_space_back(disks: DmThinBackend, base: tuple[Layer, bytes], book: Book
                                  ) -> None:
    layer, model = base
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    disk.write(0, b"\x77" * (4 * MIB))
    full = disks.head_room(book.name.id).data
    subprocess.run(["blkdiscard", "--offset", "0", "--length", str(4 * MIB), str(disk.node)],
                   check=True)
    assert disks.head_room(book.name.id).data >= full + 4 * MIB
    disk.close()


def test_metadata_that_is_full(dm: DeviceMapper, tmp_path: Path) -> None:
    """A freeze is refused, and says why; what was frozen before is there; and once the pool has
    more, all goes on."""
    place = tmp_path / "pool.img"
    allocate(place, 200 * MIB)
    book = Book(place)
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    disks = DmThinBackend(tmp_path / "layers", tmp_path / "locks", book)
    held = disks.device_of(book.name.id)
    held.make()
    model = random_image(tmp_path / "disk.img", SIZE)
    layer = disks.adopt(probe(tmp_path / "disk.img", "raw"), book.new_id())
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    rng = random.Random(5)
    kept: list[tuple[Layer, bytes]] = []
    try:
        with pytest.raises(BlockError):
            for _ in range(3000):
                disk.write(rng.randrange(SIZE // 4096) * 4096, b"\x99" * 4096)
                part = Freeze("disk", disk.active, book.new_id(), "n", "m")
                ticket = disks.prepare_freeze(NoHypervisor(), [(part, disk.chain)])
                ticket.freeze()
                kept.append((Layer(part.new_id, "dmthin", "raw", "", SIZE), b""))
                if len(kept) % 50 == 1:
                    kept[-1] = (ticket.seal()[0].frozen, bytes(disk.model))
        assert len(kept) > 100
        for frozen, was in kept[::50]:
            assert same(content(disks, frozen), was)
        for change in (lambda: disks.clone([layer], book.new_id()),
                       lambda: disks.advance(book.name.id),
                       lambda: disk.freeze(book.new_id())):
            with pytest.raises(PoolFailed, match=r"become read-only: \d+ of 1024 blocks"):
                change()
        allocate(place, 300 * MIB)
        with held.locked():
            held.extend()
        room = disks.head_room(book.name.id)
        assert room.metadata_total == 8 * MIB
        assert room.data_total > 280 * MIB
        disk.write(0, b"\xaa" * 65536)
        frozen = disk.freeze(book.new_id())
        assert same(content(disks, frozen), disk.model)
        assert disks.check(frozen, full=True) == frozen
        for frozen, was in kept[::50]:
            assert same(content(disks, frozen), was)
    finally:
        disk.close()
        held.close()


def test_many_layers_cost_no_more_each(disks: DmThinBackend, base: tuple[Layer, bytes], book: Book,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """500 freezes, half of them deleted at random: the last one costs what the first did; the
    metadata is whole; and the pool holds exactly what is left."""
    layer, model = base
    rng = random.Random(3)
    disk = Disk(disks, [disks.clone([layer], book.new_id())], model)
    seconds: list[float] = []
    kept: list[Layer] = []
    for number in range(500):
        disk.write(rng.randrange(SIZE // 4096) * 4096, bytes([number % 256]) * 4096)
        part = Freeze("disk", disk.active, book.new_id(), "n", "m")
        ticket = disks.prepare_freeze(NoHypervisor(), [(part, disk.chain)])
        began = time.perf_counter()
        ticket.freeze()
        seconds.append(time.perf_counter() - began)
        if number % 10 == 0:
            (outcome,) = ticket.seal()
            kept.append(outcome.frozen)
        else:  # without the checksum, which starts a process: 500 of those take minutes here
            kept.append(Layer(part.new_id, "dmthin", "raw", f"/dev/mapper/{device(part.new_id)}",
                              SIZE))
    for gone in rng.sample(kept, 250):
        kept.remove(gone)
        disks.drop(gone)
    first, last = statistics.median(seconds[:25]), statistics.median(seconds[-25:])
    with capsys.disabled():
        print(f"\\nfreeze: first 25 {first * 1e3:.2f} ms, last 25 {last * 1e3:.2f} ms (median)")
    with disks.live(book.name.id) as pool, pool.metadata_snapshot():
        numbers = pool.numbers()
        assert set(numbers) == {number_of(one.id) for one in (*kept, layer, disk.active)}
        blocks: set[int] = set()
        done = subprocess.run(["thin_dump", "--metadata-snap", str(pool.metadata)], check=True,
                              capture_output=True, text=True).stdout
        for line in done.splitlines():
            words = dict(part.split("=") for part in line.replace('"', "").split() if "=" in part)
            if "data_begin" in words:
                start = int(words["data_begin"])
                blocks |= set(range(start, start + int(words["length"].rstrip("/>"))))
            elif "data_block" in words:
                blocks.add(int(words["data_block"]))
        assert pool.status().data_used == len(blocks), "no block is held that no layer refers to"
    disk.close()
    disks.rest(book.name.id)
    label = disks.device_of(book.name.id).label()
    held = disks.device_of(book.name.id)
    with held._device() as node:
        held._map("meta", label.metadata, node)
        try:
            check_metadata(Path(f"/dev/mapper/epochs-{book.name.id}-meta"))
        finally:
            held.close(mark=False)
    assert last < first * 3, "a coarse bound; scripts/bench has the figure"
