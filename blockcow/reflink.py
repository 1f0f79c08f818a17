"""The ``reflink`` backend: whole raw files that share their blocks, on XFS or btrfs.

Each layer is a file ``ID.raw`` that stands alone; the file system does the copy on write. There
are no chains: a layer's ``backing`` is None, and consolidating is never needed.

A freeze is FICLONE of the active file to a file that was created before. The ioctl writes the
source's dirty pages out first, which is why ``prepare`` does that while the guest runs. The
active file stays what it was; the new id names the frozen copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from .contents import (
    BLOCK,
    Progress,
    changed_checksum,
    data_extents,
    sealed,
    signature,
    sync_data,
    sync_file,
)
from .difference import compare, union
from .fiemap import extents, unshared
from .interface import (
    BlockError,
    Chain,
    Difference,
    FreezeTicket,
    Frozen,
    JsonDict,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Parts,
    Plain,
    PlainFreeze,
    Source,
)
from .layer_files import checked
from .names import checked_id, in_directory
from .qcow2_graph import raw_options, raw_tree
from .reference import refer, reference_file, referred
from .tools import run

FICLONE = 0x40049409
"""linux/fs.h: _IOW(0x94, 9, int); see ioctl_ficlone(2)."""

_CANNOT = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


def raw_file(layer_id: str) -> str:
    return f"{checked_id(layer_id)}.raw"


def files(directory: Path, layer_id: str) -> list[Path]:
    name = raw_file(layer_id)
    return [directory / name, directory / f"{name}.tmp", reference_file(directory, layer_id)]


def _remove(directory: Path, layer_id: str) -> None:
    for path in files(directory, layer_id):
        path.unlink(missing_ok=True)


def _sealed_by_change(
    copy: Path, active: Path, layer_id: str, progress: Progress | None
) -> tuple[str, str, int] | None:
    """Checksum and signature of a durable ``copy`` from those of the layer that ``active`` refers
    to, reading only what the two do not share, and the size of that; None if that layer cannot be
    relied on."""
    hint = referred(active.parent, layer_id)
    if hint is None:
        return None
    known = copy.with_name(hint.file)
    try:
        if signature(known) != hint.signature:
            return None
        with known.open("rb") as old, copy.open("rb") as new:
            size = os.fstat(new.fileno()).st_size
            if os.fstat(old.fileno()).st_size != size:
                return None
            seen = signature(copy)
            ranges = list(unshared(extents(old.fileno(), size), extents(new.fileno(), size)))
            total = changed_checksum(hint.checksum, old.fileno(), new.fileno(), ranges, progress)
    except (OSError, ValueError):
        return None
    return total, seen, sum(length for _, length in ranges)


def _new_file(path: Path) -> int:
    """An open, empty file that did not exist, mode 0600. The caller closes it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:
        raise BlockError(f"{path} exists already: give the layer another id") from None


def _reflink(source: Path, target: Path) -> None:
    """``target`` becomes a copy of ``source``; complete under its name or not there at all."""
    if target.exists():
        raise BlockError(f"{target} exists already: give the layer another id")
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    write = _new_file(temporary)
    try:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(write, FICLONE, read)
        finally:
            os.close(read)
    except BaseException:
        temporary.unlink()
        raise
    finally:
        os.close(write)
    temporary.rename(target)


