"""Layers on LVM and on stacked snapshots, without a guest: random writes, freezes, rollbacks and
deletions against a model; what a killed freeze leaves; LVM's lock."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockcow import Backend, BlockRefused, Freeze, Layer, LayerDamaged, exceptions
from blockcow.devmapper import DeviceMapper
from blockcow.dmsnap import DmSnapBackend
from blockcow.exception_merge import write_union
from blockcow.interface import JsonDict
from blockcow.lvm_thick import LvmThickBackend
from blockcow.lvm_thin import LvmThinBackend
from blockcow.lvm_tools import Lvm, LvmFailed, dm_name
from blockcow.source import probe
from tests.dm.lab.disks import MIB, Disk, NoHypervisor, random_image
from tests.dm.lab.volumes import GROUP, group, lvm, volume, volumes

UML = ["--disk", "700M"]
DEVICE = "/dev/ubdb"
SIZE = 16 * MIB
KINDS = ("lvm-thin", "lvm-thick", "dmsnap")

pytestmark = pytest.mark.timeout(600)


def new_id() -> str:
    return uuid.uuid4().hex


def file_of(options: JsonDict) -> Path:
    """What a tree of QEMU's options opens in the end."""
    return Path(options["filename"]) if "filename" in options else file_of(options["file"])


class Bench:
    """A backend, a disk on it, and what every frozen layer must hold."""

    def __init__(self, disks: Backend, source: str, model: bytes) -> None:
        self.disks = disks
        self.base = disks.adopt(probe(Path(source), "raw"), new_id(), owner="web/a#base")
        self.sealed: dict[str, tuple[list[Layer], bytes]] = {}
        self.disk = self.over([self.base], model)

    def over(self, chain: list[Layer], model: bytes) -> Disk:
        layer = self.disks.clone(chain, new_id(), owner="web/a")
        return Disk(self.disks, [layer, *(chain if layer.backing else [])], model)

    @property
    def node(self) -> Path:
        (options,) = self.disks.blockdev(self.disk.chain, "n")
        return file_of(options)

    def write(self, offset: int, data: bytes) -> None:
        self.disk.model[offset:offset + len(data)] = data
        fd = os.open(self.node, os.O_WRONLY | os.O_SYNC | os.O_CLOEXEC)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
        finally:
            os.close(fd)

    def freeze(self) -> Layer:
        frozen = self.disk.freeze(new_id())
        chain = self.disk.chain[1:] if self.disk.chain[0].backing == frozen.id else [
            frozen, *([self.base] if frozen.backing else [])]
        self.sealed[frozen.id] = chain, bytes(self.disk.model)
        return frozen

    def roll_back(self, layer_id: str) -> None:
        """As the protocol does it: the new one aside, the old one gone, then taken over."""
        chain, model = self.sealed[layer_id]
        new = self.over(chain, model)
        old, self.disk = self.disk, new
        old.close()
        taken = self.disks.take_over(new.chain)
        self.disks.drop(old.active)
        new.active = taken
        new.chain = [taken, *([self.base] if taken.backing == self.base.id else new.chain[1:])]

    def content(self, chain: list[Layer]) -> bytes:
        with self.disks.exposed(chain) as tree:
            return file_of(tree).read_bytes()

    def check(self) -> None:
        for chain, model in self.sealed.values():
            assert self.content(chain) == model
            assert self.disks.check(chain[0], full=True).checksum == chain[0].checksum

    def close(self) -> None:
        self.disk.close()
        for layer in (self.disk.active, *(chain[0] for chain, _ in self.sealed.values())):
            self.disks.drop(layer)
        self.disks.drop(self.base)


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, dm: DeviceMapper, tmp_path: Path) -> Iterator[Bench]:
    model = random_image(tmp_path / "disk.img", SIZE)
    layers, locks = tmp_path / "layers", tmp_path / "locks"
    layers.mkdir()
    locks.mkdir()
    if request.param == "dmsnap":
        made = Bench(DmSnapBackend(layers, locks), str(tmp_path / "disk.img"), model)
        yield made
        made.close()
        assert sorted(layers.iterdir()) == []
        assert (tmp_path / "disk.img").read_bytes() == model, "the user's disk is as it was"
        return
    thin = request.param == "lvm-thin"
    kind = LvmThinBackend if thin else LvmThickBackend
    with group(DEVICE, pool="400M" if thin else None):
        source = volume("disk", tmp_path / "disk.img", thin=thin)
        made = Bench(kind(layers, locks, "feed"), source, model)
        yield made
        made.close()
        assert made.disks.strays(set()) == []
        assert {one["lv_name"] for one in volumes()} == {"disk"} | ({"pool"} if thin else set())
        if thin:
            assert Path(source).read_bytes() == model, "the user's volume is as it was"
        lvm("lvchange", "--activate", "n", GROUP)


