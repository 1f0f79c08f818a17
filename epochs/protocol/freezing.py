"""The disks' part of a create: freezes prepared, done in the pause, undone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import blockcow
import memsave
from blockcow import BlockError, Layer, LiveBlocks
from epochs import headroom, points
from epochs.catalog import MachineRecord
from epochs.errors import EpochsError, Refused
from epochs.hypervisor import Work
from epochs.qemu.command import disk_node
from epochs.store import StoreFiles

SPACE_MARGIN = 16 * 2**20  # bytes kept free beyond what an epoch may need


def check_space(store: StoreFiles, name: str, pages: int) -> None:
    """Refuse before the pause of machine ``name`` if ``pages``, and the copies of them on their
    way, might not fit."""
    needed = 2 * pages * memsave.PAGE + SPACE_MARGIN
    stat = os.statvfs(store.path)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise Refused(f"the store {store.path} has {free // 2**20} MiB free, but an epoch of "
                      f"'{name}' may need {needed // 2**20} MiB; delete epochs or enlarge the file "
                      "system")


def check_rooms(work: Work) -> None:
    """Refuse before the pause if the disks have little room to grow in, by what the guest has been
    writing between its last epochs."""
    history = [stats["disk_bytes"] for stats in
               work.store.catalog.recent_stats(work.machine.id, headroom.HISTORY)]
    needed: dict[str, headroom.Wanted] = {}
    for disk in work.disks:
        layer = work.store.catalog.layer(disk.active or disk.base)
        room = work.store.backend(disk.backend).room(layer)
        if room is None:
            continue
        own = headroom.wanted([written.get(disk.name, 0) for written in history], room.block,
                              layer.size)
        before = needed.get(room.what, headroom.Wanted(0, 0))
        both = needed[room.what] = headroom.Wanted(before.data + own.data,
                                                   before.metadata + own.metadata)
        for kind, left, wanted in (("data", room.data, both.data),
                                   ("metadata", room.metadata, both.metadata)):
            if left is not None and left < wanted:
                raise Refused(
                    f"{room.what} has {left / 2**20:.1f} MiB of {kind} free, but by what "
                    f"'{work.machine.name}' has been writing between epochs it may need "
                    f"{wanted / 2**20:.1f} MiB until the next one; {room.mend}, or delete epochs")


def _parts(work: Work) -> dict[str, list[tuple[blockcow.Freeze, list[Layer]]]]:
    """Freezes by backend, with each disk's chain."""
    found: dict[str, list[tuple[blockcow.Freeze, list[Layer]]]] = {}
    for disk in work.disks:
        chain = work.store.catalog.chain(disk.active or disk.base)
        found.setdefault(disk.backend, []).append(
            (_freeze(work.machine, disk.name, chain[0], work.new_layers[disk.name], work.epoch),
             chain))
    return found


def _freeze(machine: MachineRecord, disk: str, active: Layer, new_id: str,
            epoch: str) -> blockcow.Freeze:
    space = next((one.snapshot for one in machine.spec.disks if one.name == disk), None)
    return blockcow.Freeze(disk, active, new_id, disk_node(active.id),
                           disk_node(new_id), f"{machine.name}/{disk}#{epoch[:12]}", space)


@contextmanager
def prepared(work: Work, live: LiveBlocks) -> Iterator[list[blockcow.FreezeTicket]]:
    """Freezes that are ready to be done; what is not sealed at the end is aborted."""
    tickets: list[blockcow.FreezeTicket] = []
    try:
        for name, parts in _parts(work).items():
            tickets.append(work.store.backend(name).prepare_freeze(live, parts))
        points.hit("create.disks-prepared")
        yield tickets
    except BaseException:
        for ticket in tickets:
            with suppress(BlockError, EpochsError, OSError):  # undo does the same by name
                ticket.abort()
        raise


@contextmanager
def armed(tickets: list[blockcow.FreezeTicket]) -> Iterator[None]:
    """Others are kept out around the pause; they are let in again by all tickets before any of
    them is sealed or aborted."""
    with ExitStack() as stack:
        for ticket in tickets:
            stack.callback(ticket.disarm)
        for ticket in tickets:
            ticket.arm()
        yield


def unfrozen(store: StoreFiles, machine: MachineRecord, live: LiveBlocks | None,
             plan: Mapping[str, Any]) -> dict[str, list[Layer]]:
    """Let the backends say which layers hold each disk's present state now, top first. A disk
    whose active layer is another one than when the create began is not its business any more."""
    by_backend: dict[str, list[tuple[blockcow.Freeze, list[Layer]]]] = {}
    for disk in store.catalog.disks(machine.id):
        if disk.active is None or disk.active != plan["active"].get(disk.name):
            continue
        chain = store.catalog.chain(disk.active)
        by_backend.setdefault(disk.backend, []).append(
            (_freeze(machine, disk.name, chain[0], plan["layers"][disk.name], plan["epoch"]),
             chain))
    held: dict[str, list[Layer]] = {}
    for backend, parts in by_backend.items():
        held.update(store.backend(backend).recover_freeze(live, parts))
    return held
