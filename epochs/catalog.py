"""The catalog: SQLite tables of machines, epochs, layers, packs, instances and the journal.

One row is written before anything is created in the world, so that whatever a killed command left
behind is known by name. Records are plain dataclasses; nothing here touches files but the
database itself.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockcow import Layer
from epochs.errors import Failed, NotFound, Refused
from epochs.processes import ProcessId
from epochs.spec import MachineSpec

SCHEMA_VERSION = 1
BUSY_LIMIT = 30.0  # seconds to wait for another writer's transaction

_SCHEMA = """
CREATE TABLE machines (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, created REAL NOT NULL,
    machine_type TEXT NOT NULL, mac TEXT NOT NULL, accel TEXT NOT NULL,
    head TEXT REFERENCES epochs(id)) STRICT;
CREATE TABLE store (id TEXT NOT NULL) STRICT;
CREATE TABLE pools (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, path TEXT NOT NULL, uuid TEXT NOT NULL,
    trans INTEGER NOT NULL, next INTEGER NOT NULL) STRICT;
CREATE TABLE mounts (
    id TEXT PRIMARY KEY, epoch TEXT NOT NULL REFERENCES epochs(id), disk TEXT NOT NULL,
    directory TEXT NOT NULL) STRICT;
CREATE TABLE layers (
    id TEXT PRIMARY KEY, backend TEXT NOT NULL, format TEXT NOT NULL, file TEXT NOT NULL,
    size INTEGER NOT NULL, backing TEXT REFERENCES layers(id), checksum TEXT, signature TEXT,
    level INTEGER NOT NULL) STRICT;
CREATE TABLE disks (
    machine TEXT NOT NULL REFERENCES machines(id) ON DELETE CASCADE, name TEXT NOT NULL,
    position INTEGER NOT NULL, backend TEXT NOT NULL, base TEXT NOT NULL REFERENCES layers(id),
    active TEXT REFERENCES layers(id), PRIMARY KEY (machine, name)) STRICT;
CREATE TABLE epochs (
    id TEXT PRIMARY KEY, machine TEXT NOT NULL, machine_name TEXT NOT NULL,
    parent TEXT REFERENCES epochs(id), created REAL NOT NULL, message TEXT NOT NULL,
    spec TEXT NOT NULL, compatibility TEXT NOT NULL, map_checksum TEXT NOT NULL,
    state_checksum TEXT NOT NULL, state_size INTEGER NOT NULL, thumbnail INTEGER NOT NULL,
    stats TEXT NOT NULL, damaged TEXT) STRICT;
CREATE TABLE epoch_disks (
    epoch TEXT NOT NULL REFERENCES epochs(id) ON DELETE CASCADE, disk TEXT NOT NULL,
    position INTEGER NOT NULL, layer TEXT NOT NULL REFERENCES layers(id),
    PRIMARY KEY (epoch, disk)) STRICT;
CREATE TABLE packs (id TEXT PRIMARY KEY, signature TEXT NOT NULL) STRICT;
CREATE TABLE epoch_packs (
    epoch TEXT NOT NULL REFERENCES epochs(id) ON DELETE CASCADE,
    pack TEXT NOT NULL REFERENCES packs(id), PRIMARY KEY (epoch, pack)) STRICT;
CREATE TABLE tags (
    name TEXT NOT NULL, machine TEXT NOT NULL,
    epoch TEXT NOT NULL REFERENCES epochs(id) ON DELETE CASCADE,
    PRIMARY KEY (name, machine)) STRICT;
CREATE TABLE instances (
    id TEXT PRIMARY KEY, machine TEXT NOT NULL UNIQUE REFERENCES machines(id) ON DELETE CASCADE,
    pid INTEGER NOT NULL, start_time INTEGER NOT NULL, boot TEXT NOT NULL, binary TEXT NOT NULL,
    compatibility TEXT NOT NULL, started REAL NOT NULL, trusted INTEGER NOT NULL) STRICT;
