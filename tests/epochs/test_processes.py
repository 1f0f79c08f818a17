"""Processes are known by pid and start time, and found by their working directory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from epochs import processes
from epochs.processes import ProcessId, working_in


@pytest.fixture
def sleeper(tmp_path: Path):
    child = subprocess.Popen(["sleep", "600"], cwd=tmp_path)
    yield child
    child.kill()
    child.wait()


def test_a_process_is_alive_until_it_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    assert process.alive()
    process.kill()
    assert not process.alive(), "a zombie counts as dead"


def test_a_pid_that_was_given_away_again_is_not_the_process(
        sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    other = replace(process, start_time=process.start_time + 1)
    assert not other.alive()
    other.kill()
    assert process.alive(), "the kill must not hit the process that has the pid now"


def test_a_process_of_an_earlier_boot_is_dead(sleeper: subprocess.Popen[bytes]) -> None:
    assert not replace(ProcessId.of(sleeper.pid), boot="earlier").alive()


BUSY = """
import mmap, sys, threading
with open(sys.argv[1], "r+b") as file:
    counter = mmap.mmap(file.fileno(), 8)
def count():
    number = 0
    while True:
        number += 1
        counter[:] = number.to_bytes(8, "little")
threading.Thread(target=count).start()
"""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[ProcessId, Callable[[], bool]]]:
    """A process with a thread that is at work, and what says whether that goes on."""
    file = tmp_path / "counter"
    file.write_bytes(bytes(8))
    child = subprocess.Popen([sys.executable, "-c", BUSY, str(file)])

    def works() -> bool:
        before, deadline = file.read_bytes(), time.monotonic() + 0.2
        while time.monotonic() < deadline:
            if file.read_bytes() != before:
                return True
        return False

    try:
        while not works():
            assert child.poll() is None
        yield ProcessId.of(child.pid), works
    finally:
        child.kill()
        child.wait()


def test_a_struck_process_stands_still_until_it_is_killed(
        busy: tuple[ProcessId, Callable[[], bool]]) -> None:
    process, works = busy
    assert works(), "the control"
    process.strike()
    assert not works()
    assert process.alive(), "it holds what it has"
    process.kill()
    assert not process.alive()


def test_a_process_that_does_not_stop_is_killed(
        busy: tuple[ProcessId, Callable[[], bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in the kernel for long cannot be had at will."""
    process, works = busy
    monkeypatch.setattr(processes, "_stat", lambda pid: ("D", process.start_time, 2))
    process.strike()
    monkeypatch.undo()
    assert process.wait(10)
    assert not works()


def test_waiting_ends_with_the_process_or_the_time(sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    assert process.wait(0.05) is False
    sleeper.kill()
    assert process.wait(10) is True


def test_an_unrecorded_process_is_found_by_its_directory(
        sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert [found.pid for found in working_in(tmp_path)] == [sleeper.pid]
    assert working_in(tmp_path / "elsewhere") == []


ENDS_BUT_FOR_A_THREAD = """
import ctypes, threading, time
threading.Thread(target=lambda: (print("on", flush=True), time.sleep(600))).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_it_is_there_until_its_last_thread_has_ended(tmp_path: Path) -> None:
    """As a process that is killed is for a while: the first thread is a zombie and has given up
    the directory, another one holds memory and files."""
    child = subprocess.Popen([sys.executable, "-c", ENDS_BUT_FOR_A_THREAD], cwd=tmp_path,
                             stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)  # nothing tells when a thread has ended
        process = ProcessId.of(child.pid)
        assert not Path(f"/proc/{child.pid}/cwd").exists()
        assert process.alive()
        assert working_in(tmp_path) == [process]
        process.kill()
        assert not process.alive()
        assert working_in(tmp_path) == []
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
