"""The ``lvm-thin`` backend: layers as thin volumes of LVM, in the pool that the disk is in.

LVM takes a second for a snapshot, most of it its own housekeeping, and suspends what it works on.
So its part is done while the guest runs: it makes a volume for the frozen layer, of whatever
content. In the pause the kernel is told to make that volume's device anew, as a snapshot of the
active one (``create_snap``, under the number that LVM recorded): LVM's metadata and its pool's
transaction number stay what they were. LVM's lock on the volume group keeps its commands out from
before the pause until after it.

The user's volume is never written to; our volumes are tagged ``epochs`` and with what they belong
to, and LVM activates none of them by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .contents import Progress
from .device_freeze import DeviceFreeze
from .devmapper import SECTOR, DmMissing
from .interface import (
    BlockError,
    BlockRefused,
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
from .lvm_tools import (
    PREFIX,
    TAG,
    Lvm,
    LvmFailed,
    Volume,
    dm_name,
    full_name,
    pool_locked,
    tag,
    volume_name,
)
from .pools import head_room
from .reference import refer, reference_file, referred
from .thin_layers import ThinLayers, device, missing
from .thin_pool import PoolFailed, ThinPool


class LvmThinBackend(ThinLayers):
    """See :class:`blockcow.interface.Backend`. ``owner`` is whose volumes they are (a store's id):
    other stores' are left alone."""

    name = "lvm-thin"

    def __init__(self, directory: Path, locks: Path, owner: str) -> None:
        super().__init__(directory)
        self.lvm, self._owner = Lvm(locks), owner
        self._known: dict[str, Volume] = {}

    def available(self) -> str | None:
        return super().available() or self.lvm.available()

    # -- volumes ----------------------------------------------------------------------------------
    def volume(self, layer: Layer) -> Volume:
        """The volume of a layer. LayerDamaged if it is gone."""
        if layer.id not in self._known:
            found = self.lvm.find(layer.id)
            if found is None or found.thin_id is None:
                raise missing(layer)
            self._known[layer.id] = found
        return self._known[layer.id]

    def seen(self, layer_id: str) -> Volume | None:
        """A volume that was looked up already."""
        return self._known.get(layer_id)

    def know(self, layers: Sequence[Layer]) -> None:
        """Look several up with one report."""
        self._known.update(self.lvm.find_all(layer.id for layer in layers
                                             if layer.id not in self._known))

    def make(self, layer_id: str, origin: str, owner: str, *, writable: bool) -> None:
        """A snapshot of a volume (``VG/LV``), not active."""
        self.lvm.run("lvcreate", "--quiet", "--snapshot", "--name", volume_name(layer_id),
                     "--permission", "rw" if writable else "r", "--setactivationskip", "y",
                     "--addtag", TAG, "--addtag", f"{TAG}-store={self._owner}",
                     *(["--addtag", tag(owner)] if owner else []), origin)

    def pool_of(self, layer: Layer) -> str:
        found = self.volume(layer)
        return f"{found.vg}/{found.pool}"

    def number_of(self, layer: Layer) -> int:
        number = self.volume(layer).thin_id
        if number is None:
            raise missing(layer)
        return number

    @contextlib.contextmanager
    def live(self, pool: str) -> Iterator[ThinPool]:
        with pool_locked(pool):
            yield self.thin_pool(pool)

    def thin_pool(self, pool: str) -> ThinPool:
        """A pool by its name in LVM; it is activated if it is not."""
        vg, name = pool.split("/")
        seen = next((one for one in self._known.values() if (one.vg, one.pool) == (vg, name)), None)
        if seen is None:
            raise BlockError(f"no volume in pool {pool} was looked up")
        if self.dm.info(seen.pool_dm) is None:
            self.lvm.run("lvchange", "--quiet", "--activate", "y", pool)
        (table,) = self.dm.table(seen.pool_dm)
        return ThinPool(self.dm, seen.pool_dm, seen.pool_metadata, int(table.params.split()[2]))

    def layer_of(self, layer_id: str, volume: Volume) -> Layer:
        """The layer that is in a volume beside ``volume``."""
        return Layer(layer_id, self.name, "raw", str(volume.path.parent / volume_name(layer_id)),
                     volume.size)

    # -- layers -----------------------------------------------------------------------------------
    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """The base layer is a snapshot of the user's volume."""
        given = self.lvm.offered(source.path)
        self.make(layer_id, given.full_name, owner, writable=False)
        return self.summed(self.layer_of(layer_id, given), progress)

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below = chain[0]
        self.make(layer_id, full_name(below.file), owner, writable=True)
        refer(self.directory, layer_id, below)
        return replace(below, id=layer_id, checksum=None, signature=None,
                       file=str(Path(below.file).parent / volume_name(layer_id)))

    def activate(self, chain: Chain) -> None:
        file = chain[0].file
        info = self.dm.info(dm_name(file))
        if info is not None and info.live_table:
            self._go_on(chain[0])
            return
        try:
            self.lvm.run("lvchange", "--quiet", "--activate", "y", "--ignoreactivationskip",
                         full_name(file))
        except LvmFailed:
            self.volume(chain[0])  # LayerDamaged if that is the reason
            raise

    def deactivate(self, layer: Layer) -> None:
        if self.dm.info(dm_name(layer.file)) is not None:
            self._go_on(layer)
            self.lvm.run("lvchange", "--quiet", "--activate", "n", full_name(layer.file))

    def _go_on(self, layer: Layer) -> None:
        """One that was suspended by a killed freeze; by ioctl, for LVM would wait for it."""
        name = dm_name(layer.file)
        info = self.dm.info(name)
        if info is not None and info.suspended:
            self.dm.resume(name)

    def prepare_freeze(self, live: LiveBlocks, parts: Parts) -> FreezeTicket:
        return LvmThinFreeze(self, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """The active layer is always what it was; the copies go."""
        self.lvm.settled()
        for part, _ in parts:
            self._go_on(part.active)
        for part, _ in parts:
            self.discard(part.new_id)
        return {part.disk: [part.active] for part, _ in parts}

    def discard(self, layer_id: str) -> None:
        self._known.pop(layer_id, None)
        self.dm.remove(device(layer_id))
        volume = self.lvm.find(layer_id)
        if volume is not None:
            self.lvm.run("lvremove", "--quiet", "--yes", volume.full_name)
        reference_file(self.directory, layer_id).unlink(missing_ok=True)

    def drop(self, layer: Layer) -> None:
        self._known.pop(layer.id, None)
        self.dm.remove(device(layer.id))
        try:
            self.lvm.run("lvremove", "--quiet", "--yes", full_name(layer.file))
        except LvmFailed:
            self.discard(layer.id)  # it may be gone, or have been moved
        reference_file(self.directory, layer.id).unlink(missing_ok=True)

    def strays(self, known: set[str]) -> list[str]:
        """Volumes of this owner that no known layer accounts for."""
        if self.available() is not None:
            return []
        return [found.full_name
                for found in self.lvm.volumes(f'tags="{TAG}-store={self._owner}"')
                if found.thin_id is not None and found.name.removeprefix(PREFIX) not in known]

    def room(self, layer: Layer) -> Room | None:
        pool_name = self.pool_of(layer)
        with self.live(pool_name) as pool:
            left = head_room(pool.status(), pool.block)
        return Room(f"thin pool {pool_name}", f"extend it with 'lvextend {pool_name}'",
                    pool.block * SECTOR, left.data, left.data_total, left.metadata,
                    left.metadata_total)


class LvmThinFreeze(DeviceFreeze):
    """See :class:`blockcow.interface.FreezeTicket`."""

    def __init__(self, disks: LvmThinBackend, parts: Parts) -> None:
        self._disks = disks
        self._steps: list[tuple[str, ThinPool, int, int]] = []
        """Per disk: the active volume's device, the pool, the new number, the active one."""
        self._transactions: dict[str, int] = {}
        """Of each pool, by the name of its device, before the volumes were looked up."""
        super().__init__(parts)

    def _prepare(self) -> None:
        disks, parts = self._disks, self.parts
        hints = [hint for part, _ in parts
                 if (hint := referred(disks.directory, part.active.id)) is not None]
        disks.know([*(part.active for part, _ in parts),
                    *(replace(parts[0][0].active, id=hint.id) for hint in hints)])
        for part, _ in parts:
            active = disks.volume(part.active)
            if self.dm.info(active.dm) is None:
                raise BlockError(f"disk {part.disk!r}: volume {active.full_name} is not active")
            disks.make(part.new_id, self._origin(part).full_name, part.owner, writable=False)
        for part, _ in parts:
            pool = disks.thin_pool(disks.pool_of(part.active))
            self._transactions[pool.name] = pool.status().transaction
        new = [replace(part.active, id=part.new_id) for part, _ in parts]
        disks.know(new)
        for (part, _), one in zip(parts, new, strict=True):
            pool = disks.thin_pool(disks.pool_of(one))
            self._steps.append((disks.volume(part.active).dm, pool, disks.number_of(one),
                                disks.number_of(part.active)))

    def arm(self) -> None:
        """Take LVM's lock, and the new devices out of the way that LVM has made."""
        self.held.enter_context(self._disks.lvm.group_locked(
            self._disks.volume(part.active).vg for part, _ in self.parts))
        for _, pool, _, _ in self._steps:
            status = pool.status()
            if status.mode != "rw":
                raise PoolFailed(f"thin pool {pool.name} is {status.mode}: extend it with "
                                 "'lvextend'")
            if status.transaction != self._transactions[pool.name]:
                raise BlockRefused(f"somebody else changes volumes in thin pool {pool.name}; try "
                                   "again")
        for _, pool, number, _ in self._steps:
            with contextlib.suppress(DmMissing):
                pool.delete(number)

    def _origin(self, part: Freeze) -> Volume:
        """What LVM is told that the new volume is a snapshot of: the frozen layer before it, which
        is not in use, so that LVM has nothing to suspend; else the active one."""
        hint = referred(self._disks.directory, part.active.id)
        found = self._disks.seen(hint.id) if hint is not None else None
        active = self._disks.volume(part.active)
        return found if found and (found.vg, found.pool) == (active.vg, active.pool) else active

    def _freeze(self) -> None:
        """Per disk a suspend, a message and a resume: nothing of LVM."""
        with self.suspended(active for active, _, _, _ in self._steps):
            for _, pool, number, origin in self._steps:
                pool.snapshot(number, origin)

    def _seal(self, part: Freeze, chain: Chain, progress: Progress | None) -> Frozen:
        fresh = self._disks.layer_of(part.new_id, self._disks.volume(part.active))
        frozen, written = self._disks.seal(fresh, part.active.id, progress)
        return Frozen(part.disk, frozen, part.active, written)

    def _undo(self) -> None:
        self._disks.recover_freeze(None, self.parts)
