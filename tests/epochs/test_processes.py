"""Processes are known by pid and start time, and found by their working directory."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

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


def test_waiting_ends_with_the_process_or_the_time(sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    assert process.wait(0.05) is False
    sleeper.kill()
    assert process.wait(10) is True


def test_an_unrecorded_process_is_found_by_its_directory(
        sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert [found.pid for found in working_in(tmp_path)] == [sleeper.pid]
    assert working_in(tmp_path / "elsewhere") == []
