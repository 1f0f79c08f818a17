"""Thin pools of this store: ``pool create``, ``list``, ``status``, ``extend``, ``remove``.

The catalog has a row for each; the device carries a label that says whose it is. All four hold the
store's lock exclusively: nothing else goes on in a pool that is being made or unmade.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockcow import BlockError
from blockcow.pool_label import erase
from blockcow.pools import (
    HeadRoom,
    PoolDevice,
    PoolName,
    allocate,
    check_device,
    check_exists,
)
from epochs import points
from epochs.catalog import JournalRecord, PoolRecord
from epochs.durable import sync_directory
from epochs.errors import NotFound, Refused, UsageError
from epochs.protocol.journal import operation
from epochs.store import StoreFiles

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class PoolState:
    """A pool as it is now; ``room`` is None and ``trouble`` says why where it cannot be asked."""

    record: PoolRecord
    layers: int
    live: bool
    room: HeadRoom | None
    trouble: str | None

    def to_json(self) -> dict[str, Any]:
        room = self.room
        return {
            "name": self.record.name, "id": self.record.id, "path": self.record.path,
            "layers": self.layers, "live": self.live, "trouble": self.trouble,
            "data": room.data_total if room else None, "data_free": room.data if room else None,
            "metadata": room.metadata_total if room else None,
            "metadata_free": room.metadata if room else None,
        }


def named(store: StoreFiles, name: str) -> PoolRecord:
    """The pool of that name; NotFound."""
    found = store.catalog.find_pool(name)
    if found is None:
        raise NotFound(f"there is no pool '{name}'; 'epochs pool list' shows those there are")
    return found


def create(store: StoreFiles, name: str, path: Path, *, size: int | None = None,
           force: bool = False) -> PoolState:
    """A new pool on a block device, or on a file that is there or is made, ``size`` bytes large.

    Refused for a device that is in use or, without ``force``, holds anything.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is not a name for a pool; use letters, digits, '_', '.', '-', "
                         "at most 63, starting with a letter or digit")
    if store.catalog.find_pool(name) is not None:
        raise Refused(f"there is a pool '{name}' already; choose another name")
    refusal = store.thin().available()
    if refusal:
        raise Refused(f"a pool needs device-mapper: {refusal}")
    path = path.absolute()
    made = not check_exists(path)
    if made and size is None:
        raise UsageError(f"{path} does not exist; give --size to make a file of that size, or the "
                         "path of a block device")
    if not made and size is not None:
        raise UsageError(f"{path} is there already; --size is for a file that is to be made")
    if not made:
        check_device(path, force=force)
    with store.exclusive():
        own = uuid.uuid4()
        record = PoolRecord(own.hex[:8], name, str(path), own.hex, 0)
        plan = {"id": record.id, "name": name, "path": str(path), "uuid": own.hex, "made": made}
        with operation(store, "pool-create", None, plan, undo_create) as under_way:
            points.hit("pool-create.intended")
            if made and size is not None:
                if path.exists():
                    raise Refused(f"{path} is there by now; choose another name")
                under_way.phase("making")
                allocate(path, size)
            points.hit("pool-create.allocated")
            held = _device(store, record)
            with held.locked():
                held.make()
                points.hit("pool-create.labelled")
                held.open()
            points.hit("pool-create.opened")
            with store.catalog.transaction():
                store.catalog.add_pool(record)
                under_way.end()
            points.hit("pool-create.recorded")
    return state(store, record)


def undo_create(store: StoreFiles, record: JournalRecord) -> None:
    """Take down and unmake a pool that did not come into being; repeatable."""
    plan = record.plan
    if store.catalog.pool_by_id(plan["id"]) is None:
        path = Path(plan["path"])
        held = _device(store, PoolRecord(plan["id"], plan["name"], plan["path"], plan["uuid"], 0))
        if store.thin().available() is None:
            with held.locked():
                held.close(mark=False)
        if path.exists() and plan["made"] and (
                record.phase == "making" or _carries(path, plan["uuid"])):
            path.unlink()
            sync_directory(path.parent)
        elif path.exists() and not plan["made"] and _carries(path, plan["uuid"]):
            erase(path)
        held.forget()
    with store.catalog.transaction():
        store.catalog.end(record.id)


