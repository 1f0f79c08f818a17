"""Running an operation under the journal: record the intent, act, and on any failure undo it with
the same code that ``recover`` uses after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from epochs.catalog import JournalRecord, new_journal
from epochs.errors import Failed
from epochs.store import StoreFiles, new_id

Undo = Callable[[StoreFiles, JournalRecord], None]

_under_way: set[str] = set()  # ids of the operations that this process is in


def under_way_here(record: JournalRecord) -> bool:
    """Whether this process is still in the operation (not: left it without undoing it)."""
    return record.id in _under_way


class Operation:
    """An operation under way; ``record`` is what the journal holds of it now."""

    def __init__(self, store: StoreFiles, record: JournalRecord, early: bool) -> None:
        self._store = store
        self.record = record
        self._begun = early

    def phase(self, phase: str, **more: Any) -> None:
        """Persist how far the operation got (joins a transaction that is open)."""
        with self._store.catalog.transaction():
            if not self._begun:
                self._store.catalog.begin(self.record)
                self._begun = True
            self.record = self._store.catalog.note_phase(self.record, phase, **more)

    def end(self) -> None:
        """Drop the journal row (joins a transaction that is open)."""
        with self._store.catalog.transaction():
            self._store.catalog.end(self.record.id)


@contextmanager
def operation(store: StoreFiles, kind: str, machine: str | None, plan: dict[str, Any],
              undo: Undo, *, early: bool = True) -> Iterator[Operation]:
    """Journal an operation; if the body raises, undo it and let the exception go on. Without
    ``early`` its row comes with its first phase, as nothing is made before."""
    record = new_journal(new_id(), kind, machine, plan)
    _under_way.add(record.id)
    try:
        if early:
            with store.catalog.transaction():
                store.catalog.begin(record)
        try:
            yield Operation(store, record, early)
        except BaseException as error:
            try:
                # As the catalog has it: a phase whose COMMIT failed was never reached.
                held = store.catalog.find_journal(record.id)
                if held is not None:
                    undo(store, held)
            except Exception as second:
                raise Failed(f"{error}; undoing it did not work yet either ({second}): mend the "
                             "cause and run 'epochs recover'") from error
            raise
    finally:
        _under_way.discard(record.id)
