"""The store: one directory with the catalog, the locks, and the files that the catalog names.

::

    STORE/catalog.sqlite              machines, epochs, layers, packs, instances, journal
    STORE/locks/                      lock files
    STORE/epochs/ID/                  memory.map, device.state, thumbnail.png
    STORE/packs/ID.pack, ID.idx       pages of guest memory
    STORE/layers/ID.*                 disk layers
    STORE/instances/ID/               sockets and log of a hypervisor, base.map, blank.ram
    STORE/mounts/ID/                  what shows a mounted disk of an epoch
    STORE/machines/ID/console.log     the serial console since the machine was added

Everything is 0700/0600: a memory image holds the guest's secrets.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import blockcow
from epochs import locks
from epochs.catalog import Catalog, PoolRecord
from epochs.durable import make_directory
from epochs.errors import Refused
from epochs.graph import Names, resolve

if TYPE_CHECKING:
    from blockcow.dmthin import DmThinBackend
    from blockcow.pools import PoolName

Notice = Callable[[str], None]


def default_path() -> Path:
    """$EPOCHS_STORE, else /var/lib/epochs for root, else $XDG_STATE_HOME/epochs."""
    if named := os.environ.get("EPOCHS_STORE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/epochs")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "epochs"


def new_id() -> str:
    """A fresh identifier: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def silent(_message: str) -> None:
    """The notice function of callers that have nobody to tell."""


