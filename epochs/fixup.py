"""What a guest is told after a rollback or a fork: the time, that it is another one, and its name.

A guest that goes on from an epoch believes that no time has passed, and a fork that it is the
original. docs/hazards.md says what follows from that. The hypervisor shows it a new generation id;
the rest is done through its agent, where it has one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DONE = "done"
LABELS = {"clock": "clock", "random": "random numbers", "hostname": "host name",
          "machine_id": "machine-id", "hook": "hook"}
HOOK = "/etc/epochs/fixup"  # in the guest: run, if it is executable, after everything else


@dataclass(frozen=True)
class Wishes:
    """``hostname``: the machine's name becomes the guest's. ``machine_id``: its /etc/machine-id
    becomes that of the machine."""

    hostname: bool = False
    machine_id: bool = False


@dataclass(frozen=True)
class Fixup:
    """Per thing "done", or a sentence why not; None: not asked for, or no hook there."""

    machine: str
    clock: str
    random: str
    hostname: str | None = None
    machine_id: str | None = None
    hook: str | None = None

    @classmethod
    def nothing(cls, machine: str, why: str, wishes: Wishes) -> Fixup:
        """Nothing was done, for one reason."""
        return cls(machine, why, why, why if wishes.hostname else None,
                   why if wishes.machine_id else None)

    @property
    def missed(self) -> list[tuple[str, str]]:
        """What was not done, and why."""
        return [(label, text) for name, label in LABELS.items()
                if (text := getattr(self, name)) not in (None, DONE)]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the field names of docs/json.md."""
        return asdict(self)
