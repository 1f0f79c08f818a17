"""Thin pools of ours: made on a block device or a file, opened, extended, closed.

A pool's device carries a label (:mod:`blockcow.pool_label`) that says which parts of it are
metadata and data. Opening maps those with linear devices and makes the thin pool over them; a file
goes through a loop device, which the kernel detaches when they are gone. What is live is always
named after the pool's id, so that whoever finds a device knows whose it is:

    epochs-ID-meta, epochs-ID-data     the parts of the device
    epochs-ID                          the thin pool
    epochs-LAYER                       a layer's thin device; LAYER begins with ID
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import loop, pool_label
from .devmapper import DIRECTORY, SECTOR, DeviceMapper, Target, open_driver
from .interface import BlockError, BlockRefused, SourceRefused
from .pool_label import CLOSED, OPEN, RESERVED, Label, LabelDamaged, Segment
from .thin_layers import PREFIX
from .thin_pool import METADATA_MAX, PoolFailed, PoolStatus, ThinPool, check_metadata
from .usage import in_use

MIB = 2**20
BLOCK = 128  # sectors of a pool's block: 64 KiB, the smallest there is
LARGE = 4 * 2**40  # bytes from which blocks grow, so that the metadata stays below its limit
LEAST = 16 * MIB  # bytes of a device that is worth a pool
LOW_WATER = 64 * MIB  # bytes of free data below which the kernel raises an event


class PoolRefused(BlockRefused):
    """A device or file that was offered for a pool cannot be taken."""


@dataclass(frozen=True)
class PoolName:
    """What the caller knows of a pool: ``id`` (8 hexadecimal digits), its ``name`` for people, the
    file or device that it is on, the store it belongs to."""

    id: str
    name: str
    path: Path
    store: uuid.UUID
    pool: uuid.UUID

    @property
    def device(self) -> str:
        return f"{PREFIX}{self.id}"


@dataclass(frozen=True)
class HeadRoom:
    """What is left in a pool, in bytes; ``metadata`` is what is left of its list of blocks."""

    data: int
    data_total: int
    metadata: int
    metadata_total: int


def boot_uuid() -> uuid.UUID:
    """This boot of the host (random(4))."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


