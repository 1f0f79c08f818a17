"""The ``lvm-thick`` backend: disks on ordinary logical volumes, with classic snapshots of LVM.

A classic snapshot keeps what its origin was, by copying each chunk before it is written for the
first time. That settles what is possible:

* The guest writes to the user's own volume, the *origin*; each frozen layer is a read-only snapshot
  of it, of a fixed size. One that gets full is invalid: its layer is damaged, and said to be.
* There is no snapshot of a snapshot, and writing to one would change its epoch: no forks.
* Going back copies what a snapshot kept into the origin. The snapshot stays what it is (LVM's
  ``--merge`` would use it up), and what the other snapshots need is copied into them on the way.

The guest does not open the origin itself but a linear *head* device over it. A rollback prepares
the new hypervisor on a head over the snapshot, where it reads; only once the machine has been
switched, in :meth:`LvmThickBackend.take_over`, is the origin written to and the head moved there.

In the pause: LVM makes the snapshot beforehand, while the guest runs. We take its device down and
erase its store, and in the pause make the device again, under LVM's name, while the origin is
suspended: so the snapshot begins there. LVM's lock on the volume group keeps its commands out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import exceptions
from .contents import Progress, changed_checksum, checksum, checksum_fd, sync_data
from .devmapper import DIRECTORY, SECTOR, DeviceMapper, DmMissing, Target, open_driver
from .difference import compare, union
from .interface import (
    BlockError,
    BlockRefused,
    Chain,
    Difference,
    Freeze,
    FreezeTicket,
    JsonDict,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Parts,
    Plain,
    Room,
    Source,
)
from .lvm_thick_freeze import LvmThickFreeze
from .lvm_tools import (
    PREFIX,
    TAG,
    Lvm,
    Volume,
    dm_name,
    kind_of,
    live_volume,
    volume_name,
)
from .qcow2_graph import raw_options, raw_tree
from .reference import refer, reference_file, referred
from .thin_layers import device, device_uuid

_PIECE = 1 << 20


class LvmThickBackend(Plain):
    """See :class:`blockcow.interface.Backend`. ``directory`` takes hints only; ``owner`` is whose
    volumes they are (a store's id).

    Every layer's chain ends with the base, which is the origin. A head that has not been moved to
    it yet has the snapshot under it in between.
    """

    name = "lvm-thick"
    direct = True
    takes_over = True

    def __init__(self, directory: Path, locks: Path, owner: str) -> None:
        self.directory, self.lvm, self.owner = directory, Lvm(locks), owner
        # One of these objects serves one step of an operation: a report for each layer is enough.
        self._known: dict[str, Volume] = {}

    @property
    def dm(self) -> DeviceMapper:
        return open_driver()

    def available(self) -> str | None:
        try:
            open_driver()
        except BlockError as error:
            return str(error)
        return self.lvm.available()

    # -- volumes ----------------------------------------------------------------------------------
    def origin(self, base: Layer) -> Volume:
        """The user's volume, active. LayerDamaged if it is gone, is another one, or has another
        size."""
        uuid = (base.signature or "").removeprefix("lv:")
        live = self._known.get(base.id) or live_volume(self.dm, base.file)
        if live is not None and (live.uuid, live.size) == (uuid, base.size):
            return live
        path = Path(base.file)
        found = self.lvm.volumes(f'vg_name="{path.parent.name}" && lv_name="{path.name}"')
        if not found:
            raise LayerDamaged(f"volume {path} is gone; bring it back (vgchange -ay, vgimport, "
                               "vgcfgrestore), or remove the machine", base.id, path)
        if found[0].uuid != uuid:
            raise LayerDamaged(f"{path} is another volume than the one that was added; rename it, "
                               "and give the right one its name back", base.id, path)
        if found[0].size != base.size:
            raise LayerDamaged(
                f"volume {path} has {found[0].size} bytes, but had {base.size} when it was added; "
                f"bring it back to that size ('lvresize -L {base.size}b {found[0].full_name}')",
                base.id, path)
        if self.dm.info(found[0].dm) is None:
            self.lvm.run("lvchange", "--quiet", "--activate", "y", found[0].full_name)
        self._known[base.id] = found[0]
        return found[0]

    def snapshot(self, layer: Layer) -> Volume:
        """The volume of a frozen layer, live. LayerDamaged if it is gone or overflowed."""
        found = (self._known.get(layer.id) or live_volume(self.dm, layer.file)
                 or self.lvm.find(layer.id))
        if found is None:
            raise LayerDamaged(f"layer {layer.id} is missing from its volume group: delete the "
                               "epochs that use it", layer.id, Path(layer.file))
        if self.dm.info(found.dm) is None:
            self.lvm.run("lvchange", "--quiet", "--activate", "y", f"{found.vg}/{found.origin}")
        try:
            (status,) = self.dm.status(found.dm)
        except DmMissing as error:
            raise LayerDamaged(f"layer {layer.id} ({found.path}) is not active: 'lvchange -ay "
                               f"{found.vg}/{found.origin}' says why", layer.id,
                               found.path) from error
        if "/" not in status.params:
            raise LayerDamaged(
                f"snapshot {found.path} is full and what it kept is lost (the kernel says "
                f"'{status.params}'): delete the epochs that use it; give later ones more room "
                "with the disk's option snapshot=SIZE", layer.id, found.path)
        self._known[layer.id] = found
        return found

    def know(self, layer_ids: Sequence[str]) -> dict[str, Volume]:
        """Look several frozen layers up with one report."""
        found = self.lvm.find_all(layer_ids)
        self._known.update(found)
        return found

    @staticmethod
    def store_of(volume: Volume) -> Path:
        """The device with a snapshot's exceptions."""
        return DIRECTORY / f"{volume.dm}-cow"

    def changed(self, volume: Volume) -> list[tuple[int, int]]:
        """Byte ranges in which a snapshot and its origin may differ. LayerDamaged if it overflowed.
        """
        try:
            return exceptions.changed(self.store_of(volume), volume.size)
        except (exceptions.StoreInvalid, exceptions.StoreDamaged, OSError) as error:
            raise LayerDamaged(f"the exceptions of snapshot {volume.path} cannot be read "
                               f"({error}): delete the epochs that use it",
                               volume.name.removeprefix(PREFIX), volume.path) from error

    # -- layers -----------------------------------------------------------------------------------
    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """The base is the user's volume itself, which the guest will write to."""
        given = self.lvm.offered(source.path)
        if kind_of(given) != self.name:
            raise BlockError(f"{given.path} is a thin volume, which has a backend of its own")
        return Layer(layer_id, self.name, "raw", str(given.path), source.size,
                     checksum=checksum(source.path, progress), signature=f"lv:{given.uuid}")

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below, base = chain[0], chain[-1]
        origin = self.origin(base)
        if below.id != base.id:
            self._refuse_overflow(origin, self.snapshot(below))
        return Layer(layer_id, self.name, "raw", str(DIRECTORY / device(layer_id)), base.size,
                     backing=below.id)

    def _refuse_overflow(self, origin: Volume, snapshot: Volume) -> None:
        """Going back writes to the origin, and so into every other snapshot. One that would get
        full by that is a reason not to."""
        written = self.changed(snapshot)
        for other in self.lvm.volumes(f'vg_name="{origin.vg}" && origin="{origin.name}"'):
            if other.name == snapshot.name or self.dm.info(other.dm) is None:
                continue
            used, total, _ = _fill(self.dm, other)
            if used is None:
                continue  # overflowed long ago
            have = self.changed(other)
            more = sum(length for _, length in _outside(written, have))
            if used + exceptions.room_for(more, 4096) > total:
                raise BlockRefused(
                    f"going back would write {more >> 20} MiB into snapshot {other.full_name}, "
                    f"which has only {(total - used) >> 20} MiB left and would be lost: give it "
                    f"more ('lvextend -L +{(more >> 20) + 4}M {other.full_name}')")

    def fork_refusal(self, layer: Layer) -> str | None:
        return (f"layer {layer.id} is a classic snapshot of LVM, which can be read or rolled back "
                "to, but not written to without changing its epoch: for forks put the disk on a "
                "thin volume (lvcreate --thin) or in a pool of ours (backend=dmthin)")

    def activate(self, chain: Chain) -> None:
        origin = self.origin(chain[-1])
        wanted = origin if len(chain) == 2 else self.snapshot(chain[1])
        name = device(chain[0].id)
        if self.dm.info(name) is None:
            self.dm.create(name, device_uuid(chain[0].id), _linear(wanted))

    def deactivate(self, layer: Layer) -> None:
        self._go_on(device(layer.id))
        self.dm.remove(device(layer.id))

    def _go_on(self, name: str) -> None:
        info = self.dm.info(name)
        if info is not None and info.suspended:
            self.dm.resume(name)

    def ready_to_take_over(self, chain: Chain) -> None:
        frozen, origin = chain[1], self.origin(chain[-1])
        if frozen.id != chain[-1].id:
            self._refuse_overflow(origin, self.snapshot(frozen))

    def take_over(self, chain: Chain) -> Layer:
        """Write what the snapshot under the head kept into the origin, and move the head there."""
        active, base = chain[0], chain[-1]
        if active.backing == base.id:
            return active
        frozen, origin = chain[1], self.origin(base)
        kept = self.snapshot(frozen)
        _copy_back(kept.node, origin.node, self.changed(kept))
        self.snapshot(frozen)  # what overflowed meanwhile was copied from in vain
        name = device(active.id)
        if self.dm.info(name) is not None:
            self.dm.load(name, _linear(origin))
            self.dm.suspend(name)
            self.dm.resume(name)
        if frozen.checksum is not None:
            refer(self.directory, active.id, frozen)
        return replace(active, backing=base.id)

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        return [raw_options(Path(chain[0].file), node, direct=True)]

    def prepare_freeze(self, live: LiveBlocks, parts: Parts) -> FreezeTicket:
        return LvmThickFreeze(self, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """The active layer is always what it was; the snapshots go."""
        self.lvm.settled()
        for _, chain in parts:
            # Before anything of LVM, which would wait for a volume that stands still.
            self._go_on(dm_name(chain[-1].file))
        for part, _ in parts:
            self.discard(part.new_id)
        return {part.disk: [part.active] for part, _ in parts}

    def discard(self, layer_id: str) -> None:
        self._go_on(device(layer_id))
        self.dm.remove(device(layer_id))
        self._known.pop(layer_id, None)
        volume = self.lvm.find(layer_id)
        if volume is not None:
            self.lvm.run("lvremove", "--quiet", "--yes", volume.full_name)
        reference_file(self.directory, layer_id).unlink(missing_ok=True)

    def drop(self, layer: Layer) -> None:
        """Never the origin, which is the user's."""
        if Path(layer.file).name == volume_name(layer.id) or layer.backing is not None:
            self.discard(layer.id)

    def files(self, layer_id: str) -> list[Path]:
        return [reference_file(self.directory, layer_id)]

    def strays(self, known: set[str]) -> list[str]:
        """Snapshots of this owner that no known layer accounts for."""
        if self.available() is not None:
            return []
        return [found.full_name
                for found in self.lvm.volumes(f'tags="{TAG}-store={self.owner}"')
                if found.thin_id is None and found.name.removeprefix(PREFIX) not in known]

    # -- contents ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def opened(self, layer: Layer) -> Iterator[int]:
        """A frozen layer, open for reading. LayerDamaged."""
        fd = os.open(self.snapshot(layer).node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def seal(self, part: Freeze, chain: Chain, volume: Volume,
             progress: Progress | None) -> tuple[Layer, int]:
        """The frozen layer with its checksum, and how many bytes it differs in from the one before
        it (0 if there is none that is known)."""
        sync_data(self.store_of(volume))
        frozen = Layer(part.new_id, self.name, "raw", str(volume.path), volume.size,
                       backing=chain[-1].id, signature=f"lv:{volume.uuid}")
        with self.opened(frozen) as fd:
            total, written = (self._summed_by_change(part.active.id, volume, fd, progress)
                              or (checksum_fd(fd, progress), 0))
        frozen = replace(frozen, checksum=total)
        self.snapshot(frozen)  # still whole
        refer(self.directory, part.active.id, frozen)
        return frozen, written

    def _summed_by_change(self, active_id: str, volume: Volume, fd: int,
                          progress: Progress | None) -> tuple[str, int] | None:
        """From the layer before: its exceptions until now, and the new one's, are all that can
        differ. They are read in this order, so that nothing falls between."""
        hint = referred(self.directory, active_id)
        if hint is None:
            return None
        before = Layer(hint.id, self.name, "raw", hint.file, volume.size)
        try:
            old = self.snapshot(before)
            found = union([*self.changed(old), *self.changed(volume)], volume.size)
            with self.opened(before) as other:
                total = changed_checksum(hint.checksum, other, fd, found, progress)
            self.snapshot(before)  # still whole
        except (LayerDamaged, OSError):  # it may just have overflowed
            return None
        return total, sum(length for _, length in found)

    def check(self, layer: Layer, full: bool) -> Layer:
        """Of the base only that it is there, as large as it was: the guest writes to it."""
        if layer.backing is None:
            self.origin(layer)
            return layer
        volume = self.snapshot(layer)
        if layer.signature != f"lv:{volume.uuid}":
            raise LayerDamaged(f"{volume.path} is another volume than the one that was frozen: "
                               "delete the epochs that use it", layer.id, volume.path)
        if full:
            try:
                with self.opened(layer) as fd:
                    actual = checksum_fd(fd)
            except OSError as error:
                raise LayerDamaged(f"layer {layer.id} ({volume.path}) cannot be read "
                                   f"({error.strerror}): delete the epochs that use it", layer.id,
                                   volume.path) from error
            self.snapshot(layer)
            if actual != layer.checksum:
                raise LayerDamaged(f"layer {layer.id} ({volume.path}) is damaged (its checksum "
                                   "differs): delete the epochs that use it", layer.id,
                                   volume.path)
        return layer

    def room(self, layer: Layer) -> Room | None:
        """What the volume group has for the next snapshot."""
        found = self.lvm.volumes(f'lv_dm_path="{DIRECTORY}/{_below(self.dm, layer)}"')
        if not found:
            return None
        return Room(f"volume group {found[0].vg}", "extend it with 'vgextend'", found[0].extent,
                    found[0].free, found[0].free)

    def usage(self, layer: Layer) -> int:
        """Bytes in a snapshot; 0 for the origin, which is the user's."""
        if Path(layer.file).name != volume_name(layer.id):
            return 0
        used, _, _ = _fill(self.dm, self.snapshot(layer))
        return used or 0

    @contextlib.contextmanager
    def exposed(self, chain: Chain) -> Iterator[JsonDict]:
        yield raw_tree(self.snapshot(chain[0]).node)

    def difference(self, a: Chain, b: Chain) -> Difference:
        if a[0].id == b[0].id:
            return Difference(())
        if a[0].size != b[0].size or a[-1].id != b[-1].id:
            raise BlockError(f"layers {a[0].id} and {b[0].id} are not of one disk")
        candidates = union([*self.changed(self.snapshot(a[0])), *self.changed(self.snapshot(b[0]))],
                           a[0].size)
        with self.opened(a[0]) as one, self.opened(b[0]) as other:
            return Difference(compare(
                candidates,
                lambda offset, length: os.pread(one, length, offset),
                lambda offset, length: os.pread(other, length, offset)))


def _linear(volume: Volume) -> list[Target]:
    return [Target(0, volume.size // SECTOR, "linear", f"{volume.node} 0")]


def _below(dm: DeviceMapper, layer: Layer) -> str:
    """Name of the device under a head."""
    try:
        ((major, minor),) = dm.deps(device(layer.id))
    except DmMissing:
        return ""
    return Path(f"/sys/dev/block/{major}:{minor}/dm/name").read_text().strip()


def _fill(dm: DeviceMapper, volume: Volume) -> tuple[int | None, int, int]:
    """Bytes used, in all, and of metadata, of a live snapshot; None if it overflowed."""
    (status,) = dm.status(volume.dm)
    used, slash, rest = status.params.partition("/")
    if not slash:
        return None, 0, 0
    total, _, metadata = rest.partition(" ")
    return int(used) * SECTOR, int(total) * SECTOR, int(metadata or 0) * SECTOR


def _outside(wanted: Sequence[tuple[int, int]], have: Sequence[tuple[int, int]]
             ) -> Iterator[tuple[int, int]]:
    """The parts of sorted ranges that lie outside other sorted ranges."""
    at = 0
    for first, length in wanted:
        start, end = first, first + length
        while start < end:
            while at < len(have) and sum(have[at]) <= start:
                at += 1
            if at == len(have) or have[at][0] >= end:
                yield start, end - start
                break
            if have[at][0] > start:
                yield start, have[at][0] - start
            start = sum(have[at])


def _copy_back(source: Path, target: Path, found: Sequence[tuple[int, int]]) -> None:
    """Copy ranges from a snapshot to its origin, durably. Repeatable: what was copied reads the
    same in the snapshot as before."""
    with exceptions.Reader(source) as snapshot:
        write = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for start, length in found:
                for offset in range(start, start + length, _PIECE):
                    data = memoryview(snapshot.read(offset, min(_PIECE, start + length - offset)))
                    done = 0
                    while done < len(data):
                        done += os.pwrite(write, data[done:], offset + done)
            os.fsync(write)
            # The guest's hypervisor reads past this cache, and writes past it from now on.
            os.posix_fadvise(write, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(write)
