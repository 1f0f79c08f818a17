"""Device-mapper through libdevmapper: create, load, suspend, resume, message, status, remove.

    >>> dm = devmapper.open_driver()
    >>> dm.create("example", "EPOCHS-example", [Target(0, 2048, "zero", "")])

Exceptions: :class:`DmError` and its kinds carry errno, the operation, the device, and what the
library and the kernel's log said. Sizes are in sectors of 512 bytes, as in the kernel's tables
(Documentation/admin-guide/device-mapper).

Device nodes: where udev runs, every operation that makes it act waits for it through a cookie (a
semaphore that udev's rules count down); where none runs, the library makes the nodes itself. Inside
a guest's pause nobody waits: :meth:`DeviceMapper.resume_later` does so afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .interface import BlockError, BlockRefused
from .nodes import wait_for

SECTOR = 512
DIRECTORY = Path("/dev/mapper")
MAX_NAME, MAX_UUID = 127, 128
_KEEP_OFF = 0x2 | 0x4 | 0x8  # DM_UDEV_DISABLE_{SUBSYSTEM,DISK,OTHER}_RULES_FLAG
_turn = threading.RLock()  # libdevmapper keeps lists of its own
_NAME = re.compile(r"[A-Za-z0-9#+.:=@_-]+")


class DmError(BlockError):
    """An operation of device-mapper failed. ``errno`` is the kernel's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


class DmMissing(DmError):
    """There is no such device, or nothing of that number in it (ENXIO, ENODATA)."""


class DmExists(DmError):
    """A device of that name, or a number in it, exists already (EEXIST, EBUSY of create)."""


class DmBusy(DmError):
    """Somebody has the device open (EBUSY)."""


class DmFull(DmError):
    """No space left (ENOSPC)."""


class DmUnavailable(DmError, BlockRefused):
    """This host has no device-mapper, or we may not use it."""


_KINDS = {errno.ENXIO: DmMissing, errno.ENODATA: DmMissing, errno.ENODEV: DmMissing,
          errno.EEXIST: DmExists, errno.EBUSY: DmBusy, errno.ENOSPC: DmFull}


@dataclass(frozen=True)
class Target:
    """One line of a table: ``length`` sectors from ``start`` on are mapped by ``kind``."""

    start: int
    length: int
    kind: str
    params: str


@dataclass(frozen=True)
class Info:
    """What the driver says of a device that exists."""

    suspended: bool
    live_table: bool
    inactive_table: bool
    read_only: bool
    open_count: int
    event: int
    major: int
    minor: int


