"""The pytest plugin, in a pytest of its own over a real guest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.pytest_plugin import _process
from tests.commands import run_cli

from .guest import ctl, wait_fillers, wait_witness

pytestmark = pytest.mark.guest

SUITE = """
    import pytest
    from tests.system.guest import ctl, wait_witness

    pytestmark = pytest.mark.epoch("web@ready")

    @pytest.mark.parametrize("number", range(6))
    def test_each_begins_anew(epochs_machine, number):
        assert ctl(epochs_machine, "nonce", "get") == "ready"
        ctl(epochs_machine, "nonce", "set", f"spoilt by {number}")
        epochs_machine.create("made by a test")
        wait_witness(epochs_machine, 0)

    def test_a_fork_beside_it(epochs_machine, epochs_fork):
        ctl(epochs_fork, "nonce", "set", "another")
        assert ctl(epochs_machine, "nonce", "get") == "ready"
        assert epochs_machine.name != epochs_fork.name

    def test_stopped(epochs_machine):
        epochs_machine.stop(kill=True)

    def test_after_it(epochs_machine):
        assert ctl(epochs_machine, "nonce", "get") == "ready"

    def test_paused(epochs_machine):
        epochs_machine.pause()

    def test_after_a_pause(epochs_machine):
        assert ctl(epochs_machine, "nonce", "get") == "ready"

    def test_removed(epochs_machine):
        epochs_machine.remove(force=True)

    def test_after_that(epochs_machine):
        assert ctl(epochs_machine, "nonce", "get") == "ready"

    @pytest.mark.epoch("web@later")
    def test_of_another_epoch(epochs_machine):
        assert ctl(epochs_machine, "nonce", "get") == "later"
"""
FAILS = """
    import pytest
    from tests.system.guest import ctl

    @pytest.mark.epoch("web@ready")
    def test_fails(epochs_machine):
        ctl(epochs_machine, "nonce", "set", "at the failure")
        assert False, "on purpose"

    def test_goes_by_the_setting(epochs_machine):
        assert ctl(epochs_machine, "nonce", "get") == "later"
"""


@pytest.fixture
def any_qemu() -> str:
    """One will do: nothing here depends on which it is."""
    return "7.2"


@pytest.fixture
def web(store: Store, boot: Callable[..., Machine]) -> Machine:
    machine = boot()
    for word in ("ready", "later"):
        ctl(machine, "nonce", "set", word)
        machine.create(tags=[word])
    ctl(machine, "nonce", "set", "mine")
    return machine


# Options with "=", as pytest looks for its configuration before it knows those of plugins.
def run(place: Path, suite: str, *options: str) -> subprocess.CompletedProcess[str]:
    place.mkdir(exist_ok=True)
    (place / "test_guest.py").write_text(textwrap.dedent(suite))
    (place / "pytest.ini").write_text("[pytest]\nepochs_epoch = web@later\n")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v",
                           "--rootdir", str(place), *options, "test_guest.py"], cwd=place,
                          env=environment, capture_output=True, text=True, check=False,
                          timeout=300)


def alone(store: Store, machine: Machine, epochs: int) -> None:
    """Nothing is left of the other pytest, and the user's machine never noticed."""
    assert [one.name for one in store.machines()] == [machine.name]
    assert len(store.epochs()) == epochs
    assert ctl(machine, "nonce", "get") == "mine"
    wait_witness(machine, 0)


@pytest.mark.parametrize("options", [(), ("-n", "2"), ("--epochs-standby=1",)],
                         ids=["one process", "two workers", "standby"])
def test_resets(store: Store, web: Machine, tmp_path: Path, options: tuple[str, ...]) -> None:
    report = tmp_path / "times.json"
    done = run(tmp_path / "suite", SUITE, f"--epochs-store={store.files.path}",
               f"--epochs-report={report}", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout
    times = json.loads(report.read_text())
    forks, resets = len(times["forks"]), len(times["resets"])
    assert re.search(rf"{resets} resets: median \d+ ms, 99 % within \d+ ms", done.stdout)
    if "-n" not in options:
        assert (forks, resets) == (4, 11), "one machine for each epoch, one thrown away, one again"
    else:
        assert forks + resets == 15
        assert forks in range(4, 7)
    alone(store, web, 2)
    wait_fillers(store)
    assert store.standbys() == []


def test_a_failing_state_is_kept(store: Store, web: Machine, tmp_path: Path) -> None:
    options = (f"--epochs-store={store.files.path}",)
    done = run(tmp_path / "suite", FAILS, *options)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    alone(store, web, 2)
    done = run(tmp_path / "suite", FAILS, "--epochs-keep-failed", *options)
    assert done.returncode == 1
    command = re.search(r"^epochs --store (\S+) (fork [0-9a-f]+ failed)$", done.stdout,
                        re.MULTILINE)
    assert command, done.stdout
    alone(store, web, 3)
    run_cli(Path(command[1]), *command[2].split())
    assert ctl(store.machine("failed"), "nonce", "get") == "at the failure"


def test_what_it_needs_is_said(store: Store, web: Machine, tmp_path: Path) -> None:
    suite = """
        import pytest

        @pytest.mark.epoch("web@nowhere")
        def test_of_no_epoch(epochs_machine):
            pass
    """
    done = run(tmp_path / "suite", suite, f"--epochs-store={store.files.path}")
    assert done.returncode == 1
    assert "machine 'web' has no epoch tagged" in done.stdout
    alone(store, web, 2)


def test_what_a_killed_pytest_left_is_swept(store: Store, web: Machine, tmp_path: Path) -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    ours = f"pytest-{_process(os.getpid())}-1"
    store.fork("web@ready", f"pytest-{ended.pid}-1-1")
    store.fork("web@ready", f"pytest-{os.getpid()}-1-1")  # of one that had our number
    store.fork("web@ready", ours)
    done = run(tmp_path / "suite", FAILS, f"--epochs-store={store.files.path}", "-k", "setting")
    assert done.returncode == 0, done.stdout
    assert {one.name for one in store.machines()} == {"web", ours}
