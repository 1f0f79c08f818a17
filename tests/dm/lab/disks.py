"""Layers of a backend under test, without any catalog or guest: a disk that is written to through
its live device, and what every frozen layer of it must hold."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

from blockcow import Backend, Freeze, Layer
from blockcow.dmthin import layer_id
from blockcow.pools import PoolName

MIB = 2**20


class Book:
    """What a catalog knows of one pool."""

    def __init__(self, path: Path, pool_id: str = "a1b2c3d4") -> None:
        self.name = PoolName(pool_id, "fast", path, uuid.uuid4(), uuid.uuid4())
        self.number = 0
        self.transactions = 0
        self.under_way = False

    def pool(self, pool_id: str) -> PoolName:
        assert pool_id == self.name.id
        return self.name

    def transaction(self, pool_id: str) -> int:
        assert pool_id == self.name.id
        return self.transactions

    def unfinished(self) -> bool:
        return self.under_way

    def new_id(self) -> str:
        self.number += 1
        return layer_id(self.name.id, self.number - 1)


class NoHypervisor:
    """For backends that ask the hypervisor for nothing."""

    def execute(self, command: str, **arguments: object) -> object:
        raise AssertionError(f"{command} is not to be called")

    def run_job(self, command: str, job_id: str, **arguments: object) -> None:
        raise AssertionError(f"{command} is not to be called")


class Disk:
    """One disk: its active layer, live, and a model of it."""

    def __init__(self, disks: Backend, chain: Sequence[Layer], model: bytes) -> None:
        self.disks = disks
        self.active = chain[0]
        self.chain = list(chain)
        self.model = bytearray(model)
        disks.activate(chain)

    @property
    def node(self) -> Path:
        return Path(self.active.file)

    def write(self, offset: int, data: bytes) -> None:
        """Past the page cache, as a guest does."""
        self.model[offset:offset + len(data)] = data
        fd = os.open(self.node, os.O_WRONLY | os.O_SYNC | os.O_CLOEXEC)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
        finally:
            os.close(fd)

    def freeze(self, new_id: str) -> Layer:
        part = Freeze("disk", self.active, new_id, "node", "new-node")
        ticket = self.disks.prepare_freeze(NoHypervisor(), [(part, self.chain)])
        ticket.arm()
        ticket.freeze()
        ticket.disarm()
        (outcome,) = ticket.seal()
        self.active = outcome.active
        self.chain = [outcome.active, *([outcome.frozen, *self.chain[1:]]
                                        if outcome.active.backing else self.chain[1:])]
        return outcome.frozen

    def close(self) -> None:
        self.disks.deactivate(self.active)


def random_image(path: Path, size: int, seed: int = 1) -> bytes:
    """A disk image with data, zeros and holes in it; returns what it reads as."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            file.seek(rng.randrange(size // 4096 - 40) * 4096)
            file.write(rng.randbytes(rng.randrange(1, 40) * 4096))
        file.seek(0)
        file.write(bytes(65536))
    return path.read_bytes()
