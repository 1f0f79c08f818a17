"""Power that goes at every named point: User-Mode Linux runs on disk images that stay, a command is
killed there, and the machine with it at once, unsynced. The next boot looks at what is left
(lab/cut.py), sees that it goes on, and is itself cut off at the next point.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dm.swept import SWEEPS, VISITED

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds for one boot
MIB = 2**20
ENDED_BY_ITSELF = 125  # scripts/uml_run.py: without an exit status

pytestmark = pytest.mark.dm

# What a launch does is cut in rollbacks: it is the same for forks and starts.
CUTS = {sweep: [point for point in points
                if sweep not in ("fork", "start") or not point.startswith("launch.")]
        for sweep, points in SWEEPS.items()}
STORIES = {
    "epochs": ("create", "undo-create", "delete", "undo-add"),
    "machines": ("rollback", "fork", "start", "undo-switch"),
    "pools": ("pool-create-device", "pool-create-file", "pool-extend", "pool-remove-device",
              "pool-remove-file"),
}


def boot(place: Path, last: str, following: str) -> subprocess.CompletedProcess[str]:
    """One boot on the disks in ``place``."""
    command = [sys.executable, str(ROOT / "scripts" / "uml_run.py"), "--timeout", str(LIMIT),
               "--directory", str(ROOT), "--scratch", str(place / "scratch"),
               "--disk", str(place / "pool"), "--disk", str(place / "other"), "--",
               sys.executable, "-m", "tests.dm.lab.cut", last, following]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        try:
            out, err = run.communicate()
        finally:
            run.terminate()  # which takes the machine along, and its files
    return subprocess.CompletedProcess(command, run.returncode, out, err)


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """The folder with the disks that outlive their machines."""
    disks = {tmp_path / "scratch": 1024, tmp_path / "pool": 128, tmp_path / "other": 32}
    for disk, size in disks.items():
        with disk.open("wb") as file:
            file.truncate(size * MIB)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0",
                    str(tmp_path / "scratch")], check=True)
    yield tmp_path
    for disk in disks:  # pytest keeps the folder, and they hold a lot
        disk.unlink()


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("story", STORIES)
def test_power_cut_at_every_point(story: str, images: Path) -> None:
    last = "-"
    for following in [*(f"{sweep}:{point}" for sweep in STORIES[story] for point in CUTS[sweep]),
                      "-"]:
        began = time.monotonic()
        done = boot(images, last, following)
        print(f"{last} -> {following}: {done.stdout.strip()} "
              f"({time.monotonic() - began:.1f} s in all)")
        if following == "-":
            assert done.returncode == 0, done.stderr
        else:
            assert f"cut at {following}" in done.stdout, done.stderr
            assert done.returncode == ENDED_BY_ITSELF, done.stderr
            assert "ended by itself" in done.stderr
            assert "reboot: System halted" in done.stderr
        last = following


def test_no_point_is_left_out() -> None:
    assert {point for points in CUTS.values() for point in points} == VISITED
    assert sorted(sweep for sweeps in STORIES.values() for sweep in sweeps) == sorted(SWEEPS)
