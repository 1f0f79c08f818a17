"""The named points (epochs/points.py) that the sweeps over thin pools visit, by what is struck.

Plain data: tests/system/test_faults.py reads it on any host, and sees by it that every point has a
sweep. lab/test_kills_dmthin.py and test_power_cut.py go through it.
"""

from __future__ import annotations

from epochs.points import POINTS

SWEEPS: dict[str, tuple[str, ...]] = {
    "create": POINTS["create"],
    "rollback": ("rollback.intended", *POINTS["launch"], *POINTS["rollback"][1:]),
    "fork": ("fork.intended", *POINTS["launch"], *POINTS["fork"][1:]),
    "start": ("start.intended", "launch.disks-cloned", "launch.spawned", *POINTS["start"][1:]),
    "delete": POINTS["delete"],
    "undo-create": POINTS["undo-create"],
    "undo-switch": POINTS["undo-switch"],
    "undo-add": POINTS["undo-add"],
    "pool-create-device": POINTS["pool-create"],
    "pool-create-file": POINTS["pool-create"],
    "pool-extend": POINTS["pool-extend"],
    "pool-remove-device": POINTS["pool-remove"],
    "pool-remove-file": POINTS["pool-remove"],
}

VISITED = frozenset(point for points in SWEEPS.values() for point in points)

SWITCHED = frozenset(("rollback.switched", "rollback.old-gone", "rollback.taken-over",
                      "rollback.resumed", "undo-switch.processes-gone"))
"""Points behind the transaction in which a rollback is done."""

FORKED = frozenset(("fork.committed", "fork.resumed"))
