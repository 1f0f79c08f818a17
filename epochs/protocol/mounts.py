"""``mount`` and ``umount``: an epoch's disk to look at, read-only, over a throw-away overlay.

::

    STORE/mounts/ID/    where the daemon works that shows the disk, and its overlay
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from blockcow import BlockError, fuse
from epochs import filesystems, locks, points
from epochs.catalog import EpochRecord, JournalRecord, MountRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import EpochsError, NotFound, Refused
from epochs.filesystems import FileSystem
from epochs.processes import working_in
from epochs.protocol.journal import operation
from epochs.store import StoreFiles, new_id

END_LIMIT = 20.0  # seconds that a daemon has to end by itself


def disk_of(store: StoreFiles, epoch: EpochRecord, disk: str | None) -> str:
    """The disk that is meant: the only one, or the one named; NotFound, Refused."""
    disks = list(store.catalog.epoch_layers(epoch.id))
    if disk is None:
        if len(disks) != 1:
            raise Refused(f"epoch {epoch.id[:12]} has "
                          + (f"several disks ({', '.join(disks)}); name one, like "
                             f"{epoch.id[:12]}:{disks[0]}" if disks else "no disks"))
        return disks[0]
    if disk not in disks:
        raise NotFound(f"epoch {epoch.id[:12]} has no disk '{disk}'; it has {', '.join(disks)}")
    return disk


def refuse_unless_possible() -> None:
    """Refused without root or FUSE."""
    if os.geteuid() != 0:
        raise Refused("only root may mount file systems; run it as root")
    reason = fuse.refusal()
    if reason is not None:
        raise Refused(f"an epoch's disk cannot be shown: {reason}")


def mount(store: StoreFiles, epoch: EpochRecord, disk: str | None, directory: Path,
          partition: int | None = None) -> MountRecord:
    """Mount a disk of an epoch on a directory that is there and empty."""
    refuse_unless_possible()
    directory = directory.resolve()
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise Refused("the directory's name is not UTF-8; give another one") from None
    if not directory.is_dir():
        raise NotFound(f"{directory} is no directory; make it first")
    with store.shared(), locks.hold(store.path / "locks" / "mounts", "the list of mounts",
                                    notice=store.notice):
        epoch = store.catalog.epoch(epoch.id)  # it may just have been deleted
        if filesystems.is_mounted(directory) or any(directory.iterdir()):
            raise Refused(f"{directory} is not empty; give an empty directory")
        name = disk_of(store, epoch, disk)
        record = MountRecord(new_id(), epoch.id, name, str(directory))
        plan = {"id": record.id, "epoch": epoch.id, "disk": name, "directory": str(directory)}
        with operation(store, "mount", None, plan, undo_mount) as under_way:
            points.hit("mount.intended")
            image = _serve(store, record)
            points.hit("mount.served")
            filesystems.mount(image, filesystems.chosen(
                image, partition, f"disk '{name}' of epoch {epoch.id[:12]}"), directory)
            points.hit("mount.mounted")
            with store.catalog.transaction():
                store.catalog.add_mount(record)
                under_way.end()
    return record


def umount(store: StoreFiles, directory: Path) -> MountRecord:
    """Take a mount of ours down; Refused while somebody works in it."""
    directory = directory.resolve()
    record = next((one for one in store.catalog.mounts() if one.directory == str(directory)), None)
    if record is None:
        raise NotFound(f"no epoch is mounted on {directory}; 'epochs mount' shows where some are")
    plan = {"id": record.id, "epoch": record.epoch, "disk": record.disk,
            "directory": record.directory}
    with store.shared(), locks.hold(store.path / "locks" / "mounts", "the list of mounts",
                                    notice=store.notice):
        filesystems.unmount(_directory(store, record) / fuse.RAW)
        with operation(store, "umount", None, plan, undo_mount) as under_way:
            points.hit("umount.unmounted")
            undo_mount(store, under_way.record)
    return record


def undo_mount(store: StoreFiles, record: JournalRecord) -> None:
    """Take down whatever there is of a mount; repeatable."""
    plan = record.plan
    one = MountRecord(plan["id"], plan["epoch"], plan["disk"], plan["directory"])
    _end(store, one)
    with store.catalog.transaction():
        store.catalog.remove_mount(one.id)
        store.catalog.end(record.id)


def drop_dead(store: StoreFiles) -> None:
    """Forget mounts whose daemon is gone: the host was booted since, or somebody ended it. Only
    root can tell."""
    if os.geteuid() != 0 or not store.catalog.mounts():
        return
    with locks.attempt(store.path / "locks" / "mounts") as got:
        for record in store.catalog.mounts() if got else []:
            if not working_in(_directory(store, record)):
                _end(store, record)
                with store.catalog.transaction():
                    store.catalog.remove_mount(record.id)


def refuse_mounted(store: StoreFiles, epochs: list[str]) -> None:
    """Epochs that are mounted are not deleted."""
    for record in store.catalog.mounts():
        if record.epoch in epochs:
            raise Refused(f"epoch {record.epoch[:12]} is mounted on {record.directory}; 'epochs "
                          f"umount {record.directory}' first")


@contextlib.contextmanager
def viewed(store: StoreFiles, epoch: EpochRecord, disk: str
           ) -> Iterator[list[tuple[FileSystem, Path]]]:
    """All file systems of a disk of an epoch, each mounted on a directory of its own, meanwhile."""
    refuse_unless_possible()
    record = MountRecord(new_id(), epoch.id, disk, "")
    plan = {"id": record.id, "epoch": epoch.id, "disk": disk, "directory": ""}
    with operation(store, "view", None, plan, undo_mount) as under_way:
        image = _serve(store, record)
        shown = []
        for one in filesystems.found_in(image):
            place = _directory(store, record) / f"root{one.partition or ''}"
            place.mkdir(mode=0o700)
            filesystems.mount(image, one, place)
            shown.append((one, place))
        yield shown
        undo_mount(store, under_way.record)


def _directory(store: StoreFiles, record: MountRecord) -> Path:
    return store.path / "mounts" / record.id


def _serve(store: StoreFiles, record: MountRecord) -> Path:
    place = _directory(store, record)
    make_directory(place)
    chain = store.catalog.chain(store.catalog.epoch_layers(record.epoch)[record.disk])
    with store.backend(chain[0].backend).exposed(chain) as tree:
        return fuse.serve(place, tree, chain[0].size)


def _end(store: StoreFiles, record: MountRecord) -> None:
    """The file systems that were mounted, the daemon, its export, its directory, and the devices
    that were put up for it."""
    place = _directory(store, record)
    if place.exists():
        filesystems.unmount(place / fuse.RAW, lazily=True)
        for process in working_in(place):
            process.terminate()
            if not process.wait(END_LIMIT):
                process.kill()
        filesystems.unmount_export(place / fuse.RAW)
        remove_tree(place)
    layer = store.catalog.epoch_layers(record.epoch).get(record.disk)
    if layer is not None:
        try:
            chain = store.catalog.chain(layer)
            with store.backend(chain[0].backend).exposed(chain):
                pass  # who is the last to look at it takes it down
        except (BlockError, EpochsError) as error:
            store.notice(f"disk '{record.disk}' of epoch {record.epoch[:12]}: {error}")
