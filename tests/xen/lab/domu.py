"""A domU with the witness in it: made with `xl`, asked over its console."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from memsave.xen.live import Host
from tests.system.guest import WitnessFailed

DOMU = Path("/opt/domu")
CONSOLES = Path("/var/log/xen/console")
READY_LIMIT = 180.0  # seconds; emulated in an emulator


def xl(*arguments: str, check: bool = True) -> str:
    """One command of Xen's own; its output."""
    done = subprocess.run(["xl", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"xl {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def by_name() -> dict[str, int]:
    """Numbers of all domains but dom0 (`xl` would take a second for each question)."""
    with Host() as host:
        return {host.name(one.domid) or f"(number {one.domid})": one.domid
                for one in host.domains() if one.domid}


def domains() -> list[str]:
    """Names of all domains but dom0."""
    return list(by_name())


def config(name: str, kind: str, place: Path, *, memory: int = 128,
           disks: Iterable[tuple[str, str]] = ()) -> Path:
    """A configuration file for `xl create`; ``disks``: (name in the guest, device)."""
    file = place / f"{name}.cfg"
    append = (DOMU / "append").read_text().strip()
    listed = ", ".join(f'"phy:{device},{disk},w"' for disk, device in disks)
    file.write_text(f'name="{name}"\ntype="{kind}"\nmemory={memory}\nmaxmem={memory}\nvcpus=1\n'
                    f'kernel="{DOMU / "vmlinuz"}"\nramdisk="{DOMU / "initrd"}"\n'
                    f'extra="{append}"\ndisk=[{listed}]\n'
                    'on_poweroff="destroy"\non_crash="destroy"\n')
    return file


class DomU:
    """A domain by name, and its console."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def domid(self) -> int:
        return by_name()[self.name]

    @property
    def log(self) -> Path:
        return CONSOLES / f"guest-{self.name}.log"

    def said(self) -> bytes:
        return self.log.read_bytes() if self.log.exists() else b""

    def wait(self, text: str, since: int = 0, limit: float = READY_LIMIT) -> None:
        """Wait until the console said ``text`` after byte ``since``."""
        self._wait(re.escape(text.encode()), since, limit)

    def _wait(self, pattern: bytes, since: int, limit: float) -> re.Match[bytes]:
        deadline = time.monotonic() + limit
        while (match := re.search(pattern, self.said()[since:], re.DOTALL)) is None:
            if time.monotonic() > deadline:
                raise WitnessFailed(f"{self.name}: {pattern!r} did not come within {limit:.0f} s: "
                                    f"…{self.said()[-400:]!r}")
            select.select([], [], [], 0.05)  # xenconsoled's log grows; nothing else tells
        return match

    def run(self, command: str, limit: float = READY_LIMIT) -> str:
        """Type a command into the shell on the console; its output. WitnessFailed if it fails."""
        domid = self.domid
        with Host() as host:
            tty = host.read(f"/local/domain/{domid}/console/tty") or ""
        since = len(self.said())
        fd = os.open(tty, os.O_RDWR | os.O_NOCTTY)
        try:
            # The marks are spelt otherwise in what the shell echoes.
            os.write(fd, f"\necho '[''['; {command}; echo ']'\"]$?\"\n".encode())
        finally:
            os.close(fd)
        match = self._wait(rb"\[\[\r?\n(.*?)\]\](\d+)", since, limit)
        answer = match[1].decode(errors="replace").replace("\r", "").strip()
        if match[2] != b"0":
            raise WitnessFailed(f"{self.name}: {command}: {answer}")
        return answer

    def ctl(self, *words: str) -> str:
        """Ask the witness. What it says by itself meanwhile goes to the same console."""
        answer = self.run("witness-ctl " + " ".join(words))
        if words[0] == "status":
            return answer
        return "\n".join(line for line in answer.splitlines()
                         if not re.fullmatch(r"OK \d+", line))

    def count(self) -> int:
        """The witness' number; WitnessFailed if it saw a mismatch."""
        answer = self.ctl("status")
        match = re.search(r"^OK (\d+)", answer, re.MULTILINE)
        if not match:
            raise WitnessFailed(f"{self.name}: {answer}")
        return int(match[1])

    def wait_count(self, beyond: int, limit: float = READY_LIMIT) -> int:
        """Wait until the witness got further, with everything compared well."""
        deadline = time.monotonic() + limit
        while (count := self.count()) <= beyond:
            if time.monotonic() > deadline:
                raise WitnessFailed(f"{self.name}: the witness stands still at {count}")
        return count
