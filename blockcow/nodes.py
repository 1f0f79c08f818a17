"""Waiting for device nodes. Who makes them (udev, devtmpfs, libdevmapper) may come a little later;
the kernel's uevents say when to look again (kobject_uevent, netlink)."""

from __future__ import annotations

import select
import time
from pathlib import Path

from .interface import BlockError

LIMIT = 10.0  # seconds


def wait_for(node: Path, limit: float = LIMIT) -> Path:
    """Wait until ``node`` is there and return it. BlockError after ``limit`` seconds."""
    if node.exists():
        return node
    from pyroute2 import UeventSocket  # only where something has to be waited for

    deadline = time.monotonic() + limit
    with UeventSocket() as events:
        events.bind()
        while not node.exists():
            left = deadline - time.monotonic()
            if left <= 0:
                raise BlockError(f"the device node {node} did not appear within {limit:.0f} s; is "
                                 "udev running as it should?")
            # Udev makes links to nodes after the kernel's event, without another one: so look once
            # in a while, too.
            if select.select([events.fileno()], [], [], min(left, 0.1))[0]:
                list(events.get())
    return node
