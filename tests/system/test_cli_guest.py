"""The command line on a running guest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.qemu.agent import Agent
from epochs.qemu.connection import open_monitor
from epochs.qemu.process import AGENT_SOCKET
from tests.commands import cli_json, run_cli
from tests.json_fields import documented, fields

from .guest import CTL, wait_witness

pytestmark = pytest.mark.guest


def test_the_story_through_the_command_line(store: Store, boot: Callable[..., Machine],
                                            tmp_path: Path) -> None:
    web = boot(vga=True)
    path = store.files.path
    made = run_cli(path, "create", "web", "-m", "first", "-t", "one").stdout
    assert made.startswith("epoch ")
    assert "paused" in made
    shown = cli_json(path, "show", "web@one")
    assert isinstance(shown, dict)
    per_disk = {f"stats.disk_bytes.{disk}" for disk in "ab"} | {f"disks.{disk}" for disk in "ab"}
    assert fields(shown) - per_disk - {"depth"} == documented("Epoch")
    assert "first" in run_cli(path, "show", "web").stdout
    run_cli(path, "exec", "web", "--", CTL, "nonce", "set", "x")
    assert "is back at epoch" in run_cli(path, "rollback", "web@one").stdout
    graph = run_cli(path, "log", "--graph").stdout
    assert "web*" in graph
    assert "before rollback to" in graph
    forked = run_cli(path, "fork", "web@one", "trial", "--count", "2").stdout
    assert forked.count("forked from epoch") == 2
    kept = next(epoch for epoch in store.epochs() if epoch.message.startswith("before rollback"))
    differ = cli_json(path, "diff", "web@one", kept.id[:12])
    assert isinstance(differ, dict)
    assert differ["memory"]["pages"] > 0
    picture = tmp_path / "screen.png"
    run_cli(path, "screenshot", "web", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    run_cli(path, "tag", "web@one", "two")
    run_cli(path, "tag", "web@one", "two", "--delete")
    assert "1 deleted" in run_cli(path, "delete", kept.id).stdout
    assert "no damage" in run_cli(path, "verify").stdout
    run_cli(path, "gc")
    run_cli(path, "stop", "trial-1")
    assert cli_json(path, "status", "trial-1")["state"] == "off"  # type: ignore[index]
    wait_witness(web, 0)


def test_exec_passes_output_and_status_on(store: Store, boot: Callable[..., Machine]) -> None:
    boot()
    path = store.files.path
    done = run_cli(path, "exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 3",
                   check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    found = subprocess.run([sys.executable, "-m", "epochs", "--store", str(path), "--json", "exec",
                            "--stdin", "web", "cat"], input="typed", capture_output=True,
                           text=True, check=True)
    assert json.loads(found.stdout)["stdout"] == "typed"
    late = run_cli(path, "exec", "--timeout", "0.3", "web", "sleep", "600", check=False)
    assert late.returncode == 5
    assert "has not ended" in late.stderr


def test_the_console_attaches_and_its_log_survives_a_rollback(
        store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    epoch = web.create()
    with subprocess.Popen([sys.executable, "-m", "epochs", "--store", str(store.files.path),
                           "console", "web"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as console:
        assert console.stdin is not None
        assert console.stdout is not None
        console.stdin.write(b"echo con$((40 + 2))sole\n")
        console.stdin.flush()
        seen = b""
        while b"con42sole" not in seen:
            piece = console.stdout.read1(4096)  # type: ignore[attr-defined]
            assert piece, seen
            seen += piece
        console.stdin.close()
    web.rollback(epoch, keep=False)
    assert "con42sole" in run_cli(store.files.path, "console", "web", "--log").stdout


def test_a_machine_that_died_is_reported_and_started_again(
        store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    epoch = web.create()
    instance = store.files.catalog.instance_of(web.record.id)
    assert instance is not None
    instance.process.kill()
    assert web.status()["state"] == "died"
    refused = run_cli(store.files.path, "create", "web", check=False)
    assert refused.returncode == 4
    assert "has died" in refused.stderr
    web.rollback(epoch, keep=False)
    wait_witness(web, 0)
    instance = store.files.catalog.instance_of(web.record.id)
    assert instance is not None
    instance.process.kill()
    assert web.start() == "started"
    assert web.status()["state"] == "running"


def test_a_guest_that_powers_itself_off_is_off(store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    instance = store.files.catalog.instance_of(web.record.id)
    assert instance is not None
    with open_monitor(store.files, instance) as monitor:
        events = monitor.listen("SHUTDOWN")
        with Agent(store.files.instance_dir(instance.id) / AGENT_SOCKET, 30.0) as guest:
            guest.shutdown()
        monitor.wait_event(events, 60)
        monitor.forget(events)
    found = web.status()
    assert (found["state"], found["detail"]) == ("off", "the guest powered itself off")
    assert web.start() == "started"
