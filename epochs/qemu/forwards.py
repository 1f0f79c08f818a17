"""Published ports of a machine on QEMU's own network: forwarded from when its guest goes on.

Not before: in a rollback the old QEMU has them until it is gone.
"""

from __future__ import annotations

import re

from epochs.catalog import MachineRecord
from epochs.network.plan import Publish
from epochs.qemu.command import NETDEV
from epochs.qemu.monitor import Monitor
from epochs.store import Notice

# A line of `info usernet`: protocol, "HOST_FORWARD", descriptor, host's address and port, …
FORWARD = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s", re.MULTILINE)


def publish(monitor: Monitor, machine: MachineRecord, notice: Notice) -> None:
    """Have QEMU forward what it does not forward yet. A port that somebody has taken meanwhile is
    told, and the guest goes on without it."""
    if machine.spec.net != "user" or not machine.spec.publish:
        return
    there = FORWARD.findall(_say(monitor, "info usernet"))
    for one in map(Publish.parse, machine.spec.publish):
        if (one.protocol.upper(), str(one.port)) in there:
            continue
        said = _say(monitor, f"hostfwd_add {NETDEV['user']} "
                             f"{one.protocol}:{one.address or ''}:{one.port}-:{one.guest}")
        if said:
            notice(f"port {one} of '{machine.name}' is not published: {said}")


def _say(monitor: Monitor, line: str) -> str:
    return str(monitor.execute("human-monitor-command", command_line=line)).strip()
