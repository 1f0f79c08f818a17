"""``every``: systemd units that make an epoch of a machine again and again, and prune."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from epochs.durable import write_file
from epochs.errors import Refused, UsageError

MARK = "# Written by 'epochs every' for machine {} of {}\n"


@dataclass(frozen=True)
class Timer:
    """The two units and the commands that make systemd use them."""

    service: Path
    timer: Path
    commands: list[str]


def default_directory() -> Path:
    """Where systemd looks for the units of who we are."""
    if os.geteuid() == 0:
        return Path("/etc/systemd/system")
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "systemd" / "user"


def write(machine: str, interval: str, store: Path, rules: list[str],
          directory: Path | None = None) -> Timer:
    """Write ``epochs-MACHINE.service`` and ``.timer``. ``interval``: a time span of systemd
    ("15min", counted from the last time) or one of its calendar expressions ("hourly",
    "Mon..Fri 03:00"; one that was missed is made up for). ``rules``: options of ``prune``, or
    nothing, which keeps everything. UsageError if systemd knows no such interval."""
    when = _when(interval)
    place = (directory or default_directory()).absolute()
    epochs = [sys.executable, "-m", "epochs", "--store", str(store)]
    create = _line([*epochs, "create", "--if-running", "-m", f"every {interval}", machine])
    mark = MARK.format(machine, store)
    service = mark + "\n".join([
        "[Unit]", f"Description=Epoch of machine {machine}", "",
        "[Service]", "Type=oneshot", "UMask=0077",
        f"ExecStart={create}",
        # Also after a create that failed, perhaps as there was no space.
        *([f"ExecStopPost={_line([*epochs, 'prune', *rules, machine])}"] if rules else []), ""])
    timer = mark + "\n".join([
        "[Unit]", f"Description=Epochs of machine {machine}, {_escape(interval)}", "",
        "[Timer]", *when, "",
        "[Install]", "WantedBy=timers.target", ""])
    made = Timer(place / f"epochs-{machine}.service", place / f"epochs-{machine}.timer", [])
    place.mkdir(parents=True, exist_ok=True)
    for path, text in ((made.service, service), (made.timer, timer)):
        _refuse_others(path, mark)
        write_file(path, text.encode())
    tool = "systemctl" if os.geteuid() == 0 else "systemctl --user"
    made.commands.extend([f"{tool} daemon-reload", f"{tool} enable --now {made.timer.name}"])
    return made


def _refuse_others(path: Path, mark: str) -> None:
    if path.exists() and not path.read_text().startswith(mark):
        raise Refused(f"{path} is there and not ours; move it away or give another --directory")


def _when(interval: str) -> list[str]:
    if re.search(r"[\n\r\0]", interval) or not re.search(r"[1-9A-Za-z*]", interval):
        raise UsageError(f"{interval!r} is no interval")
    if _analyze("timespan", interval):
        return [f"OnActiveSec={interval}", f"OnUnitActiveSec={interval}", "AccuracySec=1s"]
    if _analyze("calendar", interval):
        return [f"OnCalendar={interval}", "Persistent=true"]
    raise UsageError(f"'{interval}' is no interval; write it like 15min, 1h, daily or "
                     "'Mon..Fri 03:00'")


def _analyze(kind: str, text: str) -> bool:
    try:
        done = subprocess.run(["systemd-analyze", kind, "--", text], capture_output=True,
                              check=False, text=True)
    except FileNotFoundError:
        raise Refused("this host has no systemd (systemd-analyze is not installed), so there is "
                      "nothing that would read the timer") from None
    return done.returncode == 0


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _line(command: list[str]) -> str:
    """As systemd.service(5) quotes it: % and $ stand for themselves when doubled."""
    quoted = (_escape(one).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
              for one in command)
    return " ".join(f'"{one}"' for one in quoted)
