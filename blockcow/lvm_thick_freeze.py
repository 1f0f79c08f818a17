"""Freezing disks on ordinary logical volumes: LVM makes the snapshots beforehand, and in the pause
their devices are made anew. See :mod:`blockcow.lvm_thick`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import exceptions
from .contents import Progress
from .device_freeze import DeviceFreeze
from .devmapper import Target
from .interface import BlockError, BlockRefused, Chain, Freeze, Frozen, Parts
from .lvm_tools import TAG, LvmFailed, Volume, hyphenated, tag, volume_name
from .reference import referred

if TYPE_CHECKING:
    from .lvm_thick import LvmThickBackend


@dataclass(frozen=True)
class _Step:
    """One disk: the origin's device, and the snapshot as LVM made it. ``table`` is that of its
    device, from ``arm`` on."""

    part: Freeze
    origin: str
    volume: Volume
    table: list[Target] = field(default_factory=list)


class LvmThickFreeze(DeviceFreeze):
    """See :class:`blockcow.interface.FreezeTicket`."""

    def __init__(self, disks: LvmThickBackend, parts: Parts) -> None:
        self._disks = disks
        self._steps: dict[str, _Step] = {}
        super().__init__(parts)

    def _prepare(self) -> None:
        origins = {part.disk: self._disks.origin(chain[-1]) for part, chain in self.parts}
        for part, chain in self.parts:
            if part.active.backing != chain[-1].id:
                raise BlockError(f"disk {part.disk!r} has not taken over its volume yet")
            reported = self._disks.lvm.volumes(
                f'lv_uuid="{hyphenated(origins[part.disk].uuid[-32:])}"')
            if not reported:
                raise BlockError(f"LVM does not know {origins[part.disk].full_name} any more")
            origins[part.disk] = reported[0]
            self._make(part, origins[part.disk])
        hints = [hint.id for part, _ in self.parts
                 if (hint := referred(self._disks.directory, part.active.id)) is not None]
        made = self._disks.know([*(part.new_id for part, _ in self.parts), *hints])
        for part, _ in self.parts:
            if part.new_id not in made:
                raise BlockError(f"the snapshot that was made of disk {part.disk!r} is gone again")
            self._steps[part.disk] = _Step(part, origins[part.disk].dm, made[part.new_id])

    def arm(self) -> None:
        """Take LVM's lock, and the snapshots out of the way that LVM has made."""
        self.held.enter_context(self._disks.lvm.group_locked(
            step.volume.vg for step in self._steps.values()))
        for step in self._steps.values():
            step.table.extend(self.dm.table(step.volume.dm))
            self.dm.remove(step.volume.dm)
            exceptions.erase(self._disks.store_of(step.volume))

    def _make(self, part: Freeze, origin: Volume) -> None:
        # Without another wish as large as never to overflow.
        most = exceptions.room_for(origin.size, 4096)
        size = min(part.space or most, most)
        size = -(-size // origin.extent) * origin.extent
        if size > origin.free:
            raise BlockRefused(
                f"volume group {origin.vg} has {origin.free >> 20} MiB free, but a snapshot of "
                f"disk {part.disk!r} takes {size >> 20} MiB: extend the group, delete epochs, or "
                "give the disk the option snapshot=SIZE (a snapshot that gets full loses its "
                "epoch)")
        self._disks.lvm.run(
            "lvcreate", "--quiet", "--snapshot", "--name", volume_name(part.new_id),
            "--size", f"{size}b", "--chunksize", "4k", "--permission", "r", "--addtag", TAG,
            "--addtag", f"{TAG}-store={self._disks.owner}",
            *(["--addtag", tag(part.owner)] if part.owner else []), origin.full_name)

    def _freeze(self) -> None:
        """Suspend the origins, make the snapshots' devices, resume: nothing of LVM."""
        with self.suspended(step.origin for step in self._steps.values()):
            for step in self._steps.values():
                self.dm.create_later(step.volume.dm, step.volume.uuid, step.table, self.cookie,
                                     read_only=True)

    def _seal(self, part: Freeze, chain: Chain, progress: Progress | None) -> Frozen:
        volume = self._steps[part.disk].volume
        if part.space is not None:
            # Who watches snapshots and extends them (dmeventd, if lvm.conf asks for it) has lost
            # sight of this one; without anybody who watches that is no error.
            with contextlib.suppress(LvmFailed):
                self._disks.lvm.run("lvchange", "--quiet", "--monitor", "y", volume.full_name)
        frozen, written = self._disks.seal(part, chain, volume, progress)
        return Frozen(part.disk, frozen, part.active, written)

    def _undo(self) -> None:
        self._disks.recover_freeze(None, self.parts)
