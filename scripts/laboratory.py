"""What the two laboratories, User-Mode Linux and Xen, have in common on the host's side: disks made
on the way, and the folder in which a command and its environment go in and its status comes out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

STALLED, TIMED_OUT = 125, 124  # exit statuses of our own, as of timeout(1) and env(1)
PASSED_ON = ("CI", "PYTEST_", "EPOCHS_", "HYPOTHESIS_", "PYTHON", "LANG", "LC_", "TERM")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int | None:
    """Bytes of a size like 512M; None if the text is not one."""
    unit = UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else None


def image(text: str, place: Path, number: int) -> Path:
    """A disk image: the file of that name, or a new sparse one of that size in ``place``."""
    wanted = size(text)
    if wanted is None:
        return Path(text).resolve(strict=True)
    path = place / f"disk{number}"
    with path.open("wb") as file:
        file.truncate(wanted)
    return path


def parser(program: str, description: str | None, *, memory: str, disk: str) -> (
        argparse.ArgumentParser):
    """The options that both have. ``disk``: what further disks are called inside."""
    made = argparse.ArgumentParser(prog=program, description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--memory", default=memory, help=f"of the machine (default: {memory})")
    made.add_argument("--disk", action="append", default=[], metavar="SIZE|FILE",
                      help=f"a further disk: {disk} ...")
    made.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                      help="end it after so long, with status 124 (default: 600)")
    made.add_argument("--kernel-log", type=Path, metavar="FILE",
                      help="keep the kernel's messages there")
    made.add_argument("command", nargs="+", metavar="COMMAND")
    return made


def put_command(exchange: Path, command: Sequence[str]) -> None:
    """Leave a command and what of our environment it is to have, words ended by NUL."""
    environment = [f"{key}={value}" for key, value in os.environ.items()
                   if key.startswith(PASSED_ON)]
    for name, words in (("command", command), ("environment", environment)):
        (exchange / name).write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))


def outcome(program: str, machine: str, exchange: Path, log: Path) -> int:
    """The exit status of the command in a machine that has ended."""
    try:
        status = (exchange / "status").read_text().strip()
    except FileNotFoundError:
        return failed(program, f"{machine} ended by itself", STALLED, log)
    if not status.isdigit():
        return failed(program, f"{machine} could not be set up ({status})", STALLED, log)
    # A processor that stood still for long says more of the host that emulates it.
    if re.search(r"Kernel panic|BUG: (?!soft lockup)", log.read_text(errors="replace")):
        return failed(program, f"{machine} had a fault in its kernel", STALLED, log)
    return int(status)


def failed(program: str, why: str, status: int, log: Path) -> int:
    """Say why on standard error, with the end of the kernel's log; returns ``status``."""
    print(f"{program}: {why}; its kernel said:", file=sys.stderr)
    for line in log.read_text(errors="replace").splitlines()[-60:]:
        print(f"    {line}", file=sys.stderr)
    return status
