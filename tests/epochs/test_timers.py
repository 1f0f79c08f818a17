"""`epochs every`: units that systemd itself reads without complaint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.json_fields import printed, rows, top_level

RULES = ("--keep-last", "3", "--keep-daily", "7", "--keep-tag", "v*", "--max-store", "20G")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store whose name has everything that systemd would expand."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is missing")
        pytest.skip("systemd-analyze is missing")
    disk, store = tmp_path / "disk.img", tmp_path / 'a $HOME %h "quoted" \\ store'
    with disk.open("wb") as handle:
        handle.truncate(2**20)
    printed(store, "add", "web", "--memory", "64M", "--accel", "tcg", "--disk", f"root={disk}")
    return store


def verified(*units: str) -> str:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True,
                          text=True, check=False)
    return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "epochs-" in line)


@pytest.mark.parametrize(("interval", "line"), [
    ("15min", "OnUnitActiveSec=15min"), ("1h 30min", "OnUnitActiveSec=1h 30min"),
    ("daily", "OnCalendar=daily"), ("Mon..Fri 03:00", "OnCalendar=Mon..Fri 03:00")])
def test_systemd_reads_them(store: Path, tmp_path: Path, interval: str, line: str) -> None:
    units = tmp_path / "units"
    shown = printed(store, "every", interval, "web", *RULES, "--directory", str(units))
    assert set(shown) == top_level(rows()["every"])
    assert line in Path(shown["timer"]).read_text().splitlines()
    assert verified(shown["service"], shown["timer"]) == ""
    Path(shown["timer"]).write_text(Path(shown["timer"]).read_text().replace(line, "OnCalendar=x"))
    assert verified(shown["timer"]) != "", "it would have complained"


def test_its_commands_are_ours(store: Path, tmp_path: Path) -> None:
    """What the service runs, split as systemd does it, names the store exactly."""
    shown = printed(store, "every", "1h", "web", *RULES, "--directory", str(tmp_path))
    service = Path(shown["service"]).read_text()
    lines = re.findall(r"^ExecSt(?:art|opPost)=(.*)$", service, re.MULTILINE)
    words = [[json.loads(f'"{word}"').replace("$$", "$").replace("%%", "%")
              for word in re.findall(r'"((?:[^"\\]|\\.)*)"', line)] for line in lines]
    assert words[0][-5:] == ["create", "--if-running", "-m", "every 1h", "web"]
    assert words[1][-len(RULES) - 1:] == [*RULES, "web"]
    for command in words:
        assert command[1:5] == ["-m", "epochs", "--store", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "machine 'web' is off: no epoch" in subprocess.run(
        words[0], capture_output=True, text=True, check=False).stdout


def test_refused(store: Path, tmp_path: Path) -> None:
    there = tmp_path / "units"
    for interval in ("sometimes", "", "0", "1h\nExecStart=/bin/false"):
        shown = printed(store, "every", interval, "web", "--directory", str(there))
        assert shown["error"]["exit_code"] == 2, interval
    assert not there.exists()
    there.mkdir()
    (there / "epochs-web.timer").write_text("[Timer]\n")
    assert printed(store, "every", "1h", "web", "--directory", str(there)
                   )["error"]["exit_code"] == 4
    assert (there / "epochs-web.timer").read_text() == "[Timer]\n"