class PoolDevice:
    """One pool on its device. Methods are called with the pool's lock held (:meth:`locked`)."""

    def __init__(self, name: PoolName, locks: Path) -> None:
        self.name = name
        self._lock_file = locks / f"pool-{name.id}"

    @property
    def dm(self) -> DeviceMapper:
        return open_driver()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that opens, closes, extends or photographs this pool."""
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Remove the lock file of a pool that is gone."""
        self._lock_file.unlink(missing_ok=True)

    # -- its device -----------------------------------------------------------------------------
    def make(self) -> None:
        """Write a fresh label and empty metadata. The device or file exists and was checked."""
        size = _size(self.name.path)
        if size < LEAST:
            raise PoolRefused(f"{self.name.path} has {size // MIB} MiB; a pool needs at least "
                              f"{LEAST // MIB} MiB")
        block = block_sectors(size)
        sectors = size // SECTOR
        first = RESERVED // SECTOR
        metadata = Segment(first, metadata_sectors(size, block))
        start = first + metadata.length
        data = Segment(start, (sectors - start) // block * block)
        label = Label(self.name.pool, self.name.store, data.start + data.length, block,
                      (metadata,), (data,))
        fd = os.open(self.name.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # The kernel formats metadata whose first block is zero.
            os.pwrite(fd, bytes(pool_label.BLOCK), metadata.start * SECTOR)
            os.fsync(fd)
        finally:
            os.close(fd)
        pool_label.write(self.name.path, label, first=True)

    def label(self) -> Label:
        """The label as it is on the device. BlockError if it is not this pool's."""
        path = self.name.path
        try:
            found = pool_label.read(path)
            size = _size(path)
        except OSError as error:
            raise BlockError(f"pool '{self.name.name}': {path} cannot be read: {error.strerror}; "
                             "bring the device or file back") from error
        if found is None:
            raise BlockError(f"pool '{self.name.name}': {path} carries no pool of Epochs; is it "
                             "the right device?")
        if found.pool != self.name.pool or found.store != self.name.store:
            raise BlockError(f"pool '{self.name.name}': {path} carries another pool (id "
                             f"{found.pool.hex[:8]}) than this store's {self.name.id}; nothing was "
                             "changed")
        if found.size * SECTOR > size:
            raise BlockError(f"pool '{self.name.name}': {path} has {size} bytes, but the pool "
                             f"needs {found.size * SECTOR}: it was cut short; enlarge it to that "
                             "size again, and check the data with 'epochs verify'")
        return found

    # -- live and not ---------------------------------------------------------------------------
    @property
    def is_open(self) -> bool:
        return self.dm.info(self.name.device) is not None

    def pool(self) -> ThinPool:
        """The live pool. BlockError if it is not open."""
        if not self.is_open:
            raise BlockError(f"pool '{self.name.name}' is not open")
        table = self.dm.table(self.name.device)
        return ThinPool(self.dm, self.name.device, DIRECTORY / f"{self.name.device}-meta",
                        int(table[0].params.split()[2]))

    def open(self) -> ThinPool:
        """Make the pool live, if it is not. Metadata is checked first if the pool was not closed
        before the host went down. PoolFailed, BlockError."""
        if self.is_open:
            pool = self.pool()
            pool.status()
            return pool
        label = self.label()
        self.close(mark=False)  # what a killed opening left
        try:
            with self._device() as device:
                self._map("meta", label.metadata, device)
                if label.state == OPEN:
                    check_metadata(DIRECTORY / f"{self.name.device}-meta")
                self._map("data", label.data, device)
                # From now on a crash leaves it open.
                label = pool_label.write(self.name.path, replace(label, state=OPEN,
                                                                 boot=boot_uuid()))
                self.dm.create(self.name.device, self._uuid("pool"), [self._target(label)])
            pool = self.pool()
            status = pool.status()
            if status.needs_check:
                raise PoolFailed(f"the kernel wants pool '{self.name.name}' checked before it is "
                                 "used; 'thin_check' says what is wrong")
            return pool
        except BaseException:
            self.close(mark=False)
            raise

    def close(self, *, mark: bool = True) -> None:
        """Take the pool down; nothing there is fine. DmBusy if a device of it is live. ``mark``:
        write into the label that it was closed."""
        was_open = self.is_open
        for part in ("", "-data", "-meta"):
            self.dm.remove(f"{self.name.device}{part}")
        if was_open and mark:
            pool_label.write(self.name.path, replace(self.label(), state=CLOSED))

    def close_if_idle(self) -> None:
        """Take the pool down unless a device of it is live."""
        if not self.dm.devices(f"{self.name.device[:len(PREFIX) + 8]}") or self.devices():
            return
        self.close()

    def devices(self) -> list[str]:
        """Names of the live thin devices of this pool."""
        own = {self.name.device, f"{self.name.device}-data", f"{self.name.device}-meta"}
        return [name for name in self.dm.devices(self.name.device) if name not in own]

    # -- size -----------------------------------------------------------------------------------
    def extend(self) -> None:
        """Take in whatever the device or file has become larger by. The guests go on; writes that
        waited for space are done. Killed anywhere, call it again."""
        room = head_room(self.open().status(), self.label().block)
        label = grown(self.label(), _size(self.name.path) // SECTOR,
                      short=room.metadata < room.metadata_total // 4)
        if label is not None:
            pool_label.write(self.name.path, label)
        label = self.label()
        with self._device() as device:
            for part, segments in (("meta", label.metadata), ("data", label.data)):
                self._reload(f"{self.name.device}-{part}", _linear(segments, device))
        self._reload(self.name.device, [self._target(label)])

    def _reload(self, name: str, targets: list[Target]) -> None:
        self.dm.load(name, targets)
        # Without flushing: what waits for space could never be flushed.
        self.dm.suspend(name, flush=False, lockfs=False)
        self.dm.resume(name)

    def head_room(self) -> HeadRoom:
        """Of a live pool."""
        pool = self.pool()
        return head_room(pool.status(), pool.block)

    # -- inside ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _device(self) -> Iterator[Path]:
        """The block device, by way of a loop device for a file."""
        if not _is_file(self.name.path):
            yield self.name.path
            return
        data = f"{self.name.device}-data"
        if self.dm.info(data) is not None:
            # Not any that is attached to the file: one that nobody uses may be about to go.
            ((_, minor),) = set(self.dm.deps(data))
            node = Path(f"/dev/loop{minor}")
            loop.refresh(node)
            yield node
            return
        with loop.attached(self.name.path) as node:
            yield node

    def _uuid(self, part: str) -> str:
        return f"EPOCHS-{self.name.pool.hex}-{part}"

    def _map(self, part: str, segments: tuple[Segment, ...], device: Path) -> None:
        self.dm.create(f"{self.name.device}-{part}", self._uuid(part), _linear(segments, device))

    def _target(self, label: Label) -> Target:
        # Discards are not passed on to a file: they would punch holes into it, and the space that
        # was set aside for the pool could be gone when it is needed.
        options = ["no_discard_passdown"] if _is_file(self.name.path) else []
        low = LOW_WATER // SECTOR // label.block
        return Target(0, label.data_sectors, "thin-pool",
                      f"{DIRECTORY}/{self.name.device}-meta {DIRECTORY}/{self.name.device}-data "
                      f"{label.block} {low} {len(options)} {' '.join(options)}".rstrip())


def _linear(segments: tuple[Segment, ...], device: Path) -> list[Target]:
    at, targets = 0, []
    for segment in segments:
        targets.append(Target(at, segment.length, "linear", f"{device} {segment.start}"))
        at += segment.length
    return targets


def head_room(status: PoolStatus, block: int) -> HeadRoom:
    size = block * SECTOR
    return HeadRoom((status.data_total - status.data_used) * size, status.data_total * size,
                    (status.metadata_total - status.metadata_used) * 4096,
                    status.metadata_total * 4096)


def block_sectors(size: int) -> int:
    """Sectors of a block for a pool of ``size`` bytes: 64 KiB, and from 4 TiB on twice as much for
    every doubling, at most 1 GiB."""
    block = BLOCK
    while size > LARGE and block < 2097152:
        size, block = size // 2, block * 2
    return block


def metadata_sectors(size: int, block: int) -> int:
    """Sectors of metadata for ``size`` bytes of pool. The kernel's own advice is 48 bytes a block;
    many snapshots that went their own ways need more, hence four times that, at least 4 MiB."""
    wanted = 192 * (size // SECTOR // block)
    wanted = min(max(wanted, 4 * MIB), METADATA_MAX)
    return -(-wanted // (4 * MIB)) * (4 * MIB) // SECTOR


def grown(label: Label, sectors: int, *, short: bool = False) -> Label | None:
    """The label of a pool whose device has ``sectors`` now; None if nothing of use came to it.
    ``short``: its metadata is nearly full, so it gets as much again."""
    start = label.size
    have = label.metadata_sectors
    wanted = max(metadata_sectors(sectors * SECTOR, label.block), 2 * have if short else 0)
    more_metadata = max(0, min(wanted, METADATA_MAX // SECTOR) - have)
    if sectors - start - more_metadata < label.block:
        more_metadata = 0
    data = (sectors - start - more_metadata) // label.block * label.block
    if data <= 0:
        return None
    metadata = label.metadata
    if more_metadata:
        metadata = _appended(metadata, Segment(start, more_metadata))
    start += more_metadata
    return replace(label, size=start + data, metadata=metadata,
                   data=_appended(label.data, Segment(start, data)))


def _appended(segments: tuple[Segment, ...], more: Segment) -> tuple[Segment, ...]:
    last = segments[-1]
    if last.start + last.length == more.start:
        return (*segments[:-1], Segment(last.start, last.length + more.length))
    return (*segments, more)


# -- what is offered for a pool ------------------------------------------------------------------
def check_device(path: Path, *, force: bool = False) -> None:
    """Refuse a device or file that is in use or holds something, unless told to take what is
    there. PoolRefused, SourceRefused."""
    used = in_use(path)
    if used:
        raise PoolRefused(f"{path} is in use, {used}; a pool needs a device of its own")
    try:
        found = pool_label.read(path)
    except LabelDamaged:
        found = None
    if found is not None:
        raise PoolRefused(f"{path} carries a pool of Epochs already (id {found.pool.hex[:8]}); if "
                          f"nothing needs it any more, 'wipefs --all {path}' clears it")
    holds = None if force else signatures(path)
    if holds:
        raise PoolRefused(f"{path} holds {holds}; --force takes it nevertheless, and destroys that")


def signatures(path: Path) -> str | None:
    """What blkid recognises on a device (a file system, an LVM physical volume, a partition table),
    None if nothing."""
    try:
        done = subprocess.run(["blkid", "--probe", "--output", "export", str(path)],
                              capture_output=True, text=True, check=False,
                              env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
    except FileNotFoundError:
        raise BlockError("blkid is not installed: install it (Debian: util-linux)") from None
    if done.returncode == 2:  # nothing found
        return None
    if done.returncode:
        raise BlockError(f"blkid cannot look at {path}: {done.stderr.strip()}")
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    kind = values.get("TYPE") or values.get("PTTYPE")
    if kind is None:
        return None
    return {"LVM2_member": "an LVM physical volume"}.get(
        kind, f"a partition table ({kind})" if "TYPE" not in values else f"{kind} data")


def check_exists(path: Path) -> bool:
    """Whether a device or file is there (then True), or a file could be made (False)."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise SourceRefused(f"{path.parent} does not exist: check the path") from None
        return False
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise SourceRefused(f"{path} is neither a file nor a block device: give one of them")
    return True


def allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes, or enlarge one, with its space set aside: a pool must never
    find its file system full. BlockError if there is no room."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        os.fsync(fd)
    except OSError as error:
        raise BlockError(f"{path} cannot be made {size} bytes large: {error.strerror}") from error
    finally:
        os.close(fd)


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.stat().st_mode)


def _size(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
