"""The Python interface: :class:`Store`, :class:`Machine`, :class:`Epoch`.

::

    from epochs import Store

    with Store() as store:
        web = store.machine("web")
        before = web.create(message="before the upgrade", tags=["before-upgrade"])
        ...
        web.rollback(before, keep=False)
        with store.fork(before, "trial") as trial:      # thrown away at the end of the block
            print(trial.exec(["uname", "-a"]).stdout)

Every method that changes something takes the locks it needs, first settles what a killed command
left (:mod:`epochs.protocol.recover`), and raises the exceptions of :mod:`epochs.errors`. A Store
belongs to the thread that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import memsave
from epochs import graph
from epochs import guard as guarding
from epochs.catalog import EpochRecord, MachineRecord, MountRecord
from epochs.errors import Failed, Refused, UsageError
from epochs.fixup import Fixup, Wishes
from epochs.hypervisor import Progress, hypervisor, no_progress
from epochs.protocol import create as creation
from epochs.protocol import delete as deletion
from epochs.protocol import diff as difference
from epochs.protocol import fixup as fixing
from epochs.protocol import instances, lifecycle, recover, standby, switch, upkeep
from epochs.protocol import mounts as mounting
from epochs.protocol import prune as pruning
from epochs.protocol import verify as verification
from epochs.qemu import agent, screen
from epochs.qemu.connection import open_monitor
from epochs.qemu.process import AGENT_SOCKET, CONSOLE_SOCKET
from epochs.retention import Policy
from epochs.spec import XEN, DiskSpec, MachineSpec
from epochs.store import Notice, StoreFiles, silent

if TYPE_CHECKING:
    from epochs.protocol.pools import PoolState

NO_WISHES = Wishes()
AGENT_LIMIT = 30.0  # seconds the guest agent may take to answer


class Epoch:
    """A committed checkpoint. Attributes are those of its catalog record, fixed for ever but for
    tags, parent (an ancestor may be deleted) and ``damaged``."""

    def __init__(self, store: Store, record: EpochRecord) -> None:
        self._store = store
        self.record = record

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def parent(self) -> str | None:
        return self.record.parent

    @property
    def message(self) -> str:
        return self.record.message

    @property
    def created(self) -> float:
        """Seconds since 1970."""
        return self.record.created

    @property
    def stats(self) -> Mapping[str, Any]:
        """Measured figures of its creation, as in docs/json.md."""
        return self.record.stats

    @property
    def tags(self) -> list[str]:
        return [name for name, _, epoch in self._store.files.catalog.tags() if epoch == self.id]

    @property
    def disks(self) -> dict[str, str]:
        """Disk name to the id of its frozen layer."""
        return self._store.files.catalog.epoch_layers(self.id)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the field names of docs/json.md."""
        record = self.record
        return {
            "id": record.id, "machine": record.machine_name, "parent": record.parent,
            "created": record.created, "message": record.message, "tags": self.tags,
            "damaged": record.damaged, "compatibility": record.compatibility,
            "disks": self.disks, "thumbnail": str(self._store.files.thumbnail_file(record.id))
            if record.thumbnail else None, "stats": record.stats,
        }

    def __repr__(self) -> str:
        return f"<Epoch {self.id[:12]} of {self.record.machine_name}>"


