"""The command line towards its shell: pipes, interrupts, --json, debugging, completion."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest

from epochs.cli import cli, failures
from epochs.errors import Refused

START = [sys.executable, "-m", "epochs"]


def called(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = failures.run(cli, list(arguments))
    return code, out.getvalue(), err.getvalue()


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["--json", "doctor"]])
def test_a_reader_that_left_is_no_error(tmp_path: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*START, "--store", str(tmp_path / "s"), *arguments], stdout=writing,
                          stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_hypervisors_broken_pipe_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert failures.run(raising(BrokenPipeError(32, "Broken pipe")), []) == 5
    assert "Broken pipe" in capfd.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_ends_with_130_and_says_what_became_of_it(
        error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    assert failures.run(raising(error), []) == 130
    assert capfd.readouterr().err == "epochs: interrupted; what was under way has been undone\n"


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["--json", "status", "x"], True), (["--store", "s", "--json", "status", "x"], True),
    (["--store", "a", "--store", "b", "--json", "list"], True), (["--store=s", "--json"], True),
    (["status", "x"], False), (["exec", "web", "--json"], False),
    (["--store", "--json", "list"], False),
])
def test_json_is_ours_before_the_command_only(arguments: list[str], wanted: bool) -> None:
    assert failures._wants_json(arguments) is wanted


def test_debugging_adds_a_trace_and_changes_nothing_else(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    command = raising(Refused("no"))
    assert failures.run(command, []) == 4
    assert capfd.readouterr().err == "epochs: no\n"
    monkeypatch.setenv("EPOCHS_DEBUG", "1")
    assert failures.run(command, []) == 4
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("epochs: no\n")


def test_a_catalog_that_lost_a_table_ends_with_a_sentence(tmp_path: Path) -> None:
    assert called("--store", str(tmp_path), "list")[0] == 0
    with sqlite3.connect(tmp_path / "catalog.sqlite") as database:
        database.execute("DROP TABLE journal")
    database.close()
    code, out, err = called("--json", "--store", str(tmp_path), "list")
    assert code == 5
    assert json.loads(out)["error"]["kind"] == "OperationalError"
    assert err.startswith("epochs: the store's catalog cannot be used: no such table")


def test_an_empty_store_name_is_not_the_default_store(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS_STORE", str(tmp_path / "default"))
    code, _, err = called("--store", "", "list")
    assert code == 2
    assert "epochs: --store needs a directory" in err
    assert not (tmp_path / "default").exists()
    assert called("list")[0] == 0
    assert (tmp_path / "default").exists(), "it would have been that one"


@pytest.mark.parametrize(("given", "argv", "timeout"), [
    (["web", "ls", "-l", "--timeout", "3"], ("ls", "-l", "--timeout", "3"), None),
    (["web", "grep", "--help"], ("grep", "--help"), None),
    (["--timeout", "3", "web", "ls", "-l"], ("ls", "-l"), 3.0),
    (["web", "--timeout", "3", "--", "ls", "--stdin"], ("ls", "--stdin"), 3.0),
])
def test_options_of_the_guests_command_are_left_to_it(
        given: list[str], argv: tuple[str, ...], timeout: float | None) -> None:
    from epochs.cli.guests import exec_command

    parameters = exec_command.make_context("exec", given).params
    assert (parameters["argv"], parameters["timeout"]) == (argv, timeout)
    assert (parameters["name"], parameters["with_input"]) == ("web", False)


def completed(words: str, at: int, **environment: str) -> list[str]:
    done = subprocess.run(START, capture_output=True, text=True, check=False, timeout=60, env={
        **os.environ, "_EPOCHS_COMPLETE": "bash_complete", "COMP_WORDS": words,
        "COMP_CWORD": str(at), **environment})
    assert done.stderr == ""
    return done.stdout.split()


def test_pressing_tab_makes_no_store(tmp_path: Path) -> None:
    assert completed("epochs start w", 2, EPOCHS_STORE=str(tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()
    assert "plain,create" in completed("epochs cr", 1)
