"""Freezing disks on ordinary logical volumes: LVM makes the snapshots beforehand, and in the pause
their devices are made anew. See :mod:`blockcow.lvm_thick`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import exceptions
from .devmapper import Cookie, Target, open_driver
from .interface import BlockError, BlockRefused, Chain, Freeze, Frozen
from .lvm_tools import TAG, LvmFailed, Volume, hyphenated, tag, volume_name
from .reference import referred

if TYPE_CHECKING:
    from .lvm_thick import LvmThickBackend

Parts = Sequence[tuple[Freeze, Chain]]


@dataclass(frozen=True)
class _Step:
    """One disk: the origin's device, and the snapshot as LVM made it. ``table`` is that of its
    device, from ``arm`` on."""

    part: Freeze
    chain: Chain
    origin: str
    volume: Volume
    table: list[Target] = field(default_factory=list)


class LvmThickFreeze:
    """See :class:`blockcow.interface.FreezeTicket`. Made by :meth:`prepare`."""

    def __init__(self, disks: LvmThickBackend, parts: Parts, cookie: Cookie) -> None:
        self._disks, self._parts, self._cookie = disks, parts, cookie
        self._dm = open_driver()
        self._frozen = False
        self._held = contextlib.ExitStack()
        self._steps: list[_Step] = []

    @classmethod
    def prepare(cls, disks: LvmThickBackend, parts: Parts) -> LvmThickFreeze:
        ticket = cls(disks, parts, open_driver().cookie())
        try:
            ticket._prepare()
        except BaseException:
            ticket.abort()
            raise
        return ticket

    def _prepare(self) -> None:
        origins = {part.disk: self._disks.origin(chain[-1]) for part, chain in self._parts}
        for part, chain in self._parts:
            if part.active.backing != chain[-1].id:
                raise BlockError(f"disk {part.disk!r} has not taken over its volume yet")
            reported = self._disks.lvm.volumes(
                f'lv_uuid="{hyphenated(origins[part.disk].uuid[-32:])}"')
            if not reported:
                raise BlockError(f"LVM does not know {origins[part.disk].full_name} any more")
            origins[part.disk] = reported[0]
            self._make(part, origins[part.disk])
        hints = [hint.id for part, _ in self._parts
                 if (hint := referred(self._disks.directory, part.active.id)) is not None]
        made = self._disks.know([*(part.new_id for part, _ in self._parts), *hints])
        for part, chain in self._parts:
            if part.new_id not in made:
                raise BlockError(f"the snapshot that was made of disk {part.disk!r} is gone again")
            self._steps.append(_Step(part, chain, origins[part.disk].dm, made[part.new_id]))

    def arm(self) -> None:
        """Take LVM's lock, and the snapshots out of the way that LVM has made."""
        self._held.enter_context(self._disks.lvm.group_locked(
            step.volume.vg for step in self._steps))
        for step in self._steps:
            step.table.extend(self._dm.table(step.volume.dm))
            self._dm.remove(step.volume.dm)
            exceptions.erase(self._disks.store_of(step.volume))

    def disarm(self) -> None:
        self._held.close()

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

    def freeze(self) -> None:
        """Suspend the origins, make the snapshots' devices, resume: ioctls, nothing of LVM."""
        if self._frozen:
            raise BlockError("this freeze was done already: prepare another one")
        suspended: list[str] = []
        try:
            for step in self._steps:
                suspended.append(step.origin)
                self._dm.suspend(step.origin)
            for step in self._steps:
                self._dm.create_later(step.volume.dm, step.volume.uuid, step.table, self._cookie,
                                      read_only=True)
        finally:
            self._dm.resume_all(suspended, self._cookie)
        self._frozen = True

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        if not self._frozen:
            raise BlockError("nothing is frozen yet: call freeze() before seal()")
        self._cookie.wait()
        outcome = []
        for step in self._steps:
            if step.part.space is not None:
                # Who watches snapshots and extends them (dmeventd, if lvm.conf asks for it) has
                # lost sight of this one; without anybody who watches that is no error.
                with contextlib.suppress(LvmFailed):
                    self._disks.lvm.run("lvchange", "--quiet", "--monitor", "y",
                                        step.volume.full_name)
            frozen, written = self._disks.seal(step.part, step.chain, step.volume, progress)
            outcome.append(Frozen(step.part.disk, frozen, step.part.active, written))
        return outcome

    def abort(self) -> None:
        self._cookie.wait()
        self._disks.recover_freeze(None, self._parts)
