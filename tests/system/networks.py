"""Isolated networks under test: what there is of them on this host, and who answers where."""

from __future__ import annotations

import fcntl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epochs import Machine
from epochs.network.plan import BRIDGE

SECONDS = 20.0  # that an answer may take


@contextmanager
def alone() -> Iterator[None]:
    """The only test on this host that looks at its networks, or turns its forwarding on."""
    with Path("/run/lock/epochs-test-networks").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def left() -> dict[str, list[str]]:
    """What isolated networks are made of, as it is on this host now."""
    def names(*command: str) -> list[str]:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.split()

    links = [word.split("@")[0].rstrip(":") for word in names("ip", "-o", "link")]
    return {
        "namespaces": [word for word in names("ip", "netns") if word.startswith("epochs-")],
        "interfaces": [word for word in links if word.startswith("epn-")],
        "tables": [word for word in names("nft", "list", "tables") if word.startswith("epochs-")],
        "servers": [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()
                    and _serves(entry)],
    }


def _serves(entry: Path) -> bool:
    """Whether a process is a dnsmasq of ours that has not ended."""
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[0].endswith(b"dnsmasq") and f"--interface={BRIDGE}".encode() in words


NOTHING: dict[str, list[str]] = {"namespaces": [], "interfaces": [], "tables": [], "servers": []}


def inside(machine: Machine, line: str) -> tuple[int, str]:
    done = machine.exec(["sh", "-c", line], timeout=60)
    return done.status, (done.stdout + done.stderr).decode().strip()


def serve(machine: Machine, text: str) -> None:
    assert inside(machine, f"echo {text} >/run/www/who") == (0, "")


def answer(machine: Machine) -> str:
    found = machine.status()["address"]
    assert isinstance(found, str)
    return found


def asked(where: str) -> str:
    with urllib.request.urlopen(f"http://{where}/who", timeout=SECONDS) as answer:
        return str(answer.read().decode().strip())
