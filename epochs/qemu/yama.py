"""Who may read a guest's memory.

Reading another process' memory needs ptrace permission. Yama (kernel.yama.ptrace_scope, see
Documentation/admin-guide/LSM/Yama.rst) can restrict it to ancestors (1), to privileged processes
(2) or to nobody (3). Later commands are no ancestors of a QEMU, so with scope 1 QEMU is told,
between fork and exec, to accept its own user's processes (PR_SET_PTRACER_ANY outlives exec).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER = 0x59616D61


def scope() -> int:
    """kernel.yama.ptrace_scope; 0 where there is no Yama."""
    try:
        return int(_SCOPE.read_text())
    except FileNotFoundError:
        return 0


def permission_to_grant() -> Callable[[], None] | None:
    """What to run in the child before exec, or None if nothing is needed."""
    if scope() != 1 or os.geteuid() == 0:
        return None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def grant() -> None:
        if libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PTRACER)")

    return grant


def refusal() -> str | None:
    """None if this user can read its guests' memory, else why not and the mend."""
    found = scope()
    if found <= 1 or (found == 2 and os.geteuid() == 0):
        return None
    return (f"kernel.yama.ptrace_scope is {found}, so guest memory cannot be read; "
            "'sysctl kernel.yama.ptrace_scope=1' allows it")
