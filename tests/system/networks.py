"""Isolated networks under test: what there is of them on this host, and who answers where."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path

from epochs import Machine

SECONDS = 20.0  # that an answer may take


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
                    and _command(entry) == "dnsmasq"],
    }


def _command(entry: Path) -> str:
    """The name of a process, unless it has ended and only waits for being asked about."""
    try:
        name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return ""
    return "" if rest.split()[0] == "Z" else name


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
