"""``prune``: delete the epochs of a machine that a rule does not keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from epochs.catalog import MachineRecord
from epochs.errors import UsageError
from epochs.protocol import delete as deletion
from epochs.retention import Candidate, Decision, Policy, decide
from epochs.store import StoreFiles


@dataclass(frozen=True)
class Pruned:
    """``decisions``: newest first; those for want of space have lost their reasons. ``freed`` and
    ``used``: bytes on disk, of the whole store; a dry run frees nothing."""

    machine: str
    decisions: list[Decision]
    freed: int
    used: int
    dry_run: bool

    @property
    def deleted(self) -> list[str]:
        """Ids of those that went, or would go."""
        return [one.id for one in self.decisions if not one.kept]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the field names of docs/json.md."""
        return {"machine": self.machine, "dry_run": self.dry_run, "deleted": self.deleted,
                "kept": [{"epoch": one.id, "reasons": one.reasons}
                         for one in self.decisions if one.kept],
                "freed": self.freed, "used": self.used}


def prune(store: StoreFiles, machine: MachineRecord, policy: Policy, *,
          max_store: int | None = None, dry_run: bool = False) -> Pruned:
    """Delete what ``policy`` does not keep of the epochs that were made of a machine; then, while
    the store occupies more than ``max_store`` bytes, the oldest of the rest. Never deleted: epochs
    that a machine is at, mounted ones, and those that a guard may go back to; for want of space
    neither the last N that the policy keeps nor tagged ones. Every other epoch stays as it was. A
    dry run cannot know what a deletion would free: it says "may go for space".
    """
    if policy.empty and max_store is None:
        raise UsageError("a rule that keeps nothing would delete everything; say what to keep, "
                         "like --keep-last 5")
    decisions = decide(candidates(store, machine), policy)
    if policy.empty:
        for one in decisions:
            one.reasons.append("no rule")
    before = deletion.used_bytes(store)
    if dry_run and max_store is not None and before > max_store:
        for one in decisions:
            if one.kept and not one.firm:
                one.reasons.append("may go for space")
    if not dry_run:
        _delete(store, [one.id for one in decisions if not one.kept])
        if max_store is not None:
            _shrink(store, decisions, max_store)
    used = deletion.used_bytes(store)
    return Pruned(machine.name, decisions, before - used, used, dry_run)


def candidates(store: StoreFiles, machine: MachineRecord) -> list[Candidate]:
    """The epochs that were made of a machine."""
    tags: dict[str, list[str]] = {}
    for name, _, epoch in store.catalog.tags():
        tags.setdefault(epoch, []).append(name)
    needed = {epoch: "a guarded command may go back to it" for epoch in store.needed_epochs()}
    needed |= {record.epoch: f"mounted on {record.directory}" for record in store.catalog.mounts()}
    needed |= {one.head: f"machine '{one.name}' is at it" for one in store.catalog.machines()
               if one.head is not None}
    return [Candidate(epoch, store.catalog.epoch(epoch).created, tuple(tags.get(epoch, ())),
                      needed.get(epoch)) for epoch in store.catalog.epochs_of(machine.id)]


def _shrink(store: StoreFiles, decisions: list[Decision], limit: int) -> None:
    """What an epoch's deletion frees is known when it is done: others share its pages and blocks.
    So they go one by one, the oldest first, as long as that helps: where nothing comes free, as
    layers cannot be merged for want of space or somebody else holds it, no more are given up."""
    used = deletion.used_bytes(store)
    for one in reversed(decisions):
        if used <= limit:
            return
        if one.kept and not one.firm:
            _delete(store, [one.id])
            one.reasons.clear()
            now = deletion.used_bytes(store)
            if now >= used:
                store.notice(f"deleting epoch {one.id[:12]} gave nothing back; the others are kept")
                return
            used = now


def _delete(store: StoreFiles, ids: list[str]) -> None:
    if ids:
        deletion.delete(store, [store.catalog.epoch(one) for one in ids])
