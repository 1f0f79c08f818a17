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
MAX_NODE = 4096  # bytes of a node of xenstore
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
    of each step; pages that were sent before and in it."""

    seconds: float
    precopy: float
    steps: dict[str, float]
    pages_before: int
    pages_within: int


class _Suspended:
    """What happens before and in the pause, called from C; keeps the exception."""

    def __init__(self, freeze: Callable[[], None], before: Callable[[], None]) -> None:
        self._freeze, self._before = freeze, before
        self.at = self.frozen = 0.0
        self.error: BaseException | None = None

    def __call__(self, suspended: bool) -> int:
        try:
            if not suspended:
                self._before()
                return 0
            self.at = time.perf_counter()
            self._freeze()
            self.frozen = time.perf_counter()
        except BaseException as error:
            self.error = error
            return -1
        return 0


def _nothing() -> None:
    """For callers that have nothing to do at some point."""


def _module() -> ModuleType:
    try:
        return import_module("memsave._xen")
    except ImportError as error:
        raise XenMissing("this installation has no support for Xen: install libxen-dev and "
                         f"install epochs anew ({error})") from error


def boot(config: bytes) -> None:
    """A new domain out of a configuration of libxl's (JSON), left paused: what `xl create` does for
    one of `xl`'s. MemsaveError with libxl's words, and nothing is left; XenMissing."""
    module = _module()
    why = module.ffi.new("char[]", 512)
    if module.lib.ms_domain_boot(config, why, 512):
        raise MemsaveError(module.ffi.string(why).decode(errors="replace"))


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

    def find(self, who: uuid.UUID) -> Running | None:
        """The domain of that UUID, if there is one that is not being taken down."""
        return next((one for one in self.domains() if one.uuid == who and not one.dying), None)

    @property
    def version(self) -> tuple[int, int]:
        """Of the Xen that runs."""
        numbers = self._ffi.new("uint32_t[2]")
        self._require(self._lib.ms_host_version(self._c, numbers, numbers + 1))
        return int(numbers[0]), int(numbers[1])

    @property
    def free_memory(self) -> int:
        """Bytes that a new domain could have."""
        free = int(self._lib.ms_host_free(self._c))
        self._require(free)
        return free

    def read(self, path: str) -> str | None:
        """A node of xenstore; None if it is not there."""
        out = self._ffi.new("char[]", MAX_NODE)
        code = self._lib.ms_host_read(self._c, path.encode(), out, MAX_NODE)
        self._require(code)
        return None if code else self._ffi.string(out).decode(errors="replace")

    def name(self, domid: int) -> str | None:
        """What the toolstack calls a domain."""
        return self.read(f"/local/domain/{domid}/name")

    def pause(self, domid: int) -> None:
        """Hold a domain's virtual processors."""
        self._require(self._lib.ms_domain_pause(self._c, domid))

    def unpause(self, domid: int) -> None:
        """Let a domain go on that was paused once."""
        self._require(self._lib.ms_domain_unpause(self._c, domid))

    def resume(self, domain: Running) -> None:
        """Let a suspended domain go on, its devices connected. Of one that goes on already only
        xenstored is told, which a killed command may have failed to do."""
        self._require(self._lib.ms_domain_resume(self._c, domain.domid, int(domain.fresh)))

    def settle(self, domain: Running, limit: float) -> None:
        """After a capture that was killed: take back its request, end its tracking, and give a
        guest that may be about to suspend itself ``limit`` seconds for it. It is left suspended, if
        it is, for :meth:`resume`."""
        self._require(self._lib.ms_domain_settle(self._c, domain.domid, int(limit * 1000)))

    def capture(self, domain: Running, into: XenDomain, freeze: Callable[[], None], *,
                before: Callable[[], None] = _nothing, then: Callable[[], None] = _nothing,
                limit: float = SUSPEND_LIMIT, stay: bool = False,
                hands_off: type[BaseException] | None = None) -> Pause:
        """Read a running domain into an empty one: its pages while it runs, the rest with it
        suspended, after ``freeze`` was called. It goes on before this returns, whatever happens;
        one that is paused goes on for as long as it needs to suspend itself, and stays paused.
        ``stay``: it stays suspended if everything went well. ``hands_off``: if ``freeze`` raises
        that, the domain is another program's business, and left suspended.

        ``before`` is called last before it is asked to suspend itself, ``then`` with everything
        read, before it goes on. MemsaveError if the guest does not suspend itself within ``limit``
        seconds or the capture fails; what the three raise goes through.
        """
        suspended = _Suspended(freeze, before)
        stance = (self._lib.MS_XEN_FRESH if domain.fresh else self._lib.MS_XEN_PAUSED
                  if domain.paused else self._lib.MS_XEN_RUNS)
        handle = self._ffi.new_handle(suspended)
        began = 0.0
        failures: list[BaseException] = []
        whole = False
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
            code = self._lib.ms_domain_save(self._c, domain.domid, write, stance,
                                            int(limit * 1000), self._lib.ms_on_suspended, handle)
            why = self._why()
            first = list(failures)  # else the reader only saw the stream end, because of this
            if not code:
                then()
                whole = True
        finally:
            sent = time.perf_counter()
            try:
                if not (stay and whole) and not self._lib.ms_host_taken(self._c) and not (
                        hands_off is not None and isinstance(suspended.error, hands_off)):
                    self.resume(domain)
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
        # libxc counts what it named before; those named in the pause are there.
        within = min(into.named - int(self._lib.ms_host_precopied(self._c)), into.sent)
        return Pause(resumed - asked, asked - began, {
            "suspend": suspended.at - asked, "freeze_disks": suspended.frozen - suspended.at,
            "seal_memory": sent - suspended.frozen, "resume": resumed - sent},
            into.sent - within, within)

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
                   bool(one.paused) and one.cpu_time == 0)


def _define() -> None:
    """Bind the callback that C calls in the pause."""
    try:
        module = import_module("memsave._xen")
    except ImportError:
        return

    def on_suspended(handle: Any, suspended: int) -> int:
        return int(module.ffi.from_handle(handle)(bool(suspended)))

    module.ffi.def_extern(name="ms_on_suspended", error=-1)(on_suspended)


_define()
