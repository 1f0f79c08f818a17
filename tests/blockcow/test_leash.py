"""A tool that was started for us dies with us, however we die."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from blockcow.interface import BlockError
from blockcow.tools import leashed, run

PARENT = """
import subprocess, sys
from blockcow.tools import leashed
command = ["sleep", "600"]
child = subprocess.Popen(leashed(command) if sys.argv[1] == "leashed" else command)
print(child.pid, flush=True)
child.wait()
"""


def outlives(kind: str) -> bool:
    """Kill a process that started a sleep; whether the sleep goes on."""
    with subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        watch = os.pidfd_open(pid)
        # Not before it is the sleep itself: the leash is put on between fork and exec.
        while b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            select.select([], [], [], 0.01)
        parent.kill()
    try:
        ended = bool(select.select([watch], [], [], 10 if kind == "leashed" else 0.5)[0])
        if not ended:
            os.kill(pid, 9)
        return not ended
    finally:
        os.close(watch)


def test_a_leashed_tool_dies_with_its_parent() -> None:
    assert not outlives("leashed")


def test_without_the_leash_it_would_live_on() -> None:
    assert outlives("free")


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-tool"):
        leashed(["no-such-tool"])
    with pytest.raises(BlockError, match="no-such-tool is not installed"):
        run(["no-such-tool", "x"])
