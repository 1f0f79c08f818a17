"""The ``dmsnap`` backend: stacked dm-snapshot targets over any base, exception stores in files.

A layer is a file ``ID.cow``, an exception store of dm-snapshot, over the layer beneath it; the base
stays where the user keeps it. The store of an active layer has room set aside for every block of
the disk, so that it never overflows; frozen, it is cut down to what is in it.

A guest opens a linear *head* device. Making a layer beforehand costs nothing in the pause: its
device is stacked on the active one, the head's table over it is loaded, and the freeze is a
suspend and a resume of the head. From then on the guest writes into the new store.

What is live, and :mod:`blockcow.dmsnap_stack` knows how to put up and take down::

    epochs-snap-STORE-LAYER-INODE     a layer's snapshot device, or a linear one for a base
    epochs-snap-STORE-LAYER-head      what the guest has open

STORE tells the stores of a host apart, INODE a merged layer from the one that it replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from . import exceptions
from .chains import merged_level
from .contents import Progress, checksum, sealed, signature, sync_file
from .device_freeze import DeviceFreeze
from .devmapper import DIRECTORY, open_driver
from .difference import compare, union
from .dmsnap_stack import CHUNK, Stack, cow_file
from .exception_merge import write_union
from .interface import (
    BlockError,
    BlockRefused,
    Chain,
    Difference,
    Freeze,
    FreezeTicket,
    Frozen,
    JsonDict,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Parts,
    Plain,
    Source,
    SourceRefused,
)
from .layer_files import checked, in_place
from .names import in_directory
from .qcow2_graph import raw_options, raw_tree
from .source import FLUSH_BUFFERS

MERGED = ".merge"


class DmSnapBackend(Plain):
    """See :class:`blockcow.interface.Backend`. ``directory`` must exist (mode 0700)."""

    name = "dmsnap"
    direct = True

    def __init__(self, directory: Path, locks: Path) -> None:
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 (keep symbolic links)
        self.stack = Stack(self.directory, locks)

    def available(self) -> str | None:
        try:
            open_driver()
        except BlockError as error:
            return str(error)
        if not os.access(self.directory, os.W_OK | os.X_OK):
            return f"{self.directory} is not a directory that we can write to: create it, mode 0700"
        return None

    # -- layers -----------------------------------------------------------------------------------
    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """Reads all of the disk's data once, for the checksum. SourceRefused for qcow2."""
        if source.format != "raw":
            raise SourceRefused(f"{source.path} is {source.format}, which device-mapper cannot "
                                f"read: convert it ('qemu-img convert -O raw {source.path} NEW')")
        return in_place(source, layer_id, self.name, progress)

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below = chain[0]
        self.make(layer_id, below.size)
        return Layer(layer_id, self.name, "snapshot", cow_file(layer_id), below.size,
                     backing=below.id)

    def make(self, layer_id: str, size: int) -> None:
        """An empty store with its room set aside. BlockError if there is none."""
        path = self.directory / cow_file(layer_id)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise BlockError(f"{path} exists already: give the layer another id") from None
        try:
            set_aside(fd, path, size)
            os.fsync(fd)  # or a power cut might leave an empty file under that name
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)

    def sync(self, layer: Layer) -> None:
        sync_file(self.directory / layer.file)
        sync_file(self.directory)

    def activate(self, chain: Chain) -> None:
        """The room of a store that was cut down by a freeze that did not come to its end is set
        aside again."""
        layer = chain[0]
        path = self._file(layer)
        for below in chain[1:]:
            self._file(below)
        with self.stack.locked():
            if self.stack.device_of(layer) is None:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    set_aside(fd, path, layer.size)
                finally:
                    os.close(fd)
            self.stack.put_up(chain)
            self.stack.put_up_head(layer)

    def deactivate(self, layer: Layer) -> None:
        with self.stack.locked():
            self.stack.take_down(layer.id)

    def go_on(self, layer: Layer) -> None:
        with self.stack.locked():
            self.stack.go_on(layer.id)

    def _file(self, layer: Layer) -> Path:
        path = in_directory(self.directory, layer.file)
        if not path.exists():
            raise LayerDamaged(f"layer {layer.id} ({path}) is missing", layer.id, path)
        return path

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        return [raw_options(DIRECTORY / self.stack.head(chain[0].id), node, direct=True)]

    def prepare_freeze(self, live: LiveBlocks, parts: Parts) -> FreezeTicket:
        return DmSnapFreeze(self, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """A head that has moved to its new layer stays there; else the new one goes. Without a
        head, what is in the new store tells."""
        outcome: dict[str, list[Layer]] = {}
        for part, _ in parts:
            new = _above(part)
            with self.stack.locked():
                moved = self.stack.settle_head(part.active.id, part.new_id)
            if moved is None:
                moved = self._holds_something(new)
            if moved:
                outcome[part.disk] = [new, self.seal_layer(part.active)]
            else:
                self.discard(part.new_id)
                outcome[part.disk] = [part.active]
        return outcome

    def _holds_something(self, layer: Layer) -> bool:
        path = self.directory / layer.file
        # One that was cut off while it was made is shorter than any store.
        return (path.exists() and path.stat().st_size >= exceptions.LEAST_CHUNK
                and bool(exceptions.changed(path, layer.size)))

    def files(self, layer_id: str) -> list[Path]:
        name = cow_file(layer_id)
        return [self.directory / name, self.directory / f"{name}{MERGED}"]

    def discard(self, layer_id: str) -> None:
        with self.stack.locked():
            self.stack.take_down(layer_id)
        for path in self.files(layer_id):
            path.unlink(missing_ok=True)

    def drop(self, layer: Layer) -> None:
        """Of a replacement that was not promoted only its own file; never the user's disk."""
        if layer.file.endswith(MERGED):
            (self.directory / layer.file).unlink(missing_ok=True)
        elif Path(layer.file).is_absolute():
            with self.stack.locked():
                self.stack.take_down(layer.id)
        else:
            self.discard(layer.id)

    def strays(self, known: set[str]) -> list[str]:
        """Live devices of this directory that no known layer accounts for."""
        return [] if self.available() is not None else self.stack.strays(known)

    # -- contents ---------------------------------------------------------------------------------
    def seal_layer(self, layer: Layer) -> Layer:
        """A layer that nobody writes to any more: cut down to what is in it, with its checksum."""
        path = self._file(layer)
        sync_file(path)
        os.truncate(path, exceptions.in_use(path))
        digest, seen = sealed(path)
        self.stack.refresh(path)
        return replace(layer, checksum=digest, signature=seen)

    def check(self, layer: Layer, full: bool) -> Layer:
        return checked(in_directory(self.directory, layer.file), layer, full)

    def usage(self, layer: Layer) -> int:
        """0 for a base that belongs to the user, whose space is not ours."""
        if Path(layer.file).is_absolute():
            return 0
        return self._file(layer).stat().st_blocks * 512

    @contextlib.contextmanager
    def opened(self, chain: Chain) -> Iterator[Path]:
        """The device of a frozen layer, held open; what is put up for that is taken down again."""
        for layer in chain:
            self._file(layer)
        with self.stack.locked():
            node = self.stack.put_up(chain, read_only=True)
            fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # While it was active somebody may have read it (udev does), and what is in the page
            # cache of a device does not change with what is written beneath it.
            fcntl.ioctl(fd, FLUSH_BUFFERS)
            yield node
        finally:
            os.close(fd)
            with self.stack.locked():
                self.stack.take_down_unused_of(chain[0].id)

    @contextlib.contextmanager
    def exposed(self, chain: Chain) -> Iterator[JsonDict]:
        with self.opened(chain) as node:
            yield raw_tree(node)

    def difference(self, a: Chain, b: Chain) -> Difference:
        """Only what is in the stores above the layer that both share can differ."""
        if a[0].size != b[0].size:
            raise BlockError(f"layers {a[0].id} and {b[0].id} are not of one disk: sizes differ")
        shared = {layer.id for layer in a} & {layer.id for layer in b}
        own = [layer for layer in (*a, *b) if layer.id not in shared]
        if not own:
            return Difference(())
        candidates = [(0, a[0].size)] if not shared else union(
            (found for layer in own
             for found in exceptions.changed(self._file(layer), layer.size)), a[0].size)
        with self.opened(a) as one, self.opened(b) as other, \
                one.open("rb", buffering=0) as left, other.open("rb", buffering=0) as right:
            return Difference(compare(
                candidates,
                lambda offset, length: os.pread(left.fileno(), length, offset),
                lambda offset, length: os.pread(right.fileno(), length, offset)))

    # -- chains -----------------------------------------------------------------------------------
    def consolidate(self, chain: Chain, count: int) -> Layer:
        if not 2 <= count < len(chain):
            raise BlockError(f"{count} layers of a chain of {len(chain)} cannot be merged")
        top, below = chain[0], chain[count]
        if Path(top.file).is_absolute():
            raise BlockError(f"{top.file} belongs to the user and is never replaced")
        path = self.directory / f"{cow_file(top.id)}{MERGED}"
        path.unlink(missing_ok=True)
        write_union([self._file(layer) for layer in chain[:count]], path)
        sync_file(self.directory)
        digest, seen = sealed(path)
        return replace(top, file=path.name, backing=below.id, checksum=digest, signature=seen,
                       level=merged_level([layer.level for layer in chain[:count]]))

    def promote(self, replacement: Layer) -> Layer:
        temporary = self.directory / replacement.file
        final = self.directory / cow_file(replacement.id)
        if not replacement.file.endswith(MERGED):
            raise BlockError(f"layer {replacement.id} is not a replacement: consolidate first")
        try:
            temporary.rename(final)
        except FileNotFoundError:
            if not final.exists() or checksum(final) != replacement.checksum:
                raise LayerDamaged(f"the merged layer {replacement.id} is gone: merge again",
                                   replacement.id, temporary) from None
        sync_file(self.directory)
        return replace(replacement, file=final.name, signature=signature(final))

    def rebacking(self, live: LiveBlocks, active: Layer, node: str, chain: Chain) -> None:
        """The hypervisor notices nothing: the active layer's device gets another table."""
        if not chain or active.backing != chain[0].id:
            raise BlockError(f"the chain does not begin with what lies under layer {active.id}")
        with self.stack.locked():
            self.stack.rest_on(active, chain)


def set_aside(fd: int, path: Path, size: int) -> None:
    """Let a store have room for every chunk of a disk of ``size`` bytes."""
    try:
        os.posix_fallocate(fd, 0, exceptions.room_for(size, CHUNK))
    except OSError as error:
        raise BlockRefused(f"{path} cannot get the room of the whole disk ({size >> 20} MiB): "
                         f"{error.strerror}") from error


class DmSnapFreeze(DeviceFreeze):
    """See :class:`blockcow.interface.FreezeTicket`."""

    def __init__(self, disks: DmSnapBackend, parts: Parts) -> None:
        self._disks = disks
        super().__init__(parts)

    def _prepare(self) -> None:
        disks = self._disks
        for part, chain in self.parts:
            with exceptions.Reader(disks._file(part.active)) as store:
                store.header()  # StoreInvalid, before anything has moved
            disks.make(part.new_id, part.active.size)
            sync_file(disks.directory)
            with disks.stack.locked():
                disks.stack.stack_on(_above(part), chain)

    def _freeze(self) -> None:
        """Suspend the heads and resume them with the tables that were loaded."""
        heads = [self._disks.stack.head(part.active.id) for part, _ in self.parts]

        def none_moves() -> None:
            for head in heads:
                self.dm.clear(head)

        with self.suspended(heads, failed=none_moves):
            pass  # resuming is what moves them

    def _seal(self, part: Freeze, chain: Chain, progress: Progress | None) -> Frozen:
        with self._disks.stack.locked():
            self._disks.stack.settle_head(part.active.id, part.new_id)
        frozen = self._disks.seal_layer(part.active)
        return Frozen(part.disk, frozen, _above(part),
                      (self._disks.directory / frozen.file).stat().st_size)

    def _undo(self) -> None:
        """Only before ``freeze`` succeeded; afterwards recover_freeze says what is where."""
        if self.frozen:
            return
        for part, _ in self.parts:
            with self._disks.stack.locked():
                self._disks.stack.settle_head(part.active.id, part.new_id)
            self._disks.discard(part.new_id)


def _above(part: Freeze) -> Layer:
    """The layer that becomes active with a freeze."""
    return Layer(part.new_id, DmSnapBackend.name, "snapshot", cow_file(part.new_id),
                 part.active.size, backing=part.active.id)
