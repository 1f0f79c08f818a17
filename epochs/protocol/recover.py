"""``recover``: finish or undo whatever a killed command left. Every command runs it first.

The journal says what was under way; an operation whose process is still in it is left alone. Each
kind of operation is undone by the function that also undoes it when it fails by itself. Two
occasions: :func:`recover`, before every command, and :func:`settle_machine`, whenever a machine's
lock was taken, for whoever held it before may just have been killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from blockcow import BlockError
from epochs.catalog import JournalRecord
from epochs.errors import EpochsError
from epochs.network import isolated
from epochs.processes import ProcessId
from epochs.protocol import create, lifecycle, mounts, standby, switch, upkeep
from epochs.protocol.journal import under_way_here
from epochs.store import StoreFiles
from memsave.errors import MemsaveError

Undo = Callable[[StoreFiles, JournalRecord], None]


def _later(module: str, function: str) -> Undo:
    """A function that is imported when it is called: few commands ever need it."""
    def undo(store: StoreFiles, record: JournalRecord) -> None:
        getattr(import_module(module), function)(store, record)

    return undo


UNDO: dict[str, Undo] = {
    "add": lifecycle.undo_add,
    "create": create.undo,
    "standby": standby.undo,
    "start": switch.undo,
    "rollback": switch.undo,
    "fork": switch.undo,
    "delete": upkeep.redo_delete,
    "remove": upkeep.redo_delete,
    "consolidate": upkeep.undo_consolidate,
    "import-xen": _later("epochs.xen.images", "undo_import"),
    "export-xen": _later("epochs.xen.images", "undo_export"),
    "take-over": _later("epochs.xen.takeover", "undo"),
    "mount": mounts.undo_mount,
    "umount": mounts.undo_mount,
    "view": mounts.undo_mount,
    "rebacking": upkeep.undo_rebacking,
    "pool-create": _later("epochs.protocol.pools", "undo_create"),
    "pool-extend": _later("epochs.protocol.pools", "redo_extend"),
    "pool-remove": _later("epochs.protocol.pools", "redo_remove"),
}


@dataclass(frozen=True)
class Recovered:
    """One operation that was finished or undone."""

    kind: str
    machine: str | None
    phase: str

    @property
    def outcome(self) -> str:
        finished = (self.kind in ("delete", "remove", "pool-extend", "pool-remove",
                                  "umount")
                    or self.phase in ("committed", "switched"))
        return "finished" if finished else "undone"


def pending(store: StoreFiles) -> list[JournalRecord]:
    """Operations that nobody is in any more, newest first: one inside another (create within
    rollback) is settled before it."""
    own = ProcessId.own()
    return [record for record in reversed(store.catalog.journal())
            if not record.operator.alive()
            or (record.operator == own and not under_way_here(record))]


def recover(store: StoreFiles) -> list[Recovered]:
    """Settle every operation that nobody is in any more; returns what was settled.

    A machine that another command holds is left to that command, which settles it before it does
    anything else. What cannot be settled yet is told and left: it concerns one machine.
    """
    settled = []
    for record in pending(store):
        with store.try_operation_lock(record.machine, record.id) as got:
            if got:
                try:
                    settled += _settle(store, record)
                except (EpochsError, BlockError, MemsaveError, OSError) as error:
                    store.notice(f"an interrupted {record.kind} cannot be settled yet: {error}")
                if (record.machine and store.catalog.find_journal(record.id) is None
                        and store.catalog.machine_by_id(record.machine) is None):
                    # It was never added, or another command was first and its lock was made anew.
                    store.forget_machine_lock(record.machine)
    try:
        mounts.drop_dead(store)
    except (EpochsError, BlockError, OSError) as error:
        store.notice(f"a mount whose daemon has ended cannot be taken down yet: {error}")
    try:
        standby.drop_unwanted(store)
    except (EpochsError, BlockError, OSError) as error:
        store.notice(f"a standby instance of no use cannot be dropped yet: {error}")
    try:
        isolated.sweep(store)
    except (EpochsError, OSError) as error:
        store.notice(f"networks of machines that are off cannot be looked for: {error}")
    if settled or _leftovers(store):
        with store.try_exclusive() as alone:
            if alone:
                upkeep.try_tidy(store)
    return settled


def settle_machine(store: StoreFiles, machine_id: str) -> list[Recovered]:
    """Settle whatever was begun on a machine whose lock the caller holds, and raise if that does
    not work: nothing else may be done to it before. Whoever began it is not in it any more,
    whether it lives or not, for it would hold the lock."""
    settled = []
    for record in reversed(store.catalog.journal()):
        if record.machine == machine_id:
            settled += _settle(store, record)
    return settled


def _settle(store: StoreFiles, record: JournalRecord) -> list[Recovered]:
    current = store.catalog.find_journal(record.id)
    if current is None:
        return []  # another command was first
    machine = store.catalog.machine_by_id(record.machine) if record.machine else None
    UNDO[record.kind](store, current)
    return [Recovered(record.kind, machine.name if machine else None, current.phase)]


def _leftovers(store: StoreFiles) -> bool:
    """Whether a layer waits to be dropped or merged."""
    return bool(store.catalog.unneeded_packs()) or upkeep.has_unwanted(store)
