"""How scripts/uml_run.py takes the end of a machine, with programs in place of its kernel: one that
halts without exiting is seen only once in some hundred boots.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.dm

LEAVE_STATUS = 'for word; do case $word in exchange=*) echo 7 >"${word#*=}/status";; esac; done\n'


def run(place: Path, kernel: str, timeout: float, options: tuple[str, ...] = ("--installed",),
        newer: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = place / "linux.uml"
    program.write_text(f"#!/bin/sh\n{kernel}")
    program.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "uml_run.py"), *options,
         "--timeout", str(timeout), "--scratch", "16M", "--", "true"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{place}:{os.environ['PATH']}",
             "EPOCHS_UML": str(newer or "")})


def test_a_halted_kernel_need_not_exit(tmp_path: Path) -> None:
    done = run(tmp_path, f"{LEAVE_STATUS}echo reboot: System halted; exec sleep infinity", 60)
    assert done.returncode == 7, done.stderr


def test_halted_without_a_status(tmp_path: Path) -> None:
    done = run(tmp_path, "echo reboot: System halted; exec sleep infinity", 60)
    assert done.returncode == 125
    assert "ended by itself" in done.stderr
    assert "reboot: System halted" in done.stderr


def test_one_that_hangs_before_it_halts(tmp_path: Path) -> None:
    """The control: a status and some other message are no end."""
    done = run(tmp_path, f"{LEAVE_STATUS}echo still here; exec sleep infinity", 2)
    assert done.returncode == 124
    assert "did not end within 2 s" in done.stderr
    assert "still here" in done.stderr


def test_one_that_exits(tmp_path: Path) -> None:
    done = run(tmp_path, LEAVE_STATUS, 60)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(("options", "status"), [((), 9), (("--installed",), 7)])
def test_the_newer_kernel(tmp_path: Path, options: tuple[str, ...], status: int) -> None:
    """It is taken unless the installed one is asked for."""
    newer = tmp_path / "newer"
    newer.mkdir()
    program = newer / "linux.uml"
    program.write_text(f"#!/bin/sh\n{LEAVE_STATUS.replace('7', '9')}")
    program.chmod(0o755)
    done = run(tmp_path, LEAVE_STATUS, 60, options, newer)
    assert done.returncode == status, done.stderr
