"""The ``dmthin`` backend: layers as thin devices in a pool of ours.

Every layer stands alone; the pool shares the blocks. A freeze is ``create_snap`` of the suspended
active device: the new number is the frozen copy, and the active layer stays what it was. Only what
a guest (or somebody who reads) uses is live.

A layer's id says where it is: 8 digits of its pool's id, 6 of its number there, 18 of its own. So
whoever knows an id can undo what was done for it, without asking anybody else. The pool has a
transaction number, which moves on with every change to the list of its layers, together with the
one in the caller's catalog (:meth:`DmThinBackend.advance`): where the two part, one of them was
brought back from another time, and nothing is done with either.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from .contents import Progress
from .device_freeze import DeviceFreeze
from .devmapper import DIRECTORY, SECTOR, DmMissing
from .importing import copy_into
from .interface import (
    BlockError,
    Chain,
    Freeze,
    FreezeTicket,
    Frozen,
    Layer,
    LiveBlocks,
    Parts,
    Room,
    Source,
)
from .pools import HeadRoom, PoolDevice, PoolName, head_room
from .reference import refer, reference_file
from .thin_layers import ThinLayers, device, missing
from .thin_pool import MAX_NUMBER, PoolFailed, ThinPool


class Pools(Protocol):
    """What the caller's catalog knows of pools."""

    def pool(self, pool_id: str) -> PoolName:
        """BlockError if there is none of that id."""

    def transaction(self, pool_id: str) -> int:
        """The transaction number as the catalog has it."""

    def unfinished(self) -> bool:
        """Whether an operation is under way or was given up: between the pool's number and the
        catalog's there may then be one step."""


class PoolMismatch(BlockError):
    """Pool and catalog are not of the same time."""


def layer_id(pool_id: str, number: int) -> str:
    """A fresh id for a layer that will be device ``number`` of a pool."""
    if not 0 <= number <= MAX_NUMBER:
        raise BlockError(f"pool {pool_id} has no number {number}")
    return f"{pool_id}{number:06x}{secrets.token_hex(9)}"


def pool_of(layer: str) -> str:
    """The pool's id in a layer's id."""
    return layer[:8]


def number_of(layer: str) -> int:
    """The number in a layer's id. BlockError if it is not one of this backend."""
    try:
        return int(layer[8:14], 16)
    except ValueError:
        raise BlockError(f"{layer!r} is no layer of a pool") from None


def _thin_layer(layer: str, size: int) -> Layer:
    return Layer(layer, "dmthin", "raw", str(DIRECTORY / device(layer)), size)


