"""Locks: exclusion between processes, the wait with a message, and its limit."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from epochs import locks
from epochs.errors import Busy

HOLDER = """
import sys
from pathlib import Path
from epochs import locks
with locks.hold(Path(sys.argv[1]), "it", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    started = []

    def start(mode: str = "exclusive") -> subprocess.Popen[str]:
        child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock"), mode],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()
        if not child.stdin.closed:
            child.stdin.close()


def test_the_second_waits_with_a_message_and_gets_it(holder, tmp_path: Path) -> None:
    first = holder()
    said: list[str] = []

    def on_notice(text: str) -> None:
        said.append(text)
        first.stdin.close()  # the first command ends only once the second has said that it waits

    with locks.hold(tmp_path / "lock", "machine 'web'", notice=on_notice):
        pass
    assert len(said) == 1
    assert "waiting for another command that works on machine 'web'" in said[0]


def test_the_wait_has_a_limit(holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder()
    monkeypatch.setenv("EPOCHS_WAIT", "0.2")
    with pytest.raises(Busy, match="machine 'web' for more than"), \
            locks.hold(tmp_path / "lock", "machine 'web'"):
        pass


def test_giving_up_leaves_no_lock_behind(holder, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    first = holder()
    monkeypatch.setenv("EPOCHS_WAIT", "0.2")
    with pytest.raises(Busy), locks.hold(tmp_path / "lock", "it"):
        pass
    first.kill()
    first.wait()
    for thread in threading.enumerate():
        if thread.name == "epochs-lock":
            thread.join(10)
    with locks.attempt(tmp_path / "lock") as got:
        assert got


def test_a_killed_holder_frees_it(holder, tmp_path: Path) -> None:
    holder().kill()
    with locks.hold(tmp_path / "lock", "it"):
        pass


def test_sharers_do_not_exclude_each_other_but_a_writer(holder, tmp_path: Path) -> None:
    holder("shared")
    with locks.hold(tmp_path / "lock", "it", shared=True):
        pass
    with locks.attempt(tmp_path / "lock") as got:
        assert not got