CREATE TABLE instance_packs (
    instance TEXT NOT NULL REFERENCES instances(id) ON DELETE CASCADE,
    pack TEXT NOT NULL REFERENCES packs(id), PRIMARY KEY (instance, pack)) STRICT;
CREATE TABLE standbys (
    machine TEXT PRIMARY KEY REFERENCES machines(id) ON DELETE CASCADE,
    epoch TEXT NOT NULL REFERENCES epochs(id), owner TEXT REFERENCES machines(id),
    same_generation INTEGER NOT NULL) STRICT;
CREATE TABLE standby_wishes (
    epoch TEXT NOT NULL REFERENCES epochs(id) ON DELETE CASCADE,
    owner TEXT REFERENCES machines(id) ON DELETE CASCADE, same_generation INTEGER NOT NULL,
    count INTEGER NOT NULL, trouble TEXT) STRICT;
CREATE TABLE journal (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, machine TEXT, phase TEXT NOT NULL,
    pid INTEGER NOT NULL, start_time INTEGER NOT NULL, boot TEXT NOT NULL, started REAL NOT NULL,
    plan TEXT NOT NULL) STRICT;
CREATE INDEX epochs_by_parent ON epochs(parent);
CREATE INDEX epochs_by_machine ON epochs(machine);
CREATE INDEX disks_by_active ON disks(active);
CREATE INDEX disks_by_base ON disks(base);
CREATE INDEX layers_by_backing ON layers(backing);
CREATE INDEX epoch_disks_by_layer ON epoch_disks(layer);
CREATE INDEX epoch_packs_by_pack ON epoch_packs(pack);
"""


@dataclass(frozen=True)
class MachineRecord:
    """A machine; ``head`` is the id of the epoch that its present state descends from."""

    id: str
    name: str
    spec: MachineSpec
    created: float
    machine_type: str
    mac: str
    accel: str
    head: str | None


@dataclass(frozen=True)
class MountRecord:
    """A disk of an epoch that is mounted on a directory (absolute)."""

    id: str
    epoch: str
    disk: str
    directory: str


@dataclass(frozen=True)
class PoolRecord:
    """A thin pool: ``id`` (8 hexadecimal digits), where it is, ``uuid`` (of its label), the
    transaction number that it must have."""

    id: str
    name: str
    path: str
    uuid: str
    transaction: int


@dataclass(frozen=True)
class DiskRecord:
    """One disk of a machine: the layer it began as, and the one a guest writes to (if any)."""

    name: str
    backend: str
    base: str
    active: str | None


@dataclass(frozen=True)
class EpochRecord:
    """A committed checkpoint. ``stats`` holds measured figures under the names of docs/json.md."""

    id: str
    machine: str
    machine_name: str
    parent: str | None
    created: float
    message: str
    spec: MachineSpec
    compatibility: dict[str, Any]
    map_checksum: str
    state_checksum: str
    state_size: int
    thumbnail: bool
    stats: dict[str, Any]
    damaged: str | None = None


@dataclass(frozen=True)
class InstanceRecord:
    """A hypervisor process that realises a machine. ``trusted``: whether its written-page tracking
    still describes everything since the last seal."""

    id: str
    machine: str
    process: ProcessId
    binary: str
    compatibility: dict[str, Any]
    started: float
    trusted: bool


@dataclass(frozen=True)
class StandbyRecord:
    """An instance that is held complete ahead of need: the id of the machine that nobody sees, its
    epoch, and what it may become: instance of the machine ``owner`` by a rollback, or, None, a
    fork. ``same_generation``: its guest will not notice."""

    machine: str
    epoch: str
    owner: str | None
    same_generation: bool


@dataclass(frozen=True)
class StandbyWish:
    """How many standbys of a kind somebody wants. ``trouble``: why there were fewer."""

    epoch: str
    owner: str | None
    same_generation: bool
    count: int
    trouble: str | None

    def wants(self, standby: StandbyRecord) -> bool:
        return (standby.epoch, standby.owner, standby.same_generation) == (
            self.epoch, self.owner, self.same_generation)


@dataclass(frozen=True)
class JournalRecord:
    """An operation under way; ``plan`` names everything that it may have created."""

    id: str
    kind: str
    machine: str | None
    phase: str
    operator: ProcessId
    started: float
    plan: dict[str, Any]


class Catalog:
    """The open database. Not shared between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        existed = path.exists()
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_LIMIT, isolation_level=None)
            path.chmod(0o600)
            self._prepare(existed)
            self.store_id = str(self._db.execute("SELECT id FROM store").fetchone()[0])
            """What tells this store from others (32 hexadecimal digits)."""
        except sqlite3.DatabaseError as error:
            raise Failed(f"the store's catalog {path} cannot be opened: {error}") from error
        except PermissionError as error:
            raise Refused(f"the store's catalog {path} belongs to another user") from error

    def _prepare(self, existed: bool) -> None:
        db = self._db
        db.execute("PRAGMA foreign_keys = ON")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise Refused(f"the store {self.path.parent} was made by a newer Epochs (catalog "
                          f"version {version}, this one knows {SCHEMA_VERSION}); upgrade Epochs")
        if version == SCHEMA_VERSION:
            db.execute("PRAGMA synchronous = FULL")
            return
        if existed and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise Refused(f"{self.path} is no catalog of Epochs")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        with self.transaction():
            if db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
                return  # another process was first
            for statement in _SCHEMA.split(";"):
                if statement.strip():
                    db.execute(statement)
            db.execute("INSERT INTO store VALUES (?)", (uuid.uuid4().hex,))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; the write lock is taken at the start. Nested use joins the outer one."""
        if self._db.in_transaction:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise Failed(f"the store's catalog cannot be written: {error}") from error
        try:
            yield
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._rollback()
            raise Failed(f"the store's catalog cannot be written: {error}") from error
        except BaseException:
            self._rollback()
            raise

    def _rollback(self) -> None:
        if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
            self._db.execute("ROLLBACK")

    # -- mounts --------------------------------------------------------------------------------
    def mounts(self) -> list[MountRecord]:
        rows = self._db.execute("SELECT id, epoch, disk, directory FROM mounts ORDER BY directory")
        return [MountRecord(*row) for row in rows]

    def add_mount(self, record: MountRecord) -> None:
        self._db.execute("INSERT INTO mounts VALUES (?, ?, ?, ?)",
                         (record.id, record.epoch, record.disk, record.directory))

    def remove_mount(self, mount_id: str) -> None:
        self._db.execute("DELETE FROM mounts WHERE id = ?", (mount_id,))

    # -- pools ---------------------------------------------------------------------------------
    _POOL = "id, name, path, uuid, trans"

    def pools(self) -> list[PoolRecord]:
        rows = self._db.execute(f"SELECT {self._POOL} FROM pools ORDER BY name")
        return [PoolRecord(*row) for row in rows]

    def find_pool(self, name: str) -> PoolRecord | None:
        row = self._db.execute(f"SELECT {self._POOL} FROM pools WHERE name = ?",
                               (name,)).fetchone()
        return PoolRecord(*row) if row else None

    def pool_by_id(self, pool_id: str) -> PoolRecord | None:
        row = self._db.execute(f"SELECT {self._POOL} FROM pools WHERE id = ?",
                               (pool_id,)).fetchone()
        return PoolRecord(*row) if row else None

    def add_pool(self, pool: PoolRecord) -> None:
        self._db.execute("INSERT INTO pools VALUES (?,?,?,?,?,0)",
                         (pool.id, pool.name, pool.path, pool.uuid, pool.transaction))

    def remove_pool(self, pool_id: str) -> None:
        self._db.execute("DELETE FROM pools WHERE id = ?", (pool_id,))

    def set_pool_transaction(self, pool_id: str, transaction: int) -> None:
        self._db.execute("UPDATE pools SET trans = ? WHERE id = ?", (transaction, pool_id))

    def next_in_pool(self, pool_id: str) -> int:
        """The next number that was never given out in a pool."""
        with self.transaction():
            row = self._db.execute("UPDATE pools SET next = next + 1 WHERE id = ? RETURNING next",
                                   (pool_id,)).fetchone()
        return int(row[0]) - 1

    def layers_in_pool(self, pool_id: str) -> list[str]:
        """Ids of the layers that lie in a pool."""
        rows = self._db.execute("SELECT id FROM layers WHERE backend = 'dmthin' "
                                "AND substr(id, 1, 8) = ? ORDER BY id", (pool_id,))
        return [row[0] for row in rows]

    # -- machines ------------------------------------------------------------------------------
    _MACHINE = "id, name, spec, created, machine_type, mac, accel, head"

    def _machine(self, row: Any) -> MachineRecord:
        return MachineRecord(row[0], row[1], MachineSpec.from_json(row[2]), *row[3:])

    _SEEN = "id NOT IN (SELECT machine FROM standbys)"

    def machines(self) -> list[MachineRecord]:
        """All that users see, by name."""
        rows = self._db.execute(f"SELECT {self._MACHINE} FROM machines WHERE {self._SEEN} "
                                "ORDER BY name")
        return [self._machine(row) for row in rows]

    def find_machine(self, name: str) -> MachineRecord | None:
        row = self._db.execute(f"SELECT {self._MACHINE} FROM machines WHERE name = ? "
                               f"AND {self._SEEN}", (name,)).fetchone()
        return self._machine(row) if row else None

    def machine(self, name: str) -> MachineRecord:
        """The machine of that name; NotFound."""
        found = self.find_machine(name)
        if found is None:
            raise NotFound(f"there is no machine '{name}'; 'epochs list' shows those there are")
        return found

    def machine_by_id(self, machine_id: str) -> MachineRecord | None:
        row = self._db.execute(f"SELECT {self._MACHINE} FROM machines WHERE id = ?",
                               (machine_id,)).fetchone()
        return self._machine(row) if row else None

    def add_machine(self, machine: MachineRecord, disks: Iterable[DiskRecord]) -> None:
        """Record a machine with its disks; Refused if the name is taken."""
        try:
            self._db.execute("INSERT INTO machines VALUES (?,?,?,?,?,?,?,?)", (
                machine.id, machine.name, machine.spec.to_json(), machine.created,
                machine.machine_type, machine.mac, machine.accel, machine.head))
        except sqlite3.IntegrityError as error:
            raise _name_taken(machine) from error
        for position, disk in enumerate(disks):
            self._db.execute("INSERT INTO disks VALUES (?,?,?,?,?,?)", (
                machine.id, disk.name, position, disk.backend, disk.base, disk.active))

    def remove_machine(self, machine_id: str) -> None:
        self._db.execute("DELETE FROM machines WHERE id = ?", (machine_id,))

    def set_head(self, machine_id: str, epoch: str | None) -> None:
        self._db.execute("UPDATE machines SET head = ? WHERE id = ?", (epoch, machine_id))

    def disks(self, machine_id: str) -> list[DiskRecord]:
        rows = self._db.execute("SELECT name, backend, base, active FROM disks WHERE machine = ? "
                                "ORDER BY position", (machine_id,))
        return [DiskRecord(*row) for row in rows]

    def set_active(self, machine_id: str, disk: str, layer: str | None) -> None:
        self._db.execute("UPDATE disks SET active = ? WHERE machine = ? AND name = ?",
                         (layer, machine_id, disk))

    # -- layers --------------------------------------------------------------------------------
    _LAYER = "id, backend, format, file, size, backing, checksum, signature, level"

    @staticmethod
    def _layer(row: Any) -> Layer:
        return Layer(id=row[0], backend=row[1], format=row[2], file=row[3], size=row[4],
                     backing=row[5], checksum=row[6], signature=row[7], level=row[8])

    def layers(self) -> list[Layer]:
        return [self._layer(row) for row in self._db.execute(f"SELECT {self._LAYER} FROM layers")]

    def layer(self, layer_id: str) -> Layer:
        found = self.find_layer(layer_id)
        if found is None:
            raise Failed(f"the catalog misses layer {layer_id}")
        return found

    def chain(self, layer_id: str) -> list[Layer]:
        """The layer and everything beneath it, top first."""
        rows = self._db.execute(
            f"WITH RECURSIVE chain(n, i) AS (SELECT 0, ? UNION ALL SELECT n + 1, backing "
            "FROM chain JOIN layers ON id = i WHERE backing IS NOT NULL) "
            f"SELECT {self._LAYER} FROM chain JOIN layers ON id = i ORDER BY n", (layer_id,))
        found = [self._layer(row) for row in rows]
        if not found:
            raise Failed(f"the catalog misses layer {layer_id}")
        return found

    def put_layer(self, layer: Layer) -> None:
        """Insert or replace a layer's row."""
        self._db.execute(
            "INSERT INTO layers VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT(id) DO UPDATE SET "
            "backend=excluded.backend, format=excluded.format, file=excluded.file, "
            "size=excluded.size, backing=excluded.backing, checksum=excluded.checksum, "
            "signature=excluded.signature, level=excluded.level",
            (layer.id, layer.backend, layer.format, layer.file, layer.size, layer.backing,
             layer.checksum, layer.signature, layer.level))

    def find_layer(self, layer_id: str) -> Layer | None:
        row = self._db.execute(f"SELECT {self._LAYER} FROM layers WHERE id = ?",
                               (layer_id,)).fetchone()
        return self._layer(row) if row else None

    def layer_needed(self, layer_id: str) -> bool:
        """Whether an epoch, a machine or another layer needs a layer."""
        return bool(self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM epoch_disks WHERE layer = ?1) "
            "OR EXISTS (SELECT 1 FROM disks WHERE base = ?1 OR active = ?1) "
            "OR EXISTS (SELECT 1 FROM layers WHERE backing = ?1)", (layer_id,)).fetchone()[0])

    def any_unwanted_layer(self) -> bool:
        """Whether a layer is only there as backing, or for nothing at all. Asked by every command,
        so it does not read the layers into memory."""
        return bool(self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM layers l WHERE "
            "NOT EXISTS (SELECT 1 FROM epoch_disks WHERE layer = l.id) "
            "AND NOT EXISTS (SELECT 1 FROM disks WHERE base = l.id OR active = l.id))"
        ).fetchone()[0])

    def remove_layer(self, layer_id: str) -> None:
        self._db.execute("DELETE FROM layers WHERE id = ?", (layer_id,))

    def wanted_layers(self) -> set[str]:
        """Ids of layers that an epoch or a machine names itself (not: needs as backing)."""
        rows = self._db.execute("SELECT layer FROM epoch_disks UNION SELECT base FROM disks "
                                "UNION SELECT active FROM disks WHERE active IS NOT NULL")
        return {row[0] for row in rows}

    def active_layers(self) -> set[str]:
        rows = self._db.execute("SELECT active FROM disks WHERE active IS NOT NULL")
        return {row[0] for row in rows}

    # -- epochs --------------------------------------------------------------------------------
    _EPOCH = ("id, machine, machine_name, parent, created, message, spec, compatibility, "
              "map_checksum, state_checksum, state_size, thumbnail, stats, damaged")

    def _epoch(self, row: Any) -> EpochRecord:
        return EpochRecord(
            id=row[0], machine=row[1], machine_name=row[2], parent=row[3], created=row[4],
            message=row[5], spec=MachineSpec.from_json(row[6]), compatibility=json.loads(row[7]),
            map_checksum=row[8], state_checksum=row[9], state_size=row[10],
            thumbnail=bool(row[11]), stats=json.loads(row[12]), damaged=row[13])

    def epochs(self) -> list[EpochRecord]:
        """All epochs, oldest first."""
        rows = self._db.execute(f"SELECT {self._EPOCH} FROM epochs ORDER BY created, rowid")
        return [self._epoch(row) for row in rows]

    def epoch(self, epoch_id: str) -> EpochRecord:
        row = self._db.execute(f"SELECT {self._EPOCH} FROM epochs WHERE id = ?",
                               (epoch_id,)).fetchone()
        if row is None:
            raise NotFound(f"there is no epoch {epoch_id}")
        return self._epoch(row)

    def epochs_of(self, machine_id: str) -> list[str]:
        """Ids of the epochs that were made of a machine, oldest first."""
        rows = self._db.execute("SELECT id FROM epochs WHERE machine = ? ORDER BY created, rowid",
                                (machine_id,))
        return [row[0] for row in rows]

    def recent_stats(self, machine_id: str, count: int) -> list[dict[str, Any]]:
        """Measured figures of a machine's newest epochs, newest first."""
        rows = self._db.execute("SELECT stats FROM epochs WHERE machine = ? "
                                "ORDER BY created DESC, rowid DESC LIMIT ?", (machine_id, count))
        return [json.loads(row[0]) for row in rows]

    def epochs_by_prefix(self, prefix: str) -> list[str]:
        rows = self._db.execute("SELECT id FROM epochs WHERE substr(id, 1, ?) = ? LIMIT 3",
                                (len(prefix), prefix))
        return [row[0] for row in rows]

    def parents(self) -> dict[str, str | None]:
        """Child to parent, for every epoch."""
        return dict(self._db.execute("SELECT id, parent FROM epochs").fetchall())

    def add_epoch(self, epoch: EpochRecord, layers: dict[str, str],
                  packs: Iterable[str]) -> None:
        """Insert an epoch with the layer of each disk and the packs that its map refers to."""
        self._db.execute("INSERT INTO epochs VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)", (
            epoch.id, epoch.machine, epoch.machine_name, epoch.parent, epoch.created,
            epoch.message, epoch.spec.to_json(), json.dumps(epoch.compatibility, sort_keys=True),
            epoch.map_checksum, epoch.state_checksum, epoch.state_size, int(epoch.thumbnail),
            json.dumps(epoch.stats, sort_keys=True), epoch.damaged))
        for position, (disk, layer) in enumerate(layers.items()):
            self._db.execute("INSERT INTO epoch_disks VALUES (?,?,?,?)",
                             (epoch.id, disk, position, layer))
        for pack in packs:
            self._db.execute("INSERT INTO epoch_packs VALUES (?,?)", (epoch.id, pack))

    def forget_epoch(self, epoch_id: str) -> None:
        """Remove an epoch; its children and heads pass to its parent."""
        parent = self.epoch(epoch_id).parent
        self._db.execute("UPDATE epochs SET parent = ? WHERE parent = ?", (parent, epoch_id))
        self._db.execute("UPDATE machines SET head = ? WHERE head = ?", (parent, epoch_id))
        self._db.execute("DELETE FROM epochs WHERE id = ?", (epoch_id,))

    def mark_damaged(self, epoch_id: str, why: str | None) -> None:
        self._db.execute("UPDATE epochs SET damaged = ? WHERE id = ?", (why, epoch_id))

    def epoch_layers(self, epoch_id: str) -> dict[str, str]:
        """Disk name to layer id, in the machine's order."""
        return dict(self._db.execute("SELECT disk, layer FROM epoch_disks WHERE epoch = ? "
                                     "ORDER BY position", (epoch_id,)).fetchall())

    # -- packs ---------------------------------------------------------------------------------
    def add_pack(self, pack: str, signature: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO packs VALUES (?,?)", (pack, signature))

    def pack_signatures(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT id, signature FROM packs").fetchall())

    def set_pack_signature(self, pack: str, signature: str) -> None:
        self._db.execute("UPDATE packs SET signature = ? WHERE id = ?", (signature, pack))

    def epoch_packs(self, epoch_id: str) -> set[str]:
        rows = self._db.execute("SELECT pack FROM epoch_packs WHERE epoch = ?", (epoch_id,))
        return {row[0] for row in rows}

    def unneeded_packs(self) -> list[str]:
        """Packs that no epoch's map and no instance's base map refers to."""
        rows = self._db.execute("SELECT id FROM packs WHERE id NOT IN (SELECT pack FROM "
                                "epoch_packs UNION SELECT pack FROM instance_packs)")
        return [row[0] for row in rows]

    def remove_pack(self, pack: str) -> None:
        self._db.execute("DELETE FROM packs WHERE id = ?", (pack,))

    # -- tags ----------------------------------------------------------------------------------
    def tags(self) -> list[tuple[str, str, str]]:
        """All tags as (name, machine id, epoch id)."""
        return self._db.execute("SELECT name, machine, epoch FROM tags ORDER BY name").fetchall()

    def put_tag(self, name: str, machine_id: str, epoch_id: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?,?,?)", (name, machine_id, epoch_id))

    def remove_tag(self, name: str, machine_id: str) -> None:
        self._db.execute("DELETE FROM tags WHERE name = ? AND machine = ?", (name, machine_id))

    # -- instances -----------------------------------------------------------------------------
    def _instance(self, row: Any) -> InstanceRecord:
        return InstanceRecord(row[0], row[1], ProcessId(*row[2:5]), row[5], json.loads(row[6]),
                              row[7], bool(row[8]))

    def instance_of(self, machine_id: str) -> InstanceRecord | None:
        row = self._db.execute("SELECT * FROM instances WHERE machine = ?",
                               (machine_id,)).fetchone()
        return self._instance(row) if row else None

    def instances(self) -> list[InstanceRecord]:
        return [self._instance(row) for row in self._db.execute("SELECT * FROM instances")]

    def put_instance(self, instance: InstanceRecord, packs: Iterable[str]) -> None:
        """Insert or replace a machine's instance, with the packs its base map refers to."""
        self._db.execute("DELETE FROM instances WHERE machine = ?", (instance.machine,))
        self._db.execute("INSERT INTO instances VALUES (?,?,?,?,?,?,?,?,?)", (
            instance.id, instance.machine, instance.process.pid, instance.process.start_time,
            instance.process.boot, instance.binary,
            json.dumps(instance.compatibility, sort_keys=True), instance.started,
            int(instance.trusted)))
        for pack in packs:
            self._db.execute("INSERT INTO instance_packs VALUES (?,?)", (instance.id, pack))

    def remove_instance(self, instance_id: str) -> None:
        self._db.execute("DELETE FROM instances WHERE id = ?", (instance_id,))

    def distrust(self, instance_id: str) -> None:
        """From now on the written-page tracking of this instance proves nothing."""
        self._db.execute("UPDATE instances SET trusted = 0 WHERE id = ?", (instance_id,))

    def trust(self, instance_id: str) -> None:
        """The tracking describes everything written since the last seal (again)."""
        self._db.execute("UPDATE instances SET trusted = 1 WHERE id = ?", (instance_id,))

    def instance_packs(self, instance_id: str) -> frozenset[str]:
        """The packs that an instance's base map refers to."""
        rows = self._db.execute("SELECT pack FROM instance_packs WHERE instance = ?",
                                (instance_id,))
        return frozenset(row[0] for row in rows)

    # -- standbys ------------------------------------------------------------------------------
    def standbys(self) -> list[StandbyRecord]:
        """All, the oldest first. The machine of each has its instance and disks."""
        return [StandbyRecord(row[0], row[1], row[2], bool(row[3])) for row in self._db.execute(
            "SELECT machine, epoch, owner, same_generation FROM standbys ORDER BY rowid")]

    def add_standby(self, standby: StandbyRecord) -> None:
        """Let nobody see a machine that was added in this transaction."""
        self._db.execute("INSERT INTO standbys VALUES (?,?,?,?)", (
            standby.machine, standby.epoch, standby.owner, int(standby.same_generation)))

    def reveal(self, machine: MachineRecord) -> None:
        """Make a standby the machine that it is from now on; Refused if the name is taken."""
        self._db.execute("DELETE FROM standbys WHERE machine = ?", (machine.id,))
        try:
            self._db.execute("UPDATE machines SET name = ?, spec = ?, created = ? WHERE id = ?", (
                machine.name, machine.spec.to_json(), machine.created, machine.id))
        except sqlite3.IntegrityError as error:
            raise _name_taken(machine) from error

    def standby_wishes(self) -> list[StandbyWish]:
        return [StandbyWish(row[0], row[1], bool(row[2]), *row[3:]) for row in self._db.execute(
            "SELECT epoch, owner, same_generation, count, trouble FROM standby_wishes "
            "ORDER BY rowid")]

    def put_standby_wish(self, wish: StandbyWish) -> None:
        """Insert or replace a wish; a count of 0 removes it."""
        key = (wish.epoch, wish.owner, int(wish.same_generation))
        self._db.execute("DELETE FROM standby_wishes WHERE epoch = ? AND owner IS ? "
                         "AND same_generation = ?", key)
        if wish.count:
            self._db.execute("INSERT INTO standby_wishes VALUES (?,?,?,?,?)",
                             (*key, wish.count, wish.trouble))

    # -- journal -------------------------------------------------------------------------------
    def _journal(self, row: Any) -> JournalRecord:
        return JournalRecord(row[0], row[1], row[2], row[3], ProcessId(*row[4:7]), row[7],
                             json.loads(row[8]))

    def journal(self) -> list[JournalRecord]:
        return [self._journal(row)
                for row in self._db.execute("SELECT * FROM journal ORDER BY started")]

    def find_journal(self, journal_id: str) -> JournalRecord | None:
        row = self._db.execute("SELECT * FROM journal WHERE id = ?", (journal_id,)).fetchone()
        return self._journal(row) if row else None

    def begin(self, record: JournalRecord) -> None:
        self._db.execute("INSERT INTO journal VALUES (?,?,?,?,?,?,?,?,?)", (
            record.id, record.kind, record.machine, record.phase, record.operator.pid,
            record.operator.start_time, record.operator.boot, record.started,
            json.dumps(record.plan, sort_keys=True)))

    def note_phase(self, record: JournalRecord, phase: str,
                   **more: object) -> JournalRecord:
        """Persist how far an operation got, with what became known meanwhile."""
        changed = replace(record, phase=phase, plan={**record.plan, **more})
        self._db.execute("UPDATE journal SET phase = ?, plan = ? WHERE id = ?",
                         (phase, json.dumps(changed.plan, sort_keys=True), record.id))
        return changed

    def end(self, journal_id: str) -> None:
        self._db.execute("DELETE FROM journal WHERE id = ?", (journal_id,))


def _name_taken(machine: MachineRecord) -> Refused:
    return Refused(f"there is a machine '{machine.name}' already; choose another name")


def new_journal(journal_id: str, kind: str, machine: str | None,
                plan: dict[str, Any]) -> JournalRecord:
    """A journal record of this process, not yet stored."""
    return JournalRecord(journal_id, kind, machine, "intended", ProcessId.own(), time.time(), plan)
