"""Processes by pid *and* start time, so that a pid the kernel gave away again is not ours.

Fields are those of proc(5): start time is in clock ticks since boot, hence the boot id beside it.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STOPPING = 0.005  # seconds


@cache
def boot_id() -> str:
    """This boot of the host, from random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class ProcessId:
    """A process that is found again after the command that started it has ended."""

    pid: int
    start_time: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Identify a process that exists; ProcessLookupError if it does not."""
        started = _stat(pid)
        if started is None:
            raise ProcessLookupError(pid)
        return cls(pid, started[1], boot_id())

    @classmethod
    def own(cls) -> ProcessId:
        return cls.of(os.getpid())

    def alive(self) -> bool:
        """Whether this very process runs. A zombie does not, once its last thread has ended: until
        then that one holds the memory and the files of all."""
        if self.boot != boot_id():
            return False
        found = _stat(self.pid)
        return found is not None and found[1] == self.start_time and (
            found[0] not in "ZX" or found[2] > 1)

    def terminate(self) -> None:
        """SIGTERM; nothing if it is gone."""
        self._signal(signal.SIGTERM)

    def strike(self) -> None:
        """When this returns no thread of it runs, and it holds what it has until it is killed.

        SIGSTOP, which costs no processor its time as the end of a process does. It reaches all
        threads once one has taken it, which its first one's state shows; if that takes long, as in
        a read from a slow disk, SIGKILL, which reaches all at once."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOPPING
        while (found := _stat(self.pid)) is not None and found[0] not in "TZX":
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
                return

    def _signal(self, number: signal.Signals) -> None:
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():  # checked with the pidfd held: the pid cannot change hands now
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)

    def kill(self, wait: float = 30.0) -> None:
        """SIGKILL and wait until it is gone; TimeoutError (seconds) if it will not go."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if not self.alive():  # checked with the pidfd held: the pid cannot change hands now
                return
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            if not select.select([fd], [], [], wait)[0]:
                raise TimeoutError(f"process {self.pid} does not end")
        finally:
            os.close(fd)

    def wait(self, timeout: float) -> bool:
        """Wait for the process to end; False if it still runs after ``timeout`` seconds."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.alive() or bool(select.select([fd], [], [], timeout)[0])
        finally:
            os.close(fd)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, start time, number of threads."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2:].split()  # the name may hold spaces and brackets
    return fields[0], int(fields[19]), int(fields[17])


def working_in(directory: Path) -> list[ProcessId]:
    """Processes whose working directory is ``directory``: how a hypervisor is found that was
    spawned by a command which died before it could record the pid."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if _directory_of(entry) == directory:
                found.append(ProcessId.of(int(entry.name)))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # gone meanwhile, or another user's, which we cannot have spawned
    return found


def _directory_of(process: Path) -> Path | None:
    """The working directory of an entry of /proc; also of one whose first thread has ended and
    given that up before the others, as in a process that was killed."""
    try:
        return (process / "cwd").readlink()
    except FileNotFoundError:
        for thread in (process / "task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                return (thread / "cwd").readlink()
        return None


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other (smaps_rollup of proc(5)); 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines()
               if line.startswith(("Private_Clean:", "Private_Dirty:")))


def host_memory() -> tuple[int, int]:
    """Bytes that the host has, and that new processes could get."""
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(found[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total, free