class DmThinBackend(ThinLayers):
    """See :class:`blockcow.interface.Backend`."""

    name = "dmthin"

    def __init__(self, directory: Path, locks: Path, pools: Pools) -> None:
        super().__init__(directory)
        self._locks, self._pools = locks, pools

    def pool_of(self, layer: Layer) -> str:
        return pool_of(layer.id)

    def number_of(self, layer: Layer) -> int:
        return number_of(layer.id)

    # -- pools ------------------------------------------------------------------------------------
    def device_of(self, pool_id: str) -> PoolDevice:
        """The pool's device, live or not."""
        return PoolDevice(self._pools.pool(pool_id), self._locks)

    @contextlib.contextmanager
    def live(self, pool_id: str) -> Iterator[ThinPool]:
        """The pool, live and held: nobody else closes it meanwhile. It stays live afterwards, until
        :meth:`rest`. PoolMismatch, PoolFailed."""
        held = self.device_of(pool_id)
        with held.locked():
            pool = held.open()
            self._check_transaction(held.name, pool)
            yield pool

    def _check_transaction(self, name: PoolName, pool: ThinPool) -> None:
        actual, known = pool.status().transaction, self._pools.transaction(name.id)
        if actual == known or (actual == known + 1 and self._pools.unfinished()):
            return
        if self._pools.transaction(name.id) != known:  # somebody committed in between
            return self._check_transaction(name, pool)
        raise PoolMismatch(
            f"pool '{name.name}' is at transaction {actual}, the store's catalog at {known}: one "
            "of the two was brought back from another time. Nothing was changed; restore the one "
            "that belongs to the other")

    @contextlib.contextmanager
    def writable(self, pool_id: str) -> Iterator[ThinPool]:
        """The same, for changing the list of layers. PoolFailed if the kernel made it read-only."""
        with self.live(pool_id) as pool:
            status = pool.status()
            if status.mode == "ro":
                name = self._pools.pool(pool_id).name
                raise PoolFailed(
                    f"pool '{name}' has become read-only: {status.metadata_used} of "
                    f"{status.metadata_total} blocks of its metadata are in use; give its device "
                    f"more space, then 'epochs pool extend {name}'. What is in it can be read")
            yield pool

    def advance(self, pool_id: str) -> int:
        """Move the pool's transaction number on by one and return it. Called inside the catalog's
        transaction that changes the list of layers, which then records the number."""
        with self.writable(pool_id) as pool:
            known = self._pools.transaction(pool_id)
            # It has moved on already if the catalog's COMMIT did not follow, last time.
            if pool.status().transaction == known:
                pool.set_transaction(known, known + 1)
            return known + 1

    def rest(self, pool_id: str) -> None:
        """Take the pool down if no layer of it is live."""
        held = self.device_of(pool_id)
        if held.is_open:
            with held.locked():
                held.close_if_idle()

    def head_room(self, pool_id: str) -> HeadRoom:
        """What is left in a pool."""
        with self.live(pool_id):
            return self.device_of(pool_id).head_room()

    # -- layers -----------------------------------------------------------------------------------
    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """The disk is copied into the pool; what is zero in it takes no space."""
        layer = _thin_layer(layer_id, source.size)
        with self.writable(pool_of(layer_id)) as pool:
            pool.create(number_of(layer_id))
            node = self.map(pool, layer)
        try:
            checksum = copy_into(node, source, progress)
        finally:
            self.dm.remove(device(layer_id))
        with self.opened(layer):
            return replace(layer, checksum=checksum, signature=self._signature(layer))

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below = chain[0]
        if pool_of(below.id) != pool_of(layer_id):
            raise BlockError(f"layer {below.id} is in another pool than its clone would be")
        with self.writable(pool_of(layer_id)) as pool:
            try:
                pool.snapshot(number_of(layer_id), number_of(below.id))
            except DmMissing as error:
                raise missing(below) from error
        if below.checksum is not None:
            refer(self.directory, layer_id, below)
        return _thin_layer(layer_id, below.size)

    def activate(self, chain: Chain) -> None:
        layer = chain[0]
        with self.live(pool_of(layer.id)) as pool:
            if self.dm.info(device(layer.id)) is None:
                self.map(pool, layer)

    def deactivate(self, layer: Layer) -> None:
        if self.device_of(pool_of(layer.id)).is_open:
            # One that was suspended by a killed freeze cannot be removed.
            self._go_on(layer.id)
            self.dm.remove(device(layer.id))

    def prepare_freeze(self, live: LiveBlocks, parts: Parts) -> FreezeTicket:
        return DmThinFreeze(self, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """The active layer is always what it was; the copies go."""
        for part, _ in parts:
            self._go_on(part.active.id)
            self.discard(part.new_id)
        return {part.disk: [part.active] for part, _ in parts}

    def _go_on(self, layer: str) -> None:
        info = self.dm.info(device(layer))
        if info is not None and info.suspended:
            self.dm.resume(device(layer))

    def discard(self, layer_id: str) -> None:
        with self.live(pool_of(layer_id)) as pool:
            self.dm.remove(device(layer_id))
            with contextlib.suppress(DmMissing):
                pool.delete(number_of(layer_id))
        reference_file(self.directory, layer_id).unlink(missing_ok=True)

    def drop(self, layer: Layer) -> None:
        self.discard(layer.id)

    def strays(self, known: set[str]) -> list[str]:
        """Live devices of our pools that no known layer accounts for."""
        if self.available() is not None:
            return []
        named = {device(layer) for layer in known}
        return [name for pool in {pool_of(layer) for layer in known}
                for name in self.device_of(pool).devices() if name not in named]

    def room(self, layer: Layer) -> Room | None:
        name = self._pools.pool(pool_of(layer.id)).name
        with self.live(pool_of(layer.id)) as pool:
            left = head_room(pool.status(), pool.block)
        return Room(f"pool '{name}'", f"extend it with 'epochs pool extend {name}'",
                    pool.block * SECTOR, left.data, left.data_total, left.metadata,
                    left.metadata_total)


class DmThinFreeze(DeviceFreeze):
    """See :class:`blockcow.interface.FreezeTicket`."""

    def __init__(self, disks: DmThinBackend, parts: Parts) -> None:
        self._disks = disks
        self._pools: dict[str, ThinPool] = {}
        self._begun = False
        super().__init__(parts)

    def _prepare(self) -> None:
        for part, _ in self.parts:
            pool_id = pool_of(part.active.id)
            if pool_of(part.new_id) != pool_id:
                raise BlockError(f"disk {part.disk!r}: its layers are in different pools")
            if pool_id not in self._pools:
                with self._disks.writable(pool_id) as pool:
                    self._pools[pool_id] = pool
            if self.dm.info(device(part.active.id)) is None:
                raise BlockError(f"disk {part.disk!r}: device {device(part.active.id)} is not live")

    def _freeze(self) -> None:
        """Per disk a suspend, a message and a resume: no waiting for udev."""
        self._begun = True
        with self.suspended(device(part.active.id) for part, _ in self.parts):
            for part, _ in self.parts:
                self._pools[pool_of(part.active.id)].snapshot(
                    number_of(part.new_id), number_of(part.active.id))

    def _seal(self, part: Freeze, chain: Chain, progress: Progress | None) -> Frozen:
        frozen, written = self._disks.seal(_thin_layer(part.new_id, part.active.size),
                                           part.active.id, progress)
        return Frozen(part.disk, frozen, part.active, written)

    def _undo(self) -> None:
        """Before the pause nothing is made; and a pool that is full takes no messages."""
        for part, _ in self.parts if self._begun else ():
            self._disks.discard(part.new_id)