def _carries(path: Path, wanted: str) -> bool:
    from blockcow.pool_label import LabelDamaged, read

    try:
        label = read(path)
    except LabelDamaged:
        return True  # cut off in the middle of writing ours
    return label is not None and label.pool.hex == wanted


def listed(store: StoreFiles) -> list[PoolState]:
    """All pools of the store."""
    return [state(store, record) for record in store.catalog.pools()]


def state(store: StoreFiles, record: PoolRecord) -> PoolState:
    """One pool as it is now. A pool that is not live is opened for asking."""
    layers = len(store.catalog.layers_in_pool(record.id))
    try:
        live = bool(_device(store, record).devices())
        return PoolState(record, layers, live, store.thin().head_room(record.id), None)
    except BlockError as error:
        return PoolState(record, layers, False, None, str(error))


def extend(store: StoreFiles, name: str, *, size: int | None = None) -> PoolState:
    """Let a pool have what its device became larger by; a file is made ``size`` bytes large first.

    Guests whose writes wait for space go on.
    """
    record = named(store, name)
    path = Path(record.path)
    if size is not None:
        if not path.is_file():
            raise UsageError(f"pool '{name}' is on a device: enlarge {path} itself (lvextend, for "
                             "one), then extend the pool without --size")
        present = path.stat().st_size
        if size <= present:
            raise Refused(f"pool '{name}' has {present} bytes already; a pool can only grow")
        stat_ = os.statvfs(path)
        if size - present > stat_.f_bavail * stat_.f_frsize:
            raise Refused(f"the file system of {path} has no room for {size - present} bytes more")
    with store.shared(), operation(store, "pool-extend", None,
                                   {"id": record.id, "size": size}, redo_extend) as under_way:
        points.hit("pool-extend.intended")
        _extend(store, record, size)
        points.hit("pool-extend.done")
        under_way.end()
    return state(store, record)


def redo_extend(store: StoreFiles, record: JournalRecord) -> None:
    """Finish an extension; repeatable."""
    pool = store.catalog.pool_by_id(record.plan["id"])
    if pool is not None:
        _extend(store, pool, record.plan["size"])
    with store.catalog.transaction():
        store.catalog.end(record.id)


def _extend(store: StoreFiles, record: PoolRecord, size: int | None) -> None:
    if size is not None:
        if not Path(record.path).exists():
            raise Refused(f"pool '{record.name}': {record.path} is not there; bring it back")
        allocate(Path(record.path), size)
    points.hit("pool-extend.allocated")
    held = _device(store, record)
    with held.locked():
        held.extend()


def remove(store: StoreFiles, name: str) -> None:
    """Give a pool's device or file back, empty. Refused while layers are in it."""
    record = named(store, name)
    with store.exclusive():
        layers = store.catalog.layers_in_pool(record.id)
        if layers:
            raise Refused(f"pool '{name}' holds {len(layers)} layers; remove the machines and "
                          "epochs that use it first")
        plan = {"id": record.id, "name": name, "path": record.path, "uuid": record.uuid}
        with operation(store, "pool-remove", None, plan, redo_remove) as under_way:
            with store.catalog.transaction():
                store.catalog.remove_pool(record.id)
            points.hit("pool-remove.forgotten")
            redo_remove(store, under_way.record)


def redo_remove(store: StoreFiles, record: JournalRecord) -> None:
    """Finish a removal; repeatable."""
    plan, path = record.plan, Path(record.plan["path"])
    if store.catalog.pool_by_id(plan["id"]) is None:
        held = _device(store, PoolRecord(plan["id"], plan["name"], plan["path"], plan["uuid"], 0))
        with held.locked():
            held.close(mark=False)
        if path.exists() and _carries(path, plan["uuid"]):
            if stat.S_ISREG(path.stat().st_mode):
                # Not erased before: a power cut might bring it back without its label.
                path.unlink()
                sync_directory(path.parent)
            else:
                erase(path)
        held.forget()
    points.hit("pool-remove.erased")
    with store.catalog.transaction():
        store.catalog.end(record.id)


def _device(store: StoreFiles, record: PoolRecord) -> PoolDevice:
    name = PoolName(record.id, record.name, Path(record.path), uuid.UUID(store.catalog.store_id),
                    uuid.UUID(record.uuid))
    return PoolDevice(name, store.path / "locks")