def test_random_histories(bench: Bench) -> None:
    rng = random.Random(20261125)
    for _ in range(14):
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(SIZE // 512 - 300) * 512
            bench.write(start, rng.randbytes(rng.randrange(1, 300) * 512))
        bench.freeze()
        step = rng.random()
        if step < 0.35:
            bench.roll_back(rng.choice(sorted(bench.sealed)))
        elif step < 0.6 and len(bench.sealed) > 2 and not isinstance(bench.disks, DmSnapBackend):
            chain, _ = bench.sealed.pop(rng.choice(sorted(bench.sealed)))
            bench.disks.drop(chain[0])
    bench.check()
    ids = sorted(bench.sealed)
    for one, other in itertools.pairwise(ids):
        (a, left), (b, right) = bench.sealed[one], bench.sealed[other]
        differing = {at for at in range(0, SIZE, 4096) if left[at:at + 4096] != right[at:at + 4096]}
        found = bench.disks.difference(a, b).ranges
        assert {at for start, length in found
                for at in range(start, start + length, 4096)} == differing
    (options,) = bench.disks.blockdev(bench.disk.chain, "n")
    assert bench.node.read_bytes()[:4096] == bytes(bench.disk.model[:4096]), options
    # The control: a byte that was changed behind our back is found.
    if isinstance(bench.disks, DmSnapBackend):
        chain, _ = bench.sealed[ids[0]]
        path = bench.disks.directory / chain[0].file
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(LayerDamaged):
            bench.disks.check(chain[0], full=True)


def test_a_freeze_that_was_killed(bench: Bench, dm: DeviceMapper) -> None:
    """Prepared, or suspended in the middle, or done: the disk goes on, and nothing is left."""
    first = bench.freeze()
    for done in (False, True):
        new = new_id()
        part = Freeze("disk", bench.disk.active, new, "n", "m", "web/a#feed")
        ticket = bench.disks.prepare_freeze(NoHypervisor(), [(part, bench.disk.chain)])
        ticket.arm()
        if done:
            ticket.freeze()
        ticket.disarm()  # as the kernel does when a process ends
        del ticket
        if not done:  # killed between suspend and resume
            name = (dm_name(bench.base.file) if isinstance(bench.disks, LvmThickBackend) else
                    dm_name(bench.disk.active.file) if isinstance(bench.disks, LvmThinBackend)
                    else bench.node.name)
            dm.suspend(name)
        held = bench.disks.recover_freeze(None, [(part, bench.disk.chain)])["disk"]
        if len(held) == 2:  # the new layer stays on top
            assert done
            bench.sealed[held[1].id] = [held[1], *bench.disk.chain[1:]], bytes(bench.disk.model)
            bench.disk.chain = [held[0], held[1], *bench.disk.chain[1:]]
            bench.disk.active = held[0]
        else:
            assert held == [bench.disk.active]
        bench.write(MIB, os.urandom(4096))
        bench.write(3 * MIB, os.urandom(4096))
    last = bench.freeze()
    bench.check()
    bench.roll_back(first.id)
    bench.write(5 * MIB, b"\x77" * 4096)
    assert bench.content(bench.sealed[last.id][0]) == bench.sealed[last.id][1]


def test_lvm_waits_for_us(dm: DeviceMapper, tmp_path: Path) -> None:
    """While we hold a group LVM's own commands stand still; otherwise they do not."""
    tool = Lvm(tmp_path)
    make = ["timeout", "6", "lvm", "lvcreate", "--quiet", "--yes", "--size", "8M", "--name", "new",
            GROUP]
    with group(DEVICE):
        with tool.group_locked([GROUP]):
            assert subprocess.run(make, capture_output=True, check=False).returncode == 124
        assert volumes() == []
        assert subprocess.run(make, capture_output=True, check=False).returncode == 0
        with pytest.raises(LvmFailed, match="lvremove failed"):
            tool.run("lvremove", "--yes", f"{GROUP}/other")


def test_a_rollback_that_would_fill_another_snapshot(dm: DeviceMapper, tmp_path: Path) -> None:
    model = random_image(tmp_path / "disk.img", SIZE)
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    with group(DEVICE):
        source = volume("disk", tmp_path / "disk.img", thin=False)
        disks = LvmThickBackend(tmp_path / "layers", tmp_path / "locks", "feed")
        bench = Bench(disks, source, model)
        first = bench.freeze()
        bench.write(0, os.urandom(8 * MIB))
        part = Freeze("disk", bench.disk.active, new_id(), "n", "m", "", 4 * MIB)
        ticket = disks.prepare_freeze(NoHypervisor(), [(part, bench.disk.chain)])
        ticket.arm()
        ticket.freeze()
        ticket.disarm()
        (small,) = ticket.seal()
        bench.sealed[small.frozen.id] = [small.frozen, bench.base], bytes(bench.disk.model)
        with pytest.raises(BlockRefused, match=r"would write 8 MiB into snapshot .* lvextend|lvex"):
            disks.clone([first, bench.base], new_id())
        bench.check()
        lvm("lvextend", "--quiet", "--size", "+12M", f"{GROUP}/epochs-{small.frozen.id}")
        bench.disks = bench.disk.disks = LvmThickBackend(tmp_path / "layers", tmp_path / "locks",
                                                         "feed")
        bench.roll_back(first.id)
        bench.check()
        assert bench.node.read_bytes() == bytes(model)
        bench.close()
        lvm("lvchange", "--activate", "n", GROUP)


def test_merging_stores(dm: DeviceMapper, tmp_path: Path) -> None:
    """The union of stores reads as the stack did; the running guest's device is moved onto it."""
    model = random_image(tmp_path / "disk.img", SIZE)
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    disks = DmSnapBackend(tmp_path / "layers", tmp_path / "locks")
    bench = Bench(disks, str(tmp_path / "disk.img"), model)
    rng = random.Random(7)
    for _ in range(5):
        for _ in range(60):
            bench.write(rng.randrange(SIZE // 4096 - 8) * 4096, rng.randbytes(8 * 4096))
        bench.freeze()
    chain = bench.disk.chain[1:]
    built = disks.consolidate(chain, 4)
    assert built.backing == chain[4].id
    promoted = disks.promote(built)
    short = [promoted, *chain[4:]]
    bench.write(0, b"\x01" * 8192)
    disks.rebacking(NoHypervisor(), bench.disk.active, "n", short)
    bench.disk.chain = [bench.disk.active, *short]
    bench.write(MIB, b"\x02" * 8192)
    assert bench.node.read_bytes() == bytes(bench.disk.model)
    for index, layer in enumerate(chain[1:4], start=1):
        assert bench.content(chain[index:]) == bench.sealed[layer.id][1], "the others stay"
    bench.sealed[promoted.id] = short, bench.sealed[promoted.id][1]
    bench.check()
    (tmp_path / "other").write_bytes(b"no store" * 1024)
    with pytest.raises(exceptions.StoreDamaged):
        write_union([tmp_path / "other"], tmp_path / "made")
    assert not (tmp_path / "made").exists()
    bench.close()


def test_an_active_store_keeps_its_room(dm: DeviceMapper, tmp_path: Path) -> None:
    """A disk can be written from end to end after each freeze: no store overflows."""
    model = random_image(tmp_path / "disk.img", SIZE)
    for folder in ("layers", "locks"):
        (tmp_path / folder).mkdir()
    bench = Bench(DmSnapBackend(tmp_path / "layers", tmp_path / "locks"),
                  str(tmp_path / "disk.img"), model)
    for _ in range(3):
        bench.write(0, os.urandom(SIZE))
        frozen = bench.freeze()
        path = tmp_path / "layers" / frozen.file
        assert path.stat().st_size <= exceptions.room_for(SIZE, 4096)
    bench.check()
    assert replace(frozen, level=0) == frozen
    bench.close()