class ReflinkBackend(Plain):
    """See :class:`blockcow.interface.Backend`. ``directory`` must exist (mode 0700)."""

    name = "reflink"

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 (keep symbolic links)

    def available(self) -> str | None:
        """Tries a reflink of one block in the directory: no list of file systems is complete."""
        try:
            with (
                tempfile.TemporaryFile(dir=self.directory) as source,
                tempfile.TemporaryFile(dir=self.directory) as target,
            ):
                source.write(b"\1" * 4096)
                source.flush()
                fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        except OSError as error:
            if error.errno not in _CANNOT:
                return f"{self.directory} cannot be written to ({error.strerror}): create it"
            return (
                f"the file system of {self.directory} has no reflinks: put the store on btrfs or "
                "on XFS made with reflink=1, or use the qcow2 backend"
            )
        return None

    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """Reflinked if the disk is on the same file system, else copied; qcow2 is converted.
        ``progress`` gets the bytes copied or read since its last call."""
        target = self.directory / raw_file(layer_id)
        if source.format == "raw" and stat.S_ISREG(source.path.stat().st_mode):
            try:
                _reflink(source.path, target)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise BlockError(f"{source.path} was not copied: {error.strerror}") from error
                self._copy(source, target, progress)
        else:
            self._copy(source, target, progress)
        size = target.stat().st_size
        if size != source.size:
            target.unlink()
            raise BlockError(f"{source.path} changed its size: offer it again")
        return self._sealed(Layer(layer_id, self.name, "raw", target.name, size), progress)

    def _copy(self, source: Source, target: Path, progress: Progress | None) -> None:
        temporary = target.with_name(target.name + ".tmp")
        temporary.unlink(missing_ok=True)
        try:
            write = _new_file(temporary)
            try:
                if source.format == "raw":
                    os.ftruncate(write, source.size)
                    _copy_data(source, write, progress)
                else:
                    run(["qemu-img", "convert", "-f", source.format, "-O", "raw",
                         str(source.path), str(temporary)])  # fmt: skip
            finally:
                os.close(write)
            temporary.rename(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise BlockError(f"{source.path} was not copied: {error.strerror}") from error
            raise

    def _sealed(self, layer: Layer, progress: Progress | None = None) -> Layer:
        digest, seen = sealed(self.directory / layer.file, progress)
        sync_file(self.directory)
        return replace(layer, checksum=digest, signature=seen)

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below = chain[0]
        layer = Layer(checked_id(layer_id), self.name, "raw", raw_file(layer_id), below.size)
        try:
            _reflink(self.directory / below.file, self.directory / layer.file)
        except FileNotFoundError as error:
            path = self.directory / below.file
            raise LayerDamaged(f"layer {below.id} ({path}) is missing", below.id, path) from error
        except OSError as error:
            raise BlockError(f"layer {below.id} was not cloned: {error.strerror}") from error
        refer(self.directory, layer.id, below)
        return layer

    def sync(self, layer: Layer) -> None:
        sync_file(self.directory / layer.file)
        sync_file(self.directory)

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        path = self.directory / chain[0].file
        if not path.exists():
            raise LayerDamaged(f"layer {chain[0].id} ({path}) is missing", chain[0].id, path)
        return [raw_options(path, node)]

    def prepare_freeze(
        self, live: LiveBlocks, parts: Parts
    ) -> FreezeTicket:
        return ReflinkFreeze.prepare(self.directory, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """The active layer is always what it was; the copies go."""
        for part, _ in parts:
            _remove(self.directory, part.new_id)
        return {part.disk: [part.active] for part, _ in parts}

    def files(self, layer_id: str) -> list[Path]:
        return files(self.directory, layer_id)

    def discard(self, layer_id: str) -> None:
        _remove(self.directory, layer_id)

    def drop(self, layer: Layer) -> None:
        if not Path(layer.file).is_absolute():
            _remove(self.directory, layer.id)

    def check(self, layer: Layer, full: bool) -> Layer:
        return checked(in_directory(self.directory, layer.file), layer, full)

    def usage(self, layer: Layer) -> int:
        """Every block the file refers to, though others share it: deleting one layer of many
        frees less."""
        return (self.directory / layer.file).stat().st_blocks * 512

    @contextlib.contextmanager
    def exposed(self, chain: Chain) -> Iterator[JsonDict]:
        path = self.directory / chain[0].file
        if not path.exists():
            raise LayerDamaged(f"layer {chain[0].id} ({path}) is missing", chain[0].id, path)
        yield raw_tree(path)

    def difference(self, a: Chain, b: Chain) -> Difference:
        """Blocks at the same physical place are equal; the others are read and compared."""
        if a[0].size != b[0].size:
            raise BlockError(f"layers {a[0].id} and {b[0].id} are not of one disk: sizes differ")
        with contextlib.ExitStack() as stack:
            fds = []
            for layer in (a[0], b[0]):
                fds.append(os.open(self.directory / layer.file, os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            one, other = fds
            ranges = unshared(extents(one, a[0].size), extents(other, b[0].size))
            return Difference(
                compare(
                    union(ranges, a[0].size),
                    lambda offset, length: _read(one, offset, length),
                    lambda offset, length: _read(other, offset, length),
                )
            )

    def seal_layer(self, layer: Layer) -> Layer:
        """Freeze a layer that no process writes to any more: durable, checksummed."""
        return self._sealed(layer)


def _copy_data(source: Source, write: int, progress: Progress | None) -> None:
    """Copy what is not zero; the target is all zero and as long as the source."""
    read = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(read, 0, os.SEEK_END)
        if size != source.size:
            raise BlockError(f"{source.path} changed its size: offer it again")
        zeros = bytes(BLOCK)
        for start, end in data_extents(read, size):
            for offset in range(start, end, BLOCK):
                piece = _read(read, offset, min(BLOCK, end - offset))
                if piece != zeros[: len(piece)]:
                    os.pwrite(write, piece, offset)
                if progress is not None:
                    progress(len(piece))
    finally:
        os.close(read)


def _read(fd: int, offset: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(fd, length, offset)
        if not piece:
            raise BlockError("the file shrank while it was read")
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


class ReflinkFreeze(PlainFreeze):
    """See :class:`blockcow.interface.FreezeTicket`. Made by :meth:`prepare`."""

    def __init__(self, directory: Path, parts: Parts) -> None:
        self._directory = directory
        self._parts = parts
        self._copies = contextlib.ExitStack()
        self._pairs: list[tuple[int, int]] = []
        self._frozen = False

    @classmethod
    def prepare(cls, directory: Path, parts: Parts) -> ReflinkFreeze:
        ticket = cls(directory, parts)
        created: list[str] = []
        try:
            for part, _ in parts:
                path = directory / part.active.file
                sync_data(path)
                read = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                ticket._copies.callback(os.close, read)
                write = _new_file(directory / raw_file(part.new_id))
                ticket._copies.callback(os.close, write)
                created.append(part.new_id)
                ticket._pairs.append((write, read))
        except BaseException as error:
            ticket._copies.close()
            for layer_id in created:
                _remove(directory, layer_id)
            if isinstance(error, OSError):
                raise BlockError(f"the disks could not be prepared: {error}") from error
            raise
        return ticket

    def freeze(self) -> None:
        """One ioctl per disk. A copy that fails makes all of them worthless: they stay unsealed
        until ``abort`` removes them, and no active layer has changed."""
        if self._frozen:
            raise BlockError("this freeze was done already: prepare another one")
        try:
            for write, read in self._pairs:
                fcntl.ioctl(write, FICLONE, read)
        except OSError as error:
            raise BlockError(f"the disks were not frozen: {error.strerror}") from error
        self._frozen = True

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        if not self._frozen:
            raise BlockError("nothing is frozen yet: call freeze() before seal()")
        self._copies.close()
        outcome = []
        for part, _ in self._parts:
            path = self._directory / raw_file(part.new_id)
            active = self._directory / part.active.file
            sync_file(path)
            digest, seen, written = (
                _sealed_by_change(path, active, part.active.id, progress)
                or (*sealed(path, progress), path.stat().st_blocks * 512))
            frozen = Layer(
                part.new_id, "reflink", "raw", path.name, part.active.size, None, digest, seen
            )
            refer(self._directory, part.active.id, frozen)
            outcome.append(Frozen(part.disk, frozen, part.active, written))
        if self._parts:
            sync_file(self._directory)
        return outcome

    def abort(self) -> None:
        """Remove the copies, finished or not: nobody uses them before ``seal`` returned."""
        self._copies.close()
        for part, _ in self._parts:
            _remove(self._directory, part.new_id)
