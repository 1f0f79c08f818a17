"""Reading a guest's memory under kernel.yama.ptrace_scope=1, where only ancestors may.

The host here may have no Yama; Debian's kernel in the tiny guest has it. What is shown is the
mechanism that epochs/qemu/yama.py relies on: PR_SET_PTRACER_ANY, set between fork and exec,
outlives the exec.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parents[1] / "guests" / "yama.c"


def test_the_permission_outlives_exec(boot: Callable[..., Machine], tmp_path: Path) -> None:
    program = tmp_path / "yama"
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program),
                    str(SOURCE)], check=True)
    web = boot()
    web.exec(["sh", "-c", "cat >/tmp/yama; chmod 755 /tmp /tmp/yama"], stdin=program.read_bytes())

    def at_scope(scope: int, *arguments: str) -> str:
        done = web.exec(["sh", "-c", f"echo {scope} >/proc/sys/kernel/yama/ptrace_scope && "
                         f"/tmp/yama {' '.join(arguments)}"])
        assert done.status == 0, done
        return done.stdout.decode().strip()

    refused = "read=Operation not permitted fd=Operation not permitted"
    assert at_scope(0) == "read=ok fd=ok"
    assert at_scope(1) == refused, "the control: without the permission it is refused"
    assert at_scope(1, "any") == "read=ok fd=ok"
    assert at_scope(3, "any") == refused, "then doctor says so"