class KnownPools:
    """What the catalog says of pools, for the backend that uses them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def _record(self, pool_id: str) -> PoolRecord:
        found = self._catalog.pool_by_id(pool_id)
        if found is None:
            raise blockcow.BlockError(f"there is no pool {pool_id}; 'epochs pool list' shows those "
                                      "there are")
        return found

    def pool(self, pool_id: str) -> PoolName:
        from blockcow.pools import PoolName

        found = self._record(pool_id)
        return PoolName(found.id, found.name, Path(found.path),
                        uuid.UUID(self._catalog.store_id), uuid.UUID(found.uuid))

    def transaction(self, pool_id: str) -> int:
        return self._record(pool_id).transaction

    def unfinished(self) -> bool:
        return bool(self._catalog.journal())


class StoreFiles:
    """Paths, locks and the catalog of one store; no decisions."""

    def __init__(self, path: Path | str | None = None, notice: Notice = silent) -> None:
        # Without symbolic links, as /proc says where a hypervisor's working directory is.
        self.path = Path(path or default_path()).resolve()
        self.notice = notice
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("locks", "epochs", "packs", "layers", "instances", "machines",
                         "mounts"):
                make_directory(self.path / name)
        except OSError as error:
            raise Refused(f"the store {self.path} cannot be used: {error.strerror}; name another "
                          "with --store") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise Refused(f"the store {self.path} is not writable; name another with --store")
        self.catalog = Catalog(self.path / "catalog.sqlite")

    def close(self) -> None:
        """Let go of everything. A pool that cannot be taken down now is told."""
        try:
            self.rest()
        except blockcow.BlockError as error:
            self.notice(f"a pool stays open: {error}")
        finally:
            self.catalog.close()

    # -- where things are ----------------------------------------------------------------------
    @property
    def packs_dir(self) -> Path:
        return self.path / "packs"

    @property
    def layers_dir(self) -> Path:
        return self.path / "layers"

    def epoch_dir(self, epoch_id: str) -> Path:
        return self.path / "epochs" / epoch_id

    def instance_dir(self, instance_id: str) -> Path:
        return self.path / "instances" / instance_id

    def machine_dir(self, machine_id: str) -> Path:
        return self.path / "machines" / machine_id

    def map_file(self, epoch_id: str) -> Path:
        return self.epoch_dir(epoch_id) / "memory.map"

    def state_file(self, epoch_id: str) -> Path:
        return self.epoch_dir(epoch_id) / "device.state"

    def thumbnail_file(self, epoch_id: str) -> Path:
        return self.epoch_dir(epoch_id) / "thumbnail.png"

    def base_map(self, instance_id: str) -> Path:
        return self.instance_dir(instance_id) / "base.map"

    def console_log(self, machine_id: str) -> Path:
        return self.machine_dir(machine_id) / "console.log"

    # -- disks ---------------------------------------------------------------------------------
    def backend(self, name: str) -> blockcow.Backend:
        """The disk backend of that name over this store's layers."""
        return blockcow.backend(name, self.layers_dir, self.path / "locks",
                                KnownPools(self.catalog), self.catalog.store_id)

    def thin(self) -> DmThinBackend:
        """The backend that keeps layers in pools of ours."""
        from blockcow.dmthin import DmThinBackend

        return DmThinBackend(self.layers_dir, self.path / "locks", KnownPools(self.catalog))

    def new_layer(self, backend: str, base: str) -> str:
        """An id for a new layer of the disk whose base layer is ``base``."""
        return self.layer_in_pool(base[:8]) if backend == "dmthin" else new_id()

    def layer_in_pool(self, pool_id: str) -> str:
        """An id for a new layer in a pool."""
        from blockcow.dmthin import layer_id

        return layer_id(pool_id, self.catalog.next_in_pool(pool_id))

    def moved_on(self, layers: Iterable[tuple[str, str]]) -> None:
        """Inside a catalog transaction that adds or drops layers, given as (backend, id): move on
        the transaction number of every pool that they lie in, in the pool and in the catalog."""
        for pool_id in sorted({layer[:8] for backend, layer in layers if backend == "dmthin"}):
            self.catalog.set_pool_transaction(pool_id, self.thin().advance(pool_id))

    def rest(self) -> None:
        """Take down the pools that no guest uses."""
        if self.catalog.pools():
            thin = self.thin()
            for pool in self.catalog.pools():
                thin.rest(pool.id)

    # -- locks ---------------------------------------------------------------------------------
    @contextmanager
    def machine_lock(self, machine_id: str, name: str) -> Iterator[None]:
        """Be the only command that works on this machine."""
        with locks.hold(self.path / "locks" / f"machine-{machine_id}", f"machine '{name}'",
                        notice=self.notice):
            yield

    @contextmanager
    def try_operation_lock(self, machine_id: str | None, operation_id: str) -> Iterator[bool]:
        """The lock under which an operation that was given up is settled: its machine's, or one of
        its own. Yields False at once if somebody holds it."""
        name = f"machine-{machine_id}" if machine_id else f"op-{operation_id}"
        with locks.attempt(self.path / "locks" / name) as got:
            yield got
            if got and not machine_id:
                (self.path / "locks" / name).unlink(missing_ok=True)

    @contextmanager
    def needed(self, epoch_id: str) -> Iterator[None]:
        """Have an epoch not deleted: somebody is going to go back to it. Ends with the process."""
        path = self.path / "locks" / f"needed-{epoch_id}"
        while True:
            with locks.hold(path, f"epoch {epoch_id[:12]}", shared=True):
                if not path.exists():
                    continue  # taken for a leftover before we had it
                yield
            break
        self.needed_epochs()  # removes the file, unless somebody else needs it, too

    def needed_epochs(self) -> set[str]:
        """Ids of the epochs that somebody has not deleted."""
        found = set()
        for path in (self.path / "locks").glob("needed-*"):
            with locks.attempt(path) as free:
                if free:  # of one that was killed
                    path.unlink(missing_ok=True)
                else:
                    found.add(path.name.removeprefix("needed-"))
        return found

    @contextmanager
    def publishing(self, publish: Iterable[str]) -> Iterator[None]:
        """Be the only command that looks which ports of this host are free, and takes them, until
        they are recorded as its machine's. Not if there are none."""
        if not publish:
            yield
            return
        with locks.hold(self.path / "locks" / "ports", "the ports of this host",
                        notice=self.notice):
            yield

    def forget_machine_lock(self, machine_id: str) -> None:
        """Remove the lock file of a machine that is gone. Whoever waits for it finds out that the
        machine is gone when it gets it."""
        (self.path / "locks" / f"machine-{machine_id}").unlink(missing_ok=True)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Rely on epochs and layers not being deleted meanwhile."""
        with locks.hold(self.path / "locks" / "store", "the store", shared=True,
                        notice=self.notice):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Delete or replace what other commands may rely on."""
        with locks.hold(self.path / "locks" / "store", "the store", notice=self.notice):
            yield

    @contextmanager
    def try_exclusive(self) -> Iterator[bool]:
        """Like :meth:`exclusive`, but yields False at once if somebody works in the store."""
        with locks.attempt(self.path / "locks" / "store") as got:
            yield got

    # -- names ---------------------------------------------------------------------------------
    def resolve(self, text: str) -> str:
        """The epoch id that an EPOCH expression stands for (see :mod:`epochs.graph`)."""
        machines = {m.name: (m.id, m.head) for m in self.catalog.machines()}
        return resolve(text, Names(self.catalog.parents(), self.catalog.tags(), machines))