class KernelLog:
    """The kernel's messages since this was made: device-mapper's ioctls return a number only, and
    the reason goes there. Empty where we may not read them."""

    def __init__(self) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Messages of device-mapper since the last call."""
        found = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten meanwhile: the next one is there
                    continue
                break
            text = record.partition(";")[2].splitlines()[:1]
            if text and text[0].startswith("device-mapper:"):
                found.append(text[0].removeprefix("device-mapper:").strip())
        return found


class Cookie:
    """What udev still has to do after operations that did not wait for it."""

    def __init__(self, lib: Any, ffi: Any, used: bool) -> None:
        self._lib = lib
        self.c = ffi.new("uint32_t *")
        if used and not lib.dm_udev_create_cookie(self.c):
            raise DmError("no semaphore for waiting for udev could be made", errno.ENOSPC)

    def wait(self) -> None:
        """Wait for udev; where none runs, let the library make and remove nodes. Repeatable."""
        number, self.c[0] = self.c[0], 0
        with _turn:
            done = self._lib.dm_udev_wait(number)
        if not done:
            raise DmError("waiting for udev failed", errno.EIO)


class DeviceMapper:
    """The driver. Made by :func:`open_driver`."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi, self._lib = ffi, lib
        lib.bc_quiet()
        self.udev = Path("/run/udev/control").exists() and "DM_DISABLE_UDEV" not in os.environ
        lib.dm_udev_set_sync_support(int(self.udev))
        self._log = KernelLog()
        number = lib.bc_driver()
        if number:
            raise DmUnavailable("device-mapper is not there: " + _driver_reason(number), number)
        lib.dm_hold_control_dev(1)

    # -- making and changing devices -----------------------------------------------------------
    def create(self, name: str, uuid: str, targets: Sequence[Target], *,
               read_only: bool = False) -> Path:
        """A new live device; returns its node, which exists then. DmExists if the name is taken."""
        with self._task(self._lib.bc_create, checked_name(name)) as task:
            self._must(self._lib.dm_task_set_uuid(task, checked_name(uuid).encode()), name)
            try:
                self._run(task, "create", name)
            except DmBusy as error:
                raise DmExists(str(error), error.errno) from error
        try:
            self.load(name, targets, read_only=read_only)
            self.resume(name)
            return wait_for(DIRECTORY / name)
        except BaseException:
            self.remove(name)
            raise

    def load(self, name: str, targets: Sequence[Target], *, read_only: bool = False) -> None:
        """Give a device another table, which becomes live with the next resume."""
        with self._task(self._lib.bc_reload, name) as task:
            self._add(task, name, targets, read_only)
            self._run(task, "load a table into", name)

    def clear(self, name: str) -> None:
        """Drop a table that was loaded and is not live."""
        with self._task(self._lib.bc_clear, name) as task:
            self._run(task, "drop the loaded table of", name)

    def suspend(self, name: str, *, flush: bool = True, lockfs: bool = True) -> None:
        """Hold I/O; ``flush`` waits for what is under way, ``lockfs`` writes back caches and
        freezes a mounted file system. Nothing happens to a device that is suspended."""
        with self._task(self._lib.bc_suspend, name) as task:
            if not flush:
                self._must(self._lib.dm_task_no_flush(task), name)
            if not lockfs:
                self._must(self._lib.dm_task_skip_lockfs(task), name)
            self._run(task, "suspend", name)

    def resume(self, name: str) -> None:
        """Let I/O go on, through the table that was loaded, if one was."""
        with self._task(self._lib.bc_resume, name) as task:
            self._run_waiting(task, "resume", name)

    def cookie(self) -> Cookie:
        """For :meth:`resume_later`."""
        return Cookie(self._lib, self._ffi, self.udev)

    def resume_later(self, name: str, cookie: Cookie) -> None:
        """The same without waiting for udev; ``cookie.wait()`` does that for several devices."""
        with self._task(self._lib.bc_resume, name) as task:
            self._run(task, "resume", name, cookie)

    def create_later(self, name: str, uuid: str, targets: Sequence[Target], cookie: Cookie, *,
                     read_only: bool = False) -> None:
        """A new live device, without waiting for udev or its node: ``cookie.wait()`` does that."""
        with self._task(self._lib.bc_create, checked_name(name)) as task:
            self._must(self._lib.dm_task_set_uuid(task, checked_name(uuid).encode()), name)
            self._add(task, name, targets, read_only)
            self._run(task, "create", name, cookie)

    def resume_all(self, names: Sequence[str], cookie: Cookie) -> None:
        """Resume several devices, each of them, whatever happens to the others; raises the first
        error afterwards. What was not suspended stays as it is."""
        failed: list[DmError] = []
        for name in names:
            try:
                self.resume_later(name, cookie)
            except DmError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def message(self, name: str, text: str, sector: int = 0) -> str:
        """Send a target a message; returns its answer, if it gives one."""
        with self._task(self._lib.bc_message, name) as task:
            self._must(self._lib.dm_task_set_sector(task, sector), name)
            self._must(self._lib.dm_task_set_message(task, text.encode()), name)
            self._run(task, f"send '{text}' to", name)
            return self._text(self._lib.dm_task_get_message_response(task))

    def rename(self, name: str, new: str) -> None:
        """Give a device another name; who has it open notices nothing."""
        with self._task(self._lib.bc_rename, name) as task:
            self._must(self._lib.dm_task_set_newname(task, checked_name(new).encode()), name)
            self._run_waiting(task, f"rename to {new}", name)

    def remove(self, name: str) -> None:
        """Remove a device; nothing there is fine. DmBusy if somebody keeps it open."""
        with self._task(self._lib.bc_remove, name) as task:
            # What udev started on it may still have it open for a moment.
            self._must(self._lib.dm_task_retry_remove(task), name)
            with contextlib.suppress(DmMissing):
                self._run_waiting(task, "remove", name)

    # -- asking ---------------------------------------------------------------------------------
    def info(self, name: str) -> Info | None:
        """None for a device that does not exist."""
        with self._task(self._lib.bc_info_of, name) as task:
            self._run(task, "ask about", name)
            found = self._ffi.new("bc_info *")
            if not self._lib.bc_get_info(task, found) or not found.exists:
                return None
            return Info(bool(found.suspended), bool(found.live_table), bool(found.inactive_table),
                        bool(found.read_only), found.open_count, found.event, found.major,
                        found.minor)

    def status(self, name: str) -> list[Target]:
        """Each target with its status line. DmMissing."""
        return self._lines(self._lib.bc_status, name)

    def table(self, name: str) -> list[Target]:
        """The live table. DmMissing."""
        return self._lines(self._lib.bc_table, name)

    def deps(self, name: str) -> list[tuple[int, int]]:
        """Major and minor numbers of the devices beneath. DmMissing."""
        with self._task(self._lib.bc_deps, name) as task:
            self._run(task, "ask about", name)
            numbers = self._ffi.new("unsigned long long[]", 64)
            count = self._lib.bc_get_deps(task, numbers, 64)
            if count < 0:
                raise DmMissing(f"device {name} does not exist", errno.ENXIO)
            return [(int(n >> 32), int(n & 0xFFFFFFFF)) for n in list(numbers)[:min(count, 64)]]

    def devices(self, prefix: str = "") -> list[str]:
        """Names of all devices that begin with ``prefix``, sorted."""
        with self._task(self._lib.bc_list, None) as task:
            self._run(task, "list", "devices")
            size = self._lib.bc_get_names(task, self._ffi.NULL, 0)
            names = self._ffi.new("char[]", max(size, 1))
            self._lib.bc_get_names(task, names, size)
            found = bytes(self._ffi.buffer(names, size)).split(b"\0")[:-1]
        return sorted(name for text in found if (name := text.decode()).startswith(prefix))

    def wait_event(self, name: str, event: int) -> None:
        """Block until a device had an event after number ``event`` (Info.event)."""
        with self._task(self._lib.bc_wait_event, name) as task:
            self._must(self._lib.dm_task_set_event_nr(task, event), name)
            self._run(task, "wait for", name)

    # -- inside ---------------------------------------------------------------------------------
    def _lines(self, kind: int, name: str) -> list[Target]:
        with self._task(kind, name) as task:
            self._run(task, "ask about", name)
            start, length = self._ffi.new("uint64_t *"), self._ffi.new("uint64_t *")
            target, params = self._ffi.new("char **"), self._ffi.new("char **")
            found, at = [], self._ffi.NULL
            while True:
                at = self._lib.dm_get_next_target(task, at, start, length, target, params)
                if target[0] != self._ffi.NULL:
                    found.append(Target(int(start[0]), int(length[0]), self._text(target[0]),
                                        self._text(params[0]).strip()))
                if at == self._ffi.NULL:
                    break
        if not found:
            raise DmMissing(f"device {name} does not exist or has no table", errno.ENXIO)
        return found

    def _text(self, words: Any) -> str:
        return "" if words == self._ffi.NULL else str(self._ffi.string(words).decode())

    def _add(self, task: Any, name: str, targets: Sequence[Target], read_only: bool) -> None:
        if read_only:
            self._must(self._lib.dm_task_set_ro(task), name)
        for target in targets:
            self._must(self._lib.dm_task_add_target(
                task, target.start, target.length, target.kind.encode(), target.params.encode()),
                name)

    @contextlib.contextmanager
    def _task(self, kind: int, name: str | None) -> Iterator[Any]:
        with _turn:
            task = self._lib.bc_task(kind, name.encode() if name else self._ffi.NULL)
            if task == self._ffi.NULL:
                raise DmError(f"no task for device {name} could be made: {self._words()}",
                              errno.ENOMEM)
            try:
                yield task
            finally:
                self._lib.dm_task_destroy(task)

    def _words(self) -> str:
        return self._text(self._lib.bc_words())

    def _must(self, done: int, name: str) -> None:
        if not done:
            raise DmError(f"device {name}: {self._words() or 'libdevmapper refused a value'}",
                          errno.EINVAL)

    def _run_waiting(self, task: Any, doing: str, name: str) -> None:
        cookie = self.cookie()
        try:
            self._run(task, doing, name, cookie)
        finally:
            cookie.wait()

    def _run(self, task: Any, doing: str, name: str, cookie: Cookie | None = None) -> None:
        if cookie is not None and cookie.c[0]:
            # What is in a guest's disk (volume groups, arrays, file systems) is not the host's:
            # udev's rules must not look for it in a device of ours.
            flags = _KEEP_OFF if name.startswith("epochs-") else 0
            self._must(self._lib.dm_task_set_cookie(task, cookie.c, flags), name)
        self._log.read()  # what was said before is not about this
        number = self._lib.bc_run(task)
        if number:
            reason = "; ".join(self._log.read()[-3:]) or self._words()
            raise _KINDS.get(number, DmError)(
                f"device-mapper cannot {doing} {name}: {os.strerror(number)}"
                + (f" ({reason})" if reason else ""), number)


def checked_name(name: str) -> str:
    """The name itself; BlockError unless the driver takes it as it is."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise BlockError(f"{name!r} is not a name for a device")
    return name


def _driver_reason(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return "/dev/mapper/control may not be opened; run as root"
    return ("the kernel has no driver for it, or it is not loaded; 'modprobe dm-mod' loads it "
            f"where the kernel has it ({os.strerror(number)})")


@cache
def open_driver() -> DeviceMapper:
    """The driver of this host. DmUnavailable if there is none, or if this installation was built
    without libdevmapper."""
    try:
        from ._devmapper import ffi, lib
    except ImportError as error:
        raise DmUnavailable("blockcow was built without libdevmapper: install it (Debian: "
                            "libdevmapper-dev) and install Epochs again", errno.ENOSYS) from error
    if not Path("/proc/devices").read_text().count(" device-mapper\n"):
        raise DmUnavailable("device-mapper is not there: " + _driver_reason(errno.ENODEV),
                            errno.ENODEV)
    if os.geteuid() != 0:
        raise DmUnavailable("device-mapper is not there: " + _driver_reason(errno.EPERM),
                            errno.EPERM)
    return DeviceMapper(ffi, lib)
