"""Running domains of this host: who they are, and a live capture of one.

Needs ``memsave._xen``, which is built where Xen's headers and libraries are; :class:`Host` raises
XenMissing elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

from memsave.errors import MemsaveError, XenMissing
from memsave.xen.domain import XenDomain

MAX_DOMAINS = 4096
PIPE = 1 << 20  # bytes on their way between libxc and us
SUSPEND_LIMIT = 30.0  # seconds that a guest has to suspend itself
SUSPENDED = 2  # SHUTDOWN_suspend


@dataclass(frozen=True)
class Running:
    """A domain as it is now. ``reason``: why it shut down (SCHEDOP_shutdown's number), or None.
    ``memory`` in bytes; ``fresh``: it never ran since it was made or restored."""

    domid: int
    uuid: uuid.UUID
    paravirtual: bool
    paused: bool
    dying: bool
    reason: int | None
    memory: int
    cpus: int
    fresh: bool


@dataclass(frozen=True)
class Pause:
    """Seconds from asking the guest to suspend itself until it went on, of the copying before, and
    of each step."""

    seconds: float
    precopy: float
    steps: dict[str, float]


class _Suspended:
    """What happens in the pause, called from C; keeps the exception."""

    def __init__(self, freeze: Callable[[], None]) -> None:
        self._freeze = freeze
        self.at = self.frozen = 0.0
        self.error: BaseException | None = None

    def __call__(self) -> int:
        self.at = time.perf_counter()
        try:
            self._freeze()
        except BaseException as error:
            self.error = error
            return -1
        self.frozen = time.perf_counter()
        return 0


def _module() -> ModuleType:
    try:
        return import_module("memsave._xen")
    except ImportError as error:
        raise XenMissing("this installation has no support for Xen: install libxen-dev and "
                         f"install epochs anew ({error})") from error


class Host:
    """A connection to this host's Xen. Context manager; XenMissing if there is none."""

    def __init__(self) -> None:
        module = _module()
        self._ffi, self._lib = module.ffi, module.lib
        why = self._ffi.new("char[]", 256)
        self._c = self._lib.ms_host_open(why, 256)
        if self._c == self._ffi.NULL:
            raise XenMissing(f"no Xen here: {self._ffi.string(why).decode()}")

    def domains(self) -> list[Running]:
        found = self._ffi.new("ms_domain[]", MAX_DOMAINS)
        count = self._lib.ms_host_domains(self._c, found, MAX_DOMAINS)
        self._require(count)
        return [_running(self._ffi, found[number]) for number in range(count)]

    def resume(self, domid: int, *, held: bool = False) -> None:
        """Let a suspended domain go on, its devices connected; nothing if it is not suspended."""
        self._require(self._lib.ms_domain_resume(self._c, domid, int(held)))

    def capture(self, domain: Running, into: XenDomain, freeze: Callable[[], None], *,
                limit: float = SUSPEND_LIMIT) -> Pause:
        """Read a running domain into an empty one: its pages while it runs, the rest with it
        suspended, after ``freeze`` was called. It goes on before this returns, whatever happens.

        MemsaveError if the guest does not suspend itself within ``limit`` seconds or the capture
        fails; what ``freeze`` raises goes through.
        """
        held = domain.fresh
        suspended = _Suspended(freeze)
        handle = self._ffi.new_handle(suspended)
        began = 0.0
        failures: list[BaseException] = []
        read, write = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE)

        def reader() -> None:
            try:
                into.read(read)
            except BaseException as error:
                failures.append(error)
            finally:
                os.close(read)  # or libxc would wait for us

        thread = threading.Thread(target=reader)
        thread.start()
        try:
            began = time.perf_counter()
            code = self._lib.ms_domain_save(self._c, domain.domid, write, int(held),
                                            int(limit * 1000), self._lib.ms_on_suspended, handle)
            why = self._why()
            first = list(failures)  # else the reader only saw the stream end, because of this
        finally:
            sent = time.perf_counter()
            try:
                self.resume(domain.domid, held=held)
            finally:
                resumed = time.perf_counter()
                os.close(write)
                thread.join()
        if suspended.error is not None:
            raise suspended.error
        if code:
            raise first[0] if first else MemsaveError(why)
        if failures:
            raise failures[0]
        # CLOCK_MONOTONIC, as time.perf_counter's is (PEP 418, Linux).
        asked = float(self._lib.ms_host_asked(self._c))
        return Pause(resumed - asked, asked - began, {
            "suspend": suspended.at - asked, "freeze_disks": suspended.frozen - suspended.at,
            "seal_memory": sent - suspended.frozen, "resume": resumed - sent})

    def _why(self) -> str:
        return str(self._ffi.string(self._lib.ms_host_why(self._c)).decode(errors="replace"))

    def _require(self, code: int) -> None:
        if code < 0:
            raise MemsaveError(self._why())

    def close(self) -> None:
        if self._c != self._ffi.NULL:
            self._lib.ms_host_close(self._c)
            self._c = self._ffi.NULL

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _running(ffi: Any, one: Any) -> Running:
    return Running(int(one.domid), uuid.UUID(bytes=bytes(ffi.buffer(one.uuid))),
                   not one.hardware, bool(one.paused), bool(one.dying),
                   int(one.reason) if one.down else None, int(one.memory), int(one.vcpus),
                   one.cpu_time == 0)


def _define() -> None:
    """Bind the callback that C calls in the pause."""
    try:
        module = import_module("memsave._xen")
    except ImportError:
        return

    def on_suspended(handle: Any) -> int:
        return int(module.ffi.from_handle(handle)())

    module.ffi.def_extern(name="ms_on_suspended", error=-1)(on_suspended)


_define()