class Machine:
    """A guest under our control. As a context manager it is thrown away at the end of the block,
    with the epochs that were made of it."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name
        self.fixup: Fixup | None = None  # of the fork that made it, for who called that

    @property
    def record(self) -> MachineRecord:
        """The present catalog row; NotFound if the machine was removed."""
        return self._store.files.catalog.machine(self.name)

    @property
    def head(self) -> Epoch | None:
        """The epoch that the present state descends from."""
        head = self.record.head
        return None if head is None else self._store.epoch(head)

    def status(self) -> dict[str, Any]:
        """State, process, disks, head, as in docs/json.md."""
        self._store.settle()
        return lifecycle.describe(self._store.files, self.record)

    def start(self) -> str:
        """Boot, or let a paused machine go on; returns "started" or "resumed"."""
        with self._store.locked(self.name) as record:
            done = switch.start(self._store.files, record)
        standby.refill(self._store.files)
        return done

    def stop(self, *, kill: bool = False, timeout: float = lifecycle.STOP_LIMIT) -> None:
        """Power off; ``kill`` pulls the plug, also of a hypervisor that does not answer."""
        before = lifecycle.pull_plug if kill else None
        with self._store.locked(self.name, before) as record:
            lifecycle.stop(self._store.files, record, kill=kill, limit=timeout)

    def pause(self) -> None:
        """Hold the vCPUs until :meth:`start`."""
        with self._store.locked(self.name) as record:
            instance = instances.require_live(self._store.files, record)
            hypervisor(record.spec).hold(self._store.files, instance)

    def create(self, message: str = "", tags: Iterable[str] = (), *, flat: bool | None = None,
               progress: Progress = no_progress) -> Epoch:
        """A live epoch; see :func:`epochs.protocol.create.create`."""
        with self._store.locked(self.name) as record:
            made = creation.create(self._store.files, record, message=message, tags=tuple(tags),
                                   flat=flat, progress=progress)
        return Epoch(self._store, made)

    def rollback(self, epoch: Epoch | str | None = None, *, keep: bool = True, fixup: bool = True,
                 running: bool | None = None, progress: Progress = no_progress) -> dict[str, Any]:
        """Back to ``epoch`` (default: the head). Returns the id of the kept epoch, if any, the
        seconds from the call (or the kept epoch) to the guest running, and what was done in it then
        (:class:`epochs.fixup.Fixup`). Without ``fixup`` it is left alone: it does not notice.
        ``running``: whether it goes on then, or None: if it is not paused now."""
        with self._store.locked(self.name) as record:
            if epoch is None:
                if record.head is None:
                    raise Refused(f"machine '{self.name}' has no epoch to go back to")
                epoch = record.head
            target = self._store.epoch(epoch)
            done = switch.rollback(self._store.files, record, target.record, keep=keep,
                                   same_generation=not fixup, running=running,
                                   progress=progress)
        told = fixing.fix_up(self._store.files, [self.record], "rollback", target.id, Wishes()
                             ) if fixup else [None]
        standby.refill(self._store.files)
        return {"machine": self.name, "epoch": target.id, **done, "fixup": told[0]}

    def needed(self, epoch: Epoch) -> AbstractContextManager[None]:
        """While in this block, an epoch can be neither deleted nor pruned."""
        return self._store.files.needed(epoch.id)

    def guard(self, command: list[str], *, in_guest: bool = False, timeout: float | None = None,
              check: str | None = None, keep_failed: bool = False, stdout: int = 1
              ) -> guarding.Guarded:
        """Run a command with an epoch to go back to; see :func:`epochs.guard.guard`."""
        return guarding.guard(self, command, in_guest=in_guest, timeout=timeout, check=check,
                              keep_failed=keep_failed, stdout=stdout)

    def prune(self, policy: Policy, *, max_store: int | None = None,
              dry_run: bool = False) -> pruning.Pruned:
        """Delete what a rule does not keep; see :func:`epochs.protocol.prune.prune`."""
        self._store.settle()
        return pruning.prune(self._store.files, self.record, policy, max_store=max_store,
                             dry_run=dry_run)

    def exec(self, argv: list[str], *, stdin: bytes | None = None,
             timeout: float | None = None) -> agent.Completed:
        """Run a command through the guest agent; returns its status and output."""
        if not argv:
            raise UsageError("there is no command to run")
        with self._agent() as guest:
            return guest.run(argv, stdin=stdin, timeout=timeout)

    def wait_agent(self, timeout: float = 120.0) -> None:
        """Wait until the guest agent answers (seconds; agent.AgentSilent after that)."""
        with self._agent(timeout):
            return

    def _agent(self, limit: float = AGENT_LIMIT) -> agent.Agent:
        self._store.settle()
        files = self._store.files
        if self.record.spec.hypervisor == XEN:
            raise Refused(f"machine '{self.name}' is a domain of Xen, which has no guest agent; "
                          f"'epochs console {self.name}' talks to it")
        instance = instances.require_live(files, self.record)
        if instances.state(files, self.record).word == "paused":
            raise Refused(f"machine '{self.name}' is paused; 'epochs start {self.name}' lets it "
                          "go on")
        try:
            return agent.Agent(files.instance_dir(instance.id) / AGENT_SOCKET, limit)
        except OSError as error:
            raise Failed(f"the guest agent's socket of '{self.name}' does not answer: "
                         f"{error}") from error

    def screenshot(self) -> bytes:
        """The display as PNG."""
        with self._store.locked(self.name) as record:
            if not record.spec.vga:
                raise Refused(f"machine '{self.name}' has no display; add it with --vga")
            instance = instances.require_live(self._store.files, record)
            with open_monitor(self._store.files, instance) as monitor:
                return screen.png(screen.capture(
                    monitor, self._store.files.instance_dir(instance.id)))

    @property
    def console_socket(self) -> Path:
        """UNIX socket of the serial console; Refused if the machine is off."""
        instance = instances.require_live(self._store.files, self.record)
        return self._store.files.instance_dir(instance.id) / CONSOLE_SOCKET

    def open_console(self) -> int:
        """A descriptor of its console, to read and to write, which the caller closes; Refused if
        the machine is off."""
        record, files = self.record, self._store.files
        return hypervisor(record.spec).console(files, instances.require_live(files, record))

    @property
    def console_log(self) -> Path:
        """Everything that its console ever said, across rollbacks."""
        record = self.record
        return hypervisor(record.spec).console_log(self._store.files, record)

    def remove(self, *, with_epochs: bool = False, force: bool = False) -> lifecycle.Removal:
        """Forget the machine and its present disks; its epochs stay unless asked for."""
        before = lifecycle.pull_plug if force else None
        with self._store.locked(self.name, before) as record:
            return lifecycle.remove(self._store.files, record, with_epochs=with_epochs,
                                    force=force)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.remove(with_epochs=True, force=True)

    def __repr__(self) -> str:
        return f"<Machine {self.name}>"


class _Locked:
    """``with store.locked(name) as record``: the machine's lock, whatever was begun on it settled,
    then its row as it is now. ``before`` is done with the lock held, before anything is settled."""

    def __init__(self, store: Store, name: str,
                 before: Callable[[StoreFiles, MachineRecord], None] | None = None) -> None:
        self._store, self._name, self._before = store, name, before

    def __enter__(self) -> MachineRecord:
        files = self._store.files
        while True:
            record = files.catalog.machine(self._name)
            self._lock = files.machine_lock(record.id, self._name)
            self._lock.__enter__()
            try:
                # While we waited it may have been removed, and another one added by its name.
                if files.catalog.machine(self._name).id == record.id:
                    if self._before is not None:
                        self._before(files, record)
                    self._store.tell(recover.settle_machine(files, record.id))
                    return files.catalog.machine(self._name)
            except BaseException:
                self._lock.__exit__(None, None, None)
                raise
            self._lock.__exit__(None, None, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._lock.__exit__(kind, error, trace)


class Store:
    """All machines and epochs in one directory. Context manager."""

    def __init__(self, path: Path | str | None = None, notice: Notice = silent) -> None:
        self.files = StoreFiles(path, notice)

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # -- upkeep of the store itself --------------------------------------------------------------
    def settle(self) -> list[recover.Recovered]:
        """Run ``recover`` and tell the notice function what it did."""
        return self.tell(recover.recover(self.files))

    def tell(self, settled: list[recover.Recovered]) -> list[recover.Recovered]:
        """Tell the notice function what was settled; returns it."""
        for one in settled:
            where = f" of machine '{one.machine}'" if one.machine else ""
            self.files.notice(f"an interrupted {one.kind}{where} was {one.outcome}")
        return settled

    def locked(self, name: str,
               before: Callable[[StoreFiles, MachineRecord], None] | None = None) -> _Locked:
        """Settle, then hold a machine's lock."""
        self.settle()
        return _Locked(self, name, before)

    # -- machines --------------------------------------------------------------------------------
    def machines(self) -> list[Machine]:
        return [Machine(self, record.name) for record in self.files.catalog.machines()]

    def machine(self, name: str) -> Machine:
        """NotFound if there is none of that name."""
        return Machine(self, self.files.catalog.machine(name).name)

    def add(self, name: str, spec: MachineSpec,
            progress: Progress | None = None) -> Machine:
        """Register a machine; its disks are checked and never written to."""
        self.settle()
        lifecycle.add(self.files, name, spec, progress)
        return Machine(self, name)

    def take_over(self, name: str, domain: str, disks: tuple[DiskSpec, ...] = (),
                  progress: Progress | None = None) -> Machine:
        """A machine out of a domain of Xen that runs without us; its guest goes on. ``disks`` say
        which backends they get. See :mod:`epochs.xen.takeover`."""
        from epochs.xen import takeover

        self.settle()
        epoch = takeover.take_over(self.files, name, domain, disks,
                                   progress=progress or no_progress)
        machine = Machine(self, name)
        machine.rollback(epoch.id, keep=False)
        return machine

    def fork(self, epoch: Epoch | str, name: str, *, publish: Iterable[str] = (),
             paused: bool = False, fixup: bool = True, wishes: Wishes = NO_WISHES) -> Machine:
        """A new machine from an epoch; see :meth:`fork_many`."""
        return self.fork_many(epoch, [name], publish=publish, paused=paused, fixup=fixup,
                              wishes=wishes)[0]

    def fork_many(self, epoch: Epoch | str, names: list[str], *, publish: Iterable[str] = (),
                  paused: bool = False, fixup: bool = True,
                  wishes: Wishes = NO_WISHES) -> list[Machine]:
        """Several at once, all or none. What was done in each guest is in the ``fixup`` of the
        machines; without ``fixup`` they are left alone, and do not notice."""
        self.settle()
        found = self.epoch(epoch)
        records = switch.fork(self.files, found.record, names, paused=paused,
                              publish=tuple(publish), same_generation=not fixup)
        machines = [Machine(self, record.name) for record in records]
        if fixup:
            for machine, told in zip(machines, fixing.fix_up(
                    self.files, records, "fork", found.id, wishes), strict=True):
                machine.fixup = told
        standby.refill(self.files)
        return machines

    # -- standby instances -------------------------------------------------------------------------
    def standby(self, epoch: Epoch | str, count: int, *, machine: str | None = None,
                fixup: bool = True) -> None:
        """Have ``count`` instances of an epoch ready from now on, so that a rollback of ``machine``
        to it, or, None, a fork of it, takes milliseconds; 0: none. ``fixup``: as the rollback or
        the fork will say. Returns when they are ready, as far as they can be (:meth:`standbys`)."""
        self.settle()
        owner = None if machine is None else self.files.catalog.machine(machine)
        standby.wish(self.files, self.epoch(epoch).record, count, owner=owner,
                     same_generation=not fixup)
        self.fill_standbys()

    def standbys(self) -> list[dict[str, Any]]:
        """What is wanted and what is there (docs/json.md)."""
        self.settle()
        return standby.listed(self.files)

    def fill_standbys(self, *, wait: bool = True) -> None:
        """Make what is missing. Who takes one has this done in the background. ``wait``: also for
        whoever is at it, else leave it to them."""
        self.settle()
        standby.fill(self.files, wait=wait)

    # -- pools -------------------------------------------------------------------------------------
    def pools(self) -> list[PoolState]:
        """All thin pools of this store, as they are now."""
        from epochs.protocol import pools as pooling

        self.settle()
        return pooling.listed(self.files)

    def pool(self, name: str) -> PoolState:
        """One pool; NotFound."""
        from epochs.protocol import pools as pooling

        self.settle()
        return pooling.state(self.files, pooling.named(self.files, name))

    def create_pool(self, name: str, path: Path | str, *, size: int | None = None,
                    force: bool = False) -> PoolState:
        """A new pool on a device or file; see :func:`epochs.protocol.pools.create`."""
        from epochs.protocol import pools as pooling

        self.settle()
        return pooling.create(self.files, name, Path(path), size=size, force=force)

    def extend_pool(self, name: str, *, size: int | None = None) -> PoolState:
        """Let a pool have what its device became larger by."""
        from epochs.protocol import pools as pooling

        self.settle()
        return pooling.extend(self.files, name, size=size)

    def remove_pool(self, name: str) -> None:
        """Give a pool's device back; Refused while layers are in it."""
        from epochs.protocol import pools as pooling

        self.settle()
        pooling.remove(self.files, name)

    # -- epochs ------------------------------------------------------------------------------------
    def epochs(self, machine: str | None = None) -> list[Epoch]:
        """All epochs, oldest first; with a machine, those on its line and those made of it."""
        records = self.files.catalog.epochs()
        if machine is not None:
            owner = self.files.catalog.machine(machine)
            parents = self.files.catalog.parents()
            line = set(graph.ancestors(parents, owner.head)) if owner.head else set()
            records = [r for r in records if r.machine == owner.id or r.id in line]
        return [Epoch(self, record) for record in records]

    def epoch(self, epoch: Epoch | str) -> Epoch:
        """An epoch by any expression of docs/design.md part 7."""
        text = epoch.id if isinstance(epoch, Epoch) else epoch
        return Epoch(self, self.files.catalog.epoch(self.files.resolve(text)))

    def tag(self, epoch: Epoch | str, name: str, *, force: bool = False) -> Epoch:
        """Tag an epoch under its machine; ``force`` moves a tag that exists."""
        self.settle()
        found = self.epoch(epoch)
        owner = self.files.catalog.machine_by_id(found.record.machine)
        if not graph.TAG.fullmatch(name):
            raise UsageError(f"'{name}' is not a tag")
        taken = [e for tag, machine, e in self.files.catalog.tags()
                 if tag == name and machine == found.record.machine]
        if taken and taken != [found.id] and not force:
            raise Refused(f"machine '{owner.name if owner else found.record.machine_name}' has a "
                          f"tag '{name}' already; choose another or move it with --force")
        with self.files.catalog.transaction():
            self.files.catalog.put_tag(name, found.record.machine, found.id)
        return found

    def untag(self, epoch: Epoch | str, name: str) -> Epoch:
        """Remove a tag from an epoch; Refused if it has none of that name."""
        self.settle()
        found = self.epoch(epoch)
        if name not in found.tags:
            raise Refused(f"epoch {found.id[:12]} has no tag '{name}'")
        with self.files.catalog.transaction():
            self.files.catalog.remove_tag(name, found.record.machine)
        return found

    def delete(self, epochs: Iterable[Epoch | str]) -> deletion.Deletion:
        """Forget epochs; all names are resolved before anything is deleted."""
        self.settle()
        found = {one.id: one.record for one in map(self.epoch, epochs)}
        return deletion.delete(self.files, list(found.values()))

    def gc(self) -> dict[str, Any]:
        """Merge and drop what nothing needs, and remove files that nobody names."""
        self.settle()
        with self.files.exclusive():
            before = deletion.used_bytes(self.files)
            upkeep.tidy(self.files)
            removed = upkeep.sweep(self.files)
            return {"freed": before - deletion.used_bytes(self.files),
                    "removed": [str(path) for path in removed]}

    def verify(self, epochs: Iterable[Epoch | str] | None = None,
               progress: Any = None) -> list[verification.Finding]:
        """Read every byte that the epochs (default: all) depend on; returns what is damaged."""
        self.settle()
        chosen = self.epochs() if epochs is None else [self.epoch(epoch) for epoch in epochs]
        with self.files.shared():
            return verification.verify(self.files, [one.record for one in chosen], progress)

    def diff(self, a: Epoch | str, b: Epoch | str, *, files: bool = False) -> difference.EpochDiff:
        """What differs between two epochs: pages and disk blocks, exactly; with ``files`` also the
        files of their file systems (only root may)."""
        self.settle()
        with self.files.shared():
            return difference.diff(self.files, self.epoch(a).record, self.epoch(b).record,
                                   files=files)

    def mount(self, epoch: Epoch | str, directory: Path | str, *, disk: str | None = None,
              partition: int | None = None) -> MountRecord:
        """Mount a disk of an epoch, read-only, on an empty directory; only root may. ``disk`` and
        ``partition`` say which, where there are several."""
        self.settle()
        return mounting.mount(self.files, self.epoch(epoch).record, disk, Path(directory),
                              partition)

    def mounts(self) -> list[MountRecord]:
        """What is mounted."""
        self.settle()
        return self.files.catalog.mounts()

    def umount(self, directory: Path | str) -> MountRecord:
        """Take a mount down; Refused while somebody works in it."""
        self.settle()
        return mounting.umount(self.files, Path(directory))

    # -- Xen ---------------------------------------------------------------------------------------
    def import_xen(self, file: Path | str, *, name: str | None = None, message: str = "",
                   disks: Mapping[str, tuple[Epoch | str, str]] | None = None,
                   progress: Progress = no_progress) -> Epoch:
        """An epoch out of a file of `xl save`; see :func:`epochs.xen.images.import_file`."""
        from epochs.xen import images

        self.settle()
        where = {disk: (self.epoch(epoch).id, layer)
                 for disk, (epoch, layer) in (disks or {}).items()}
        return Epoch(self, images.import_file(self.files, Path(file), name=name, message=message,
                                              disks=where, progress=progress))

    def export_xen(self, epoch: Epoch | str, file: Path | str, *, force: bool = False) -> int:
        """Write an epoch of a domain for `xl restore`; returns the file's size in bytes."""
        from epochs.xen import images

        self.settle()
        return images.export_file(self.files, self.epoch(epoch).record, Path(file), force=force)

    def digest(self, epoch: Epoch | str) -> str:
        """The canonical digest of an epoch's guest memory: equal memory, equal digest."""
        found = self.epoch(epoch)
        with memsave.PackStore(self.files.packs_dir) as packs:
            return memsave.Image.load(self.files.map_file(found.id)).digest(packs)

    def depth(self, epoch: Epoch | str) -> int:
        """How many epochs lie on the line from the root to this one."""
        return graph.depth(self.files.catalog.parents(), self.epoch(epoch).id)

