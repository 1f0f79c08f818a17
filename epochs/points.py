"""Named points: every place of an operation where a test may kill the command or make it fail.

``EPOCHS_FAULT=create.paused:kill`` ends the process with SIGKILL when it gets to that point;
``:fail`` raises :class:`FaultInjected` there. Set the variable in tests only. The list below is the
one that sweeps iterate over, so an operation cannot gain a point that no sweep visits.
"""

from __future__ import annotations

import os
import signal

POINTS: dict[str, tuple[str, ...]] = {
    "create": (
        "create.intended",
        "create.disks-prepared",
        "create.prepared",
        "create.paused",
        "create.state-saved",
        "create.disks-frozen",
        "create.memory-sealed",
        "create.resumed",
        "create.disks-sealed",
        "create.memory-written",
        "create.written",
        "create.committed",
    ),
    "launch": (
        "launch.disks-cloned",
        "launch.spawned",
        "launch.patched",
        "launch.loaded",
    ),
    "rollback": (
        "rollback.intended",
        "rollback.prepared",
        "rollback.switched",
        "rollback.old-gone",
        "rollback.taken-over",
        "rollback.resumed",
    ),
    "fork": (
        "fork.intended",
        "fork.prepared",
        "fork.committed",
        "fork.resumed",
    ),
    "start": ("start.intended", "start.launched", "start.committed"),
    "delete": (
        "delete.forgotten",
        "delete.files-dropped",
    ),
    # What settles an operation that was given up can itself be killed.
    "undo-create": ("undo-create.resumed", "undo-create.unfrozen"),
    "undo-switch": ("undo-switch.processes-gone", "undo-switch.files-gone"),
    "undo-consolidate": ("undo-consolidate.dropped",),
    "undo-add": ("undo-add.discarded",),
    "pool-create": ("pool-create.intended", "pool-create.allocated", "pool-create.labelled",
                    "pool-create.opened", "pool-create.recorded"),
    "pool-extend": ("pool-extend.intended", "pool-extend.allocated", "pool-extend.done"),
    "pool-remove": ("pool-remove.forgotten", "pool-remove.erased"),
    "import-xen": ("import-xen.intended", "import-xen.memory-written"),
    "export-xen": ("export-xen.written",),
    "take-over": ("take-over.intended", "take-over.suspended", "take-over.disks-adopted",
                  "take-over.read", "take-over.memory-written", "take-over.committed",
                  "take-over.old-gone"),
    "network": ("network.named", "network.reserved", "network.made", "network.ruled",
                "network.unplugged"),
    "standby": ("standby.intended", "standby.launched", "standby.recorded", "standby.ended"),
    "mount": ("mount.intended", "mount.served", "mount.mounted", "umount.unmounted"),
    "consolidate": (
        "consolidate.intended",
        "consolidate.built",
        "consolidate.promoted",
        "consolidate.recorded",
    ),
    "rebacking": ("rebacking.done",),
}

ALL = frozenset(point for points in POINTS.values() for point in points)


class FaultInjected(Exception):
    """Raised at a named point on request of a test."""


def hit(point: str) -> None:
    """Say that the operation got to ``point``; acts only if EPOCHS_FAULT names it."""
    if point not in ALL:
        raise ValueError(f"unknown point {point!r}")
    wanted, _, action = os.environ.get("EPOCHS_FAULT", "").partition(":")
    if wanted != point:
        return
    if action == "fail":
        raise FaultInjected(f"fault injected at {point}")
    os.kill(os.getpid(), signal.SIGKILL)
