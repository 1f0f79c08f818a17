"""Devices of the ``dmsnap`` backend: put up, moved, taken down. The caller holds :meth:`locked`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from . import loop
from .devmapper import DIRECTORY, SECTOR, DeviceMapper, DmBusy, DmMissing, Target, open_driver
from .interface import BlockError, Chain, Layer
from .names import checked_id, in_directory

CHUNK = 4096  # bytes: the smallest there is, so that little is copied for a small write
PREFIX = "epochs-snap-"


def cow_file(layer_id: str) -> str:
    """Name of a layer's store."""
    return f"{checked_id(layer_id)}.cow"


class Stack:
    """``directory`` has the stores; ``locks`` a lock file."""

    def __init__(self, directory: Path, locks: Path) -> None:
        self.directory, self._lock_file = directory, locks / "dmsnap"
        place = hashlib.blake2s(os.fsencode(directory.resolve()), digest_size=4).hexdigest()
        self._prefix = f"{PREFIX}{place}-"

    @property
    def dm(self) -> DeviceMapper:
        return open_driver()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that changes devices of this directory."""
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # -- names ------------------------------------------------------------------------------------
    def head(self, layer_id: str) -> str:
        """Name of the device that a guest opens."""
        return f"{self._prefix}{checked_id(layer_id)}-head"

    def _name(self, layer: Layer) -> str:
        seen = in_directory(self.directory, layer.file).stat()
        return f"{self._prefix}{checked_id(layer.id)}-{seen.st_ino:x}"

    def device_of(self, layer: Layer) -> str | None:
        """Name of a layer's live device."""
        name = self._name(layer)
        return name if self._is_live(name) else None

    def _is_live(self, name: str) -> bool:
        """Whether a device is there and has a table; one that a killed process left without is
        removed."""
        info = self.dm.info(name)
        if info is None:
            return False
        if not info.live_table:
            self.dm.remove(name)
            return False
        return True

    # -- putting up -------------------------------------------------------------------------------
    def put_up(self, chain: Chain, *, read_only: bool = False) -> Path:
        """Devices for a layer and all beneath it; those that are there stay. ``read_only`` is for
        the top one; what is beneath is never written to. Returns the top one's node."""
        below: str | None = None
        for layer in reversed(chain):
            below = self._put_up(layer, below, read_only=read_only or layer is not chain[0])
        if below is None:
            raise BlockError("a chain without layers")
        return DIRECTORY / below

    def _put_up(self, layer: Layer, below: str | None, *, read_only: bool) -> str:
        name = self._name(layer)
        if self._is_live(name):
            return name
        path = in_directory(self.directory, layer.file)
        with contextlib.ExitStack() as stack:
            if stat.S_ISBLK(path.stat().st_mode):
                node = path
            else:
                node = stack.enter_context(loop.attached(path, read_only=read_only))
            table = self._snapshot(layer, below, node) if below else Target(
                0, layer.size // SECTOR, "linear", f"{node} 0")
            self.dm.create(name, name, [table], read_only=read_only)
        return name

    def _snapshot(self, layer: Layer, below: str, store: Path) -> Target:
        # Persistent. An overflow would show as such, but there is room for every chunk.
        return Target(0, layer.size // SECTOR, "snapshot",
                      f"{DIRECTORY / below} {store} PO {CHUNK // SECTOR}")

    def put_up_head(self, layer: Layer) -> None:
        head = self.head(layer.id)
        if not self._is_live(head):
            self.dm.create(head, head, [self._over(layer)])

    def _over(self, layer: Layer) -> Target:
        return Target(0, layer.size // SECTOR, "linear", f"{DIRECTORY / self._name(layer)} 0")

    # -- moving -----------------------------------------------------------------------------------
    def stack_on(self, new: Layer, chain: Chain) -> None:
        """Put a new layer's device on the active one, which a guest goes on writing to, and load
        the head's next table."""
        active = self.device_of(chain[0])
        head = self.head(chain[0].id)
        if active is None or self.dm.info(head) is None:
            raise BlockError(f"layer {chain[0].id} is not live")
        self._put_up(new, active, read_only=False)
        self.dm.load(head, [self._over(new)])

    def settle_head(self, old_id: str, new_id: str) -> bool | None:
        """After a freeze, or one that was given up: whether the head is over the new layer, whose
        name it then gets. A move that was loaded but not made is dropped. None: there is no head.
        """
        if self.dm.info(self.head(new_id)) is not None:
            return True
        head = self.head(old_id)
        info = self.dm.info(head)
        if info is None:
            return None
        if self._beneath(head)[0].startswith(f"{self._prefix}{new_id}-"):
            if info.suspended:
                self.dm.resume(head)
            self.dm.rename(head, self.head(new_id))
            return True
        self.dm.clear(head)
        if info.suspended:
            self.dm.resume(head)
        return False

    def rest_on(self, active: Layer, chain: Chain) -> None:
        """Let the active layer's device rest on other layers, which say the same."""
        name = self.device_of(active)
        if name is None:
            return  # its next start puts up the right ones
        below = self.put_up(chain, read_only=True).name
        old = self._beneath(name)[0]
        if old == below:
            return
        (table,) = self.dm.table(name)
        store = table.params.split()[1]
        # The new table reads the store as it is when it is loaded: nothing may change it then.
        self.dm.suspend(name)
        try:
            self.dm.load(name, [Target(0, table.length, "snapshot",
                                       f"{DIRECTORY / below} {store} PO {CHUNK // SECTOR}")])
        finally:
            self.dm.resume(name)
            self.take_down_unused(old)
            self.take_down_unused(below)  # only if it is not used, after all

    def go_on(self, layer_id: str) -> None:
        """Resume the devices of a layer that a killed command left suspended."""
        for name in self.dm.devices(f"{self._prefix}{layer_id}-"):
            info = self.dm.info(name)
            if info is not None and info.suspended:
                self.dm.clear(name)
                self.dm.resume(name)

    # -- taking down ------------------------------------------------------------------------------
    def take_down(self, layer_id: str) -> None:
        """Remove a layer's devices and whatever beneath them nobody else uses."""
        head = self.head(layer_id)
        info = self.dm.info(head)
        if info is not None:
            if info.suspended:
                self.dm.clear(head)
                self.dm.resume(head)
            self.dm.remove(head)
        self.take_down_unused_of(layer_id)

    def take_down_unused_of(self, layer_id: str) -> None:
        """Remove what there is of a layer, and beneath it, as far as nobody has it open. There may
        be two devices of one that was merged."""
        for name in self.dm.devices(f"{self._prefix}{layer_id}-"):
            self.take_down_unused(name)

    def take_down_unused(self, name: str) -> None:
        """Remove a device, and those beneath it, as far as nobody has them open."""
        waiting = [name]
        while waiting:
            one = waiting.pop()
            info = self.dm.info(one)
            if info is None or info.open_count:
                continue
            beneath = self._beneath(one)
            if info.suspended and info.live_table:
                self.dm.resume(one)
            try:
                self.dm.remove(one)
            except DmBusy:  # opened meanwhile
                continue
            waiting += [other for other in beneath if other.startswith(self._prefix)]

    def _beneath(self, name: str) -> list[str]:
        """Names of the devices that a device rests on, its origin first; device-mapper's only."""
        found = []
        try:
            table = self.dm.table(name)
        except DmMissing:  # a killed process left it without one
            return [""]
        for line in table:
            for word in line.params.split()[:2]:
                entry = Path(f"/sys/dev/block/{word}/dm/name")
                with contextlib.suppress(FileNotFoundError):
                    found.append(entry.read_text().strip())
        return found or [""]

    def refresh(self, store: Path) -> None:
        """Tell the kernel that a store was cut down."""
        for node in loop.devices_of(store):
            with contextlib.suppress(OSError):  # a read-only one keeps the size it has
                loop.refresh(node)

    def strays(self, known: set[str]) -> list[str]:
        """Devices of no known layer that none of a known layer rests on. (What was merged and
        dropped stays under a guest that had it already.)"""
        there = self.dm.devices(self._prefix)
        used: set[str] = set()
        waiting = [name for name in there
                   if name.removeprefix(self._prefix).rpartition("-")[0] in known]
        while waiting:
            name = waiting.pop()
            if name not in used:
                used.add(name)
                with contextlib.suppress(DmMissing):  # taken down meanwhile
                    waiting += [one for one in self._beneath(name) if one in there]
        return [name for name in there if name not in used]
