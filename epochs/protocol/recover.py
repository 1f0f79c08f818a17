"""``recover``: finish or undo whatever a killed command left. Every command runs it first.

The journal says what was under way; an operation whose process still runs is left alone. Each
kind of operation is undone by the function that also undoes it when it fails by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epochs.catalog import JournalRecord
from epochs.protocol import create, lifecycle, switch, upkeep
from epochs.store import StoreFiles

UNDO: dict[str, Callable[[StoreFiles, JournalRecord], None]] = {
    "add": lifecycle.undo_add,
    "create": create.undo,
    "start": switch.undo,
    "rollback": switch.undo,
    "fork": switch.undo,
    "delete": upkeep.redo_delete,
    "remove": upkeep.redo_delete,
    "consolidate": upkeep.undo_consolidate,
}


@dataclass(frozen=True)
class Recovered:
    """One operation that was finished or undone."""

    kind: str
    machine: str | None
    phase: str

    @property
    def outcome(self) -> str:
        finished = self.kind in ("delete", "remove") or self.phase in ("committed", "switched")
        return "finished" if finished else "undone"


def pending(store: StoreFiles) -> list[JournalRecord]:
    """Operations whose process is gone."""
    return [record for record in store.catalog.journal() if not record.operator.alive()]


def recover(store: StoreFiles) -> list[Recovered]:
    """Settle every operation whose process is gone; returns what was settled."""
    settled = []
    # Newest first: an operation inside another (create within rollback) is settled before it.
    for record in reversed(pending(store)):
        machine = store.catalog.machine_by_id(record.machine) if record.machine else None
        with store.machine_lock(record.machine or f"op-{record.id}",
                                machine.name if machine else record.kind):
            current = [r for r in store.catalog.journal() if r.id == record.id]
            if not current:
                continue  # another command was first
            UNDO[record.kind](store, current[0])
            settled.append(Recovered(record.kind, machine.name if machine else None,
                                     current[0].phase))
    if settled or _leftovers(store):
        with store.try_exclusive() as alone:
            if alone:
                upkeep.try_tidy(store)
    return settled


def _leftovers(store: StoreFiles) -> bool:
    """Whether a layer waits to be dropped or merged."""
    return bool(store.catalog.unneeded_packs()) or upkeep.has_unwanted(store)
