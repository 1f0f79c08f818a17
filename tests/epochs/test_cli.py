"""The command line without guests: help, exit codes, output in pairs for people and machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epochs.cli import COMMANDS
from tests.json_fields import documented, fields

HEAVY = ("rich", "asyncio", "sqlite3", "qemu", "cffi", "memsave", "blockcow", "epochs.api")


def run(store: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "epochs", "--store", str(store), *arguments],
                          capture_output=True, text=True, check=False, timeout=60,
                          env={**os.environ, **environment})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    file = tmp_path / "disk.img"
    with file.open("wb") as handle:
        handle.truncate(2**20)
    return file


def add(store: Path, disk: Path, name: str = "web", *more: str) -> subprocess.CompletedProcess[str]:
    return run(store, "add", name, "--memory", "64M", "--accel", "tcg", "--disk", f"root={disk}",
               *more)


def test_help_loads_nothing_heavy() -> None:
    code = ("import sys; from epochs.__main__ import main\n"
            "sys.argv = ['epochs', '--help']\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print(' '.join(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "click" in loaded, "the list is the one of the process"
    assert not loaded & set(HEAVY)


def test_help_shows_every_command_in_a_line(store: Path) -> None:
    shown = run(store, "--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", shown, re.MULTILINE), command
        assert run(store, command, "--help").returncode == 0, command
    assert not store.exists(), "help touches no store"


def test_version(store: Path) -> None:
    from epochs import __version__

    assert run(store, "--version").stdout.strip() == f"epochs, version {__version__}"


@pytest.mark.parametrize("arguments", [
    ["no-such-command"], ["create"], ["fork", "x"], ["add", "web", "--colour"],
    ["fork", "x", "y", "--count", "0"], ["add"], ["completion", "csh"],
])
def test_wrong_usage_ends_with_2_and_a_sentence(store: Path, arguments: list[str]) -> None:
    done = run(store, *arguments)
    assert done.returncode == 2, done
    assert done.stderr.strip().splitlines()[-1].startswith("epochs: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(store: Path, shell: str) -> None:
    done = run(store, "completion", shell)
    assert done.returncode == 0
    assert "_EPOCHS_COMPLETE" in done.stdout


def test_completion_knows_machines(store: Path, disk: Path) -> None:
    add(store, disk)
    done = subprocess.run([sys.executable, "-m", "epochs"], capture_output=True, text=True,
                          check=False, env={**os.environ, "EPOCHS_STORE": str(store),
                                            "_EPOCHS_COMPLETE": "bash_complete",
                                            "COMP_WORDS": "epochs start w", "COMP_CWORD": "2"})
    assert done.stdout.split() == ["plain,web"], done


def test_empty_store_in_words_and_json(store: Path) -> None:
    assert "no machines yet" in run(store, "list").stdout
    assert json.loads(run(store, "--json", "list").stdout) == {"machines": []}
    assert "no epochs yet" in run(store, "log").stdout
    assert json.loads(run(store, "--json", "log").stdout) == {"epochs": []}
    assert "nothing to recover" in run(store, "recover").stdout
    assert json.loads(run(store, "--json", "recover").stdout) == {"recovered": []}
    assert json.loads(run(store, "--json", "verify").stdout) == {"epochs": 0, "findings": []}


def test_a_machine_in_words_and_json(store: Path, disk: Path) -> None:
    before = disk.read_bytes()
    assert "machine 'web' added" in add(store, disk).stdout
    document = json.loads(run(store, "--json", "status", "web").stdout)
    shown = run(store, "status", "web").stdout
    assert document["state"] == "off"
    assert re.search(r"state +off", shown)
    assert document["disks"][0]["name"] == "root"
    assert re.search(r"disk +root: ", shown)
    assert [m["name"] for m in json.loads(run(store, "--json", "list").stdout)["machines"]] == [
        "web"]
    assert re.search(r"^web +off +64\.0 MiB", run(store, "list").stdout, re.MULTILINE)
    assert "removed" in run(store, "remove", "web").stdout
    assert json.loads(run(store, "--json", "list").stdout) == {"machines": []}
    assert disk.read_bytes() == before


def test_errors_in_words_and_json(store: Path) -> None:
    done = run(store, "--json", "status", "nobody")
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "NotFound"
    assert error["exit_code"] == 3
    assert done.stderr == f"epochs: {error['message']}\n"


def test_a_machine_from_toml(store: Path, disk: Path, tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(f'name = "web"\nmemory = "64M"\naccel = "tcg"\ncpus = 2\nnet = "none"\n'
                    f'[[disk]]\nname = "root"\nfile = "{disk}"\n')
    assert run(store, "add", "--from", str(file)).returncode == 0
    found = json.loads(run(store, "--json", "status", "web").stdout)
    assert (found["cpus"], found["memory"], found["net"]) == (2, 64 * 2**20, "none")
    for text, words in (("memory = 'x'", "not a memory size"), ("colour = 1", "unknown key"),
                        ("memory = ", "cannot be read"), ("cpus = 1", "'memory' is missing")):
        file.write_text(text)
        done = run(store, "add", "bad", "--from", str(file))
        assert done.returncode == 2, (text, done)
        assert words in done.stderr, text
    assert run(store, "add", "bad", "--from", str(tmp_path / "none")).returncode == 3


def test_what_needs_a_running_machine_says_so(store: Path, disk: Path, tmp_path: Path) -> None:
    add(store, disk)
    for command in (["create", "web"], ["exec", "web", "true"], ["pause", "web"],
                    ["stop", "web"], ["console", "web"], ["rollback", "web"],
                    ["screenshot", "web", str(tmp_path / "s.png")]):
        done = run(store, *command)
        assert done.returncode == 4, (command, done)
    assert run(store, "console", "web", "--log").returncode == 0


def test_an_unexpected_error_is_still_a_sentence(store: Path, disk: Path) -> None:
    add(store, disk)
    (store / "machines").rename(store / "elsewhere")
    (store / "machines").write_text("not a directory")
    done = run(store, "list")
    assert done.returncode in (4, 5)
    assert done.stderr.startswith("epochs: ")
    assert "Traceback" not in done.stderr


def test_json_fields_of_a_machine_are_the_documented_ones(store: Path, disk: Path) -> None:
    add(store, disk)
    assert fields(json.loads(run(store, "--json", "status", "web").stdout)) == documented("Machine")


def test_json_fields_of_doctor_are_the_documented_ones(store: Path) -> None:
    done = run(store, "--json", "doctor")
    assert done.returncode in (0, 4)
    assert fields(json.loads(done.stdout)) == documented("doctor")
