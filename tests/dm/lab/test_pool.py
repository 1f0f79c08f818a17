"""Pools: made, opened, closed, extended; what is refused, and what a crash leaves."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockcow import BlockError, Layer, pool_label
from blockcow.devmapper import DeviceMapper, DmBusy, Target
from blockcow.dmthin import DmThinBackend, PoolMismatch, device
from blockcow.pools import (
    PoolDevice,
    PoolRefused,
    allocate,
    check_device,
    grown,
    metadata_sectors,
)
from blockcow.source import probe
from blockcow.thin_pool import PoolFailed
from tests.dm.lab.disks import MIB, Book, random_image

UML = ["--disk", "256M", "--disk", "256M"]
DEVICE, OTHER = Path("/dev/ubdb"), Path("/dev/ubdc")


@pytest.fixture(params=["device", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "file":
        allocate(tmp_path / "pool.img", 200 * MIB)
        yield tmp_path / "pool.img"
        return
    pool_label.erase(DEVICE)
    yield DEVICE
    pool_label.erase(DEVICE)


@pytest.fixture
def book(dm: DeviceMapper, place: Path) -> Book:
    return Book(place)


@pytest.fixture
def disks(book: Book, tmp_path: Path) -> Iterator[DmThinBackend]:
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    made = DmThinBackend(tmp_path / "layers", tmp_path / "locks", book)
    made.device_of(book.name.id).make()
    yield made
    for name in made.device_of(book.name.id).devices():
        made.dm.remove(name)
    made.device_of(book.name.id).close(mark=False)


def held(disks: DmThinBackend, book: Book) -> PoolDevice:
    return disks.device_of(book.name.id)


def adopted(disks: DmThinBackend, book: Book, tmp_path: Path, size: int = 16 * MIB) -> Layer:
    random_image(tmp_path / "disk.img", size)
    return disks.adopt(probe(tmp_path / "disk.img", "raw"), book.new_id())


def test_open_and_closed(disks: DmThinBackend, book: Book, dm: DeviceMapper) -> None:
    pool = held(disks, book)
    assert not pool.is_open
    assert pool.label().state == pool_label.CLOSED
    with disks.live(book.name.id) as live:
        assert live.status().transaction == 0
        assert live.status().data_used == 0
    assert dm.devices() == [f"epochs-{book.name.id}{part}" for part in ("", "-data", "-meta")]
    assert pool.label().state == pool_label.OPEN
    disks.rest(book.name.id)
    assert dm.devices() == []
    assert pool.label().state == pool_label.CLOSED
    disks.rest(book.name.id)


def test_a_pool_in_use_stays_open(disks: DmThinBackend, book: Book, tmp_path: Path) -> None:
    base = adopted(disks, book, tmp_path)
    active = disks.clone([base], book.new_id())
    disks.activate([active])
    disks.activate([active])
    disks.rest(book.name.id)
    assert held(disks, book).is_open
    with pytest.raises(DmBusy):
        held(disks, book).close()
    disks.deactivate(active)
    disks.deactivate(active)
    disks.rest(book.name.id)
    assert not held(disks, book).is_open


def test_metadata_is_checked_after_a_crash(disks: DmThinBackend, book: Book, tmp_path: Path,
                                           place: Path) -> None:
    """Only if the pool was not closed; damage is refused and not mended."""
    base = adopted(disks, book, tmp_path)
    pool = held(disks, book)
    pool.close()
    pool_label.write(place, replace(pool.label(), state=pool_label.OPEN))
    disks.check(base, full=True)  # whole metadata opens
    pool.close()
    start = pool.label().metadata[0].start * 512
    with place.open("r+b") as file:
        for block in range(1, 12):  # behind the superblock: roots of its trees
            file.seek(start + block * 4096 + 100)
            file.write(b"damage")
    with place.open("rb") as file:
        file.seek(start)
        damaged = file.read(MIB)
    pool_label.write(place, replace(pool.label(), state=pool_label.OPEN))
    with pytest.raises(PoolFailed, match=r"metadata is damaged: thin_check .*Nothing was changed"):
        disks.check(base, full=True)
    assert not pool.is_open
    with place.open("rb") as file:
        file.seek(start)
        assert file.read(MIB) == damaged


def test_what_is_another_times_is_refused(disks: DmThinBackend, book: Book, tmp_path: Path) -> None:
    base = adopted(disks, book, tmp_path)
    book.transactions = disks.advance(book.name.id)
    assert book.transactions == 1
    disks.check(base, full=False)
    for wrong in (0, 2, 7):
        book.transactions = wrong
        with pytest.raises(PoolMismatch, match=f"at transaction 1, the store's catalog at {wrong}"):
            disks.check(base, full=False)
    book.transactions, book.under_way = 0, True  # killed between the two
    disks.check(base, full=False)
    for _ in range(2):  # the catalog's part fails twice: the pool is never more than one ahead
        assert disks.advance(book.name.id) == 1
        disks.check(base, full=False)
    book.transactions = 1
    assert disks.advance(book.name.id) == 2


def test_the_wrong_device(disks: DmThinBackend, book: Book) -> None:
    pool_label.erase(OTHER)
    right = book.name
    book.name = replace(right, path=OTHER)
    with pytest.raises(BlockError, match="carries no pool of Epochs; is it the right device"):
        disks.head_room(right.id)
    held(disks, book).make()
    book.name = replace(right, path=OTHER, pool=uuid.uuid4())
    with pytest.raises(BlockError, match="carries another pool"):
        disks.head_room(right.id)
    book.name = replace(right, path=Path("/dev/none"))
    with pytest.raises(BlockError, match="cannot be read: No such file"):
        disks.head_room(right.id)
    pool_label.erase(OTHER)
    book.name = right
    disks.head_room(right.id)


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_a_file_that_was_cut_short(disks: DmThinBackend, book: Book, place: Path,
                                   tmp_path: Path) -> None:
    base = adopted(disks, book, tmp_path)
    disks.rest(book.name.id)
    with place.open("r+b") as file:
        file.truncate(100 * MIB)
    with pytest.raises(BlockError, match=r"has 104857600 bytes, but .* it was cut short"):
        disks.check(base, full=True)
    with place.open("r+b") as file:
        file.truncate(200 * MIB)
    disks.check(base, full=True)  # what was in use lay in the first half


def test_either_label_is_enough(disks: DmThinBackend, book: Book, place: Path) -> None:
    """Each write goes over the older one: power that goes in the middle of it damages only that."""
    disks.head_room(book.name.id)
    disks.rest(book.name.id)
    label = held(disks, book).label()
    newest = label.sequence % 2
    with place.open("r+b") as file:
        file.seek(newest * pool_label.BLOCK + 50)
        file.write(b"torn")
    assert held(disks, book).label().sequence == label.sequence - 1
    disks.head_room(book.name.id)
    disks.rest(book.name.id)
    with place.open("r+b") as file:
        for at in (0, 1):
            file.seek(at * pool_label.BLOCK + 50)
            file.write(b"torn")
    with pytest.raises(pool_label.LabelDamaged, match="another checksum"):
        disks.head_room(book.name.id)


def test_extended_while_in_use(disks: DmThinBackend, book: Book, place: Path, tmp_path: Path,
                               dm: DeviceMapper) -> None:
    if place == DEVICE:  # a device that grows: the first half of a real one, then all of it
        dm.create("grows", "test-grows", [Target(0, 131072, "linear", f"{DEVICE} 0")])
        place = Path("/dev/mapper/grows")
        book.name = replace(book.name, path=place)
        held(disks, book).make()
    base = adopted(disks, book, tmp_path)
    active = disks.clone([base], book.new_id())
    disks.activate([active])
    before = disks.head_room(book.name.id)
    with held(disks, book).locked():
        held(disks, book).extend()
    assert disks.head_room(book.name.id) == before, "nothing came to it"
    if place.is_file():
        allocate(place, 300 * MIB)
    else:
        dm.load("grows", [Target(0, 524288, "linear", f"{DEVICE} 0")])
        dm.suspend("grows")
        dm.resume("grows")
    for _ in range(2):
        with held(disks, book).locked():
            held(disks, book).extend()
        after = disks.head_room(book.name.id)
        assert after.data_total - before.data_total > 90 * MIB
    disks.check(base, full=True)
    disks.deactivate(active)
    disks.rest(book.name.id)
    assert disks.head_room(book.name.id) == after, "opened again it has the same size"
    disks.rest(book.name.id)
    if place.name == "grows":
        dm.remove("grows")


def test_a_label_grows_with_its_metadata() -> None:
    """Sizes that no test device has: 1 TiB that becomes 40."""
    data = pool_label.Segment(2048 + metadata_sectors(2**40, 128), 2**31 - 2**23)
    label = pool_label.Label(uuid.uuid4(), uuid.uuid4(), data.start + data.length, 128,
                             (pool_label.Segment(2048, metadata_sectors(2**40, 128)),), (data,))
    larger = grown(label, 40 * 2**31)
    assert larger is not None
    assert larger.metadata_sectors > label.metadata_sectors
    assert larger.metadata_sectors * 512 < 16 * 2**30
    assert len(larger.metadata) == 2
    assert larger.data_sectors > label.data_sectors
    assert larger.size <= 40 * 2**31
    assert pool_label.parse(larger.to_bytes()) == larger
    assert grown(larger, larger.size + 100) is None
    assert grown(label, label.size - 1) is None


def test_devices_that_hold_something(dm: DeviceMapper, tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(PoolRefused, match=words):
            check_device(path)

    pool_label.erase(DEVICE)
    check_device(DEVICE)
    subprocess.run(["mkfs.ext4", "-q", str(DEVICE)], check=True)
    refused(DEVICE, "holds ext4 data; --force takes it")
    check_device(DEVICE, force=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", str(DEVICE), str(tmp_path / "mnt")], check=True)
    try:
        refused(DEVICE, "in use, it is mounted on")
        with pytest.raises(PoolRefused, match="in use"):
            check_device(DEVICE, force=True)
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    subprocess.run(["wipefs", "--all", "--quiet", str(DEVICE)], check=True)
    subprocess.run(["pvcreate", "-qq", str(DEVICE)], check=True)
    refused(DEVICE, "an LVM physical volume")
    subprocess.run(["pvremove", "-qq", str(DEVICE)], check=True)
    dm.create("user", "test-user", [Target(0, 8, "linear", f"{DEVICE} 0")])
    refused(DEVICE, "in use, the kernel uses it")
    dm.remove("user")
    subprocess.run(["sfdisk", "--quiet", str(DEVICE)], input="label: gpt\n", text=True, check=True,
                   capture_output=True)
    refused(DEVICE, r"a partition table \(gpt\)")
    subprocess.run(["wipefs", "--all", "--quiet", str(DEVICE)], check=True)
    check_device(DEVICE)
    book = Book(DEVICE)
    PoolDevice(book.name, tmp_path).make()
    refused(DEVICE, "carries a pool of Epochs already")
    pool_label.erase(DEVICE)
    check_device(DEVICE)
    small = tmp_path / "small.img"
    small.write_bytes(bytes(MIB))
    with pytest.raises(PoolRefused, match="at least 16 MiB"):
        PoolDevice(Book(small).name, tmp_path).make()


def test_a_layer_that_is_gone_from_its_pool(disks: DmThinBackend, book: Book,
                                            tmp_path: Path) -> None:
    base = adopted(disks, book, tmp_path)
    with disks.live(book.name.id) as pool:
        pool.delete(0)
    for use in (lambda: disks.check(base, full=False), lambda: disks.clone([base], book.new_id()),
                lambda: disks.activate([base])):
        with pytest.raises(BlockError, match="missing from its pool"):
            use()
    disks.drop(base)
    disks.discard(base.id)
    assert disks.strays(set()) == []
    assert device(base.id) not in disks.dm.devices()
