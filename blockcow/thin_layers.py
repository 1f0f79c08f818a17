"""What frozen thin devices have in common, whoever keeps the list of them: reading, checksums,
differences. The backends say where a layer is.

Every layer stands alone; the pool shares the blocks.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from .contents import Progress, changed_checksum, checksum_of
from .devmapper import DIRECTORY, SECTOR, DeviceMapper, DmMissing, open_driver
from .difference import compare, union
from .interface import BlockError, Chain, Difference, JsonDict, Layer, LayerDamaged, Plain
from .names import checked_id
from .qcow2_graph import raw_options, raw_tree
from .reference import refer, reference_file, referred
from .thin_pool import ThinPool

PREFIX = "epochs-"


def device(layer_id: str) -> str:
    """Name of the device of ours through which a layer is read, or written where it is active."""
    return f"{PREFIX}{checked_id(layer_id)}"


def device_uuid(layer_id: str) -> str:
    """What device-mapper knows that device by."""
    return f"EPOCHS-{layer_id}"


class ThinLayers(Plain):
    """``directory`` takes hints only."""

    name: str
    direct = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # -- where layers are: the backends say -------------------------------------------------------
    @abstractmethod
    def live(self, pool: str) -> AbstractContextManager[ThinPool]:
        """A pool, live, and held meanwhile."""

    @abstractmethod
    def pool_of(self, layer: Layer) -> str:
        """What ``live`` takes for the pool that a layer is in."""

    @abstractmethod
    def number_of(self, layer: Layer) -> int:
        """The number of a layer in its pool. LayerDamaged if it is gone."""

    # -- devices ----------------------------------------------------------------------------------
    @property
    def dm(self) -> DeviceMapper:
        return open_driver()

    def available(self) -> str | None:
        try:
            open_driver()
        except BlockError as error:
            return str(error)
        return None

    def map(self, pool: ThinPool, layer: Layer, *, read_only: bool = False) -> Path:
        """Make a layer a live device of ours. LayerDamaged if it is gone."""
        try:
            return pool.activate(device(layer.id), device_uuid(layer.id), self.number_of(layer),
                                 layer.size // SECTOR, read_only=read_only)
        except DmMissing as error:
            raise missing(layer) from error

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        return [raw_options(Path(chain[0].file), node, direct=True)]

    def files(self, layer_id: str) -> list[Path]:
        return [reference_file(self.directory, layer_id)]

    @contextlib.contextmanager
    def opened(self, layer: Layer) -> Iterator[int]:
        """A frozen layer, open for reading. It is live meanwhile, unless it was already. The pool
        is held only at the beginning and the end: reading may take long. LayerDamaged if the layer
        is gone."""
        name = device(layer.id)
        with self.live(self.pool_of(layer)) as pool:
            if self.dm.info(name) is None:
                self.map(pool, layer, read_only=True)
            fd = os.open(DIRECTORY / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
            with self.live(self.pool_of(layer)):
                info = self.dm.info(name)
                if info is not None and info.read_only and not info.open_count:
                    self.dm.remove(name)

    # -- contents ---------------------------------------------------------------------------------
    def _signature(self, layer: Layer) -> str:
        """What the kernel says of a live layer: sectors that are mapped, the highest of them."""
        (line,) = self.dm.status(device(layer.id))
        if line.params.split()[0] in ("Fail", "Error"):
            raise LayerDamaged(f"layer {layer.id} cannot be read: its pool has failed", layer.id,
                               Path(layer.file))
        return f"thin:{line.params}"

    def _mapped(self, layer: Layer) -> list[tuple[int, int]]:
        """Extents (start, end) of a layer that are mapped."""
        with self.live(self.pool_of(layer)) as pool, pool.metadata_snapshot():
            return [(start, start + length)
                    for start, length in pool.mapped(self.number_of(layer))]

    def _unshared(self, a: Layer, b: Layer) -> list[tuple[int, int]]:
        """Ranges (offset, length) that two layers of one pool do not share."""
        with self.live(self.pool_of(a)) as pool, pool.metadata_snapshot():
            return pool.changed(self.number_of(a), self.number_of(b))

    def summed(self, layer: Layer, progress: Progress | None = None) -> Layer:
        """A frozen layer with checksum and signature, read whole."""
        with self.opened(layer) as fd:
            signature = self._signature(layer)
            return replace(layer, checksum=checksum_of(fd, self._mapped(layer), progress),
                           signature=signature)

    def seal(self, frozen: Layer, active_id: str, progress: Progress | None
             ) -> tuple[Layer, int]:
        """A frozen layer with checksum and signature, and how many bytes it does not share with
        the layer that the active one was before."""
        with self.opened(frozen) as fd:
            signature = self._signature(frozen)
            checksum, size = (self._sealed_by_change(frozen, fd, active_id, progress)
                              or self._sealed_whole(frozen, fd, progress))
        layer = replace(frozen, checksum=checksum, signature=signature)
        refer(self.directory, active_id, layer)
        return layer, size

    def _sealed_whole(self, frozen: Layer, fd: int, progress: Progress | None) -> tuple[str, int]:
        mapped = self._mapped(frozen)
        return checksum_of(fd, mapped, progress), sum(end - start for start, end in mapped)

    def _sealed_by_change(self, frozen: Layer, fd: int, active_id: str,
                          progress: Progress | None) -> tuple[str, int] | None:
        """By what the layer does not share with a known one; None if there is none."""
        hint = referred(self.directory, active_id)
        if hint is None:
            return None
        before = replace(frozen, id=hint.id, file=hint.file)
        try:
            if self.pool_of(before) != self.pool_of(frozen):
                return None
            with self.opened(before) as old:
                ranges = self._unshared(before, frozen)
                checksum = changed_checksum(hint.checksum, old, fd, ranges, progress)
        except LayerDamaged:
            return None  # deleted since
        return checksum, sum(length for _, length in ranges)

    def check(self, layer: Layer, full: bool) -> Layer:
        if layer.checksum is None:
            raise BlockError(f"layer {layer.id} is not frozen yet: there is no checksum to check")
        mend = "delete the epochs that use it"
        with self.opened(layer) as fd:
            signature = self._signature(layer)
            if not full and signature == layer.signature:
                return layer
            try:
                actual = checksum_of(fd, self._mapped(layer))
            except OSError as error:
                raise LayerDamaged(f"layer {layer.id} ({layer.file}) cannot be read "
                                   f"({error.strerror}): {mend}", layer.id,
                                   Path(layer.file)) from error
        if actual != layer.checksum:
            raise LayerDamaged(f"layer {layer.id} ({layer.file}) is damaged (its checksum "
                               f"differs): {mend}", layer.id, Path(layer.file))
        return replace(layer, signature=signature)

    def usage(self, layer: Layer) -> int:
        """Bytes of the pool that the layer refers to, though others share them."""
        with self.opened(layer):
            return int(self._signature(layer).removeprefix("thin:").split()[0]) * SECTOR

    @contextlib.contextmanager
    def exposed(self, chain: Chain) -> Iterator[JsonDict]:
        with self.opened(chain[0]):
            yield raw_tree(DIRECTORY / device(chain[0].id))

    def difference(self, a: Chain, b: Chain) -> Difference:
        if a[0].size != b[0].size:
            raise BlockError(f"layers {a[0].id} and {b[0].id} are not of one disk: sizes differ")
        if self.pool_of(a[0]) != self.pool_of(b[0]):
            raise BlockError(f"layers {a[0].id} and {b[0].id} are in different pools")
        if a[0].id == b[0].id:
            return Difference(())
        with self.opened(a[0]) as one, self.opened(b[0]) as other:
            return Difference(compare(
                union(self._unshared(a[0], b[0]), a[0].size),
                lambda offset, length: os.pread(one, length, offset),
                lambda offset, length: os.pread(other, length, offset)))


def missing(layer: Layer) -> LayerDamaged:
    """For a layer that is not in its pool any more."""
    return LayerDamaged(f"layer {layer.id} is missing from its pool: delete the epochs that use it",
                        layer.id, Path(layer.file))
