"""examples/debian-upgrade: upgrades of a Debian guest under `epochs guard`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from epochs import Machine, Store
from tests.commands import run_cli

from .conftest import required
from .guest import debian_spec, wait_console

pytestmark = [pytest.mark.guest, pytest.mark.slow]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "debian-upgrade"
COUNT = 'runuser -u postgres -- psql -qAtX -d demo -c "select count(note) from inventory"'
ROWS = "5000"


@pytest.fixture
def any_qemu() -> str:
    """One will do: nothing here depends on which it is."""
    return "7.2"


@pytest.fixture
def web(store: Store, any_qemu: str) -> Iterator[Machine]:
    web = store.add("web", debian_spec(required("EPOCHS_DEBIAN")))
    web.start()
    web.wait_agent(180)
    inside(web, "until pg_isready -q; do sleep 0.2; done")
    yield web


def inside(machine: Machine, line: str) -> str:
    done = machine.exec(["sh", "-c", line], timeout=180)
    assert done.status == 0, (line, done.stdout, done.stderr)
    return done.stdout.decode().strip()


def package(machine: Machine, version: str, kind: str) -> str:
    script = (EXAMPLE / "make-package").read_bytes()
    done = machine.exec(["sh", "-s", version, kind], stdin=script, timeout=180)
    assert done.status == 0, done.stderr
    return f"/root/inventory_{version}_all.deb"


def installed(machine: Machine) -> str:
    return inside(machine, "dpkg-query -W -f '${Version} ${db:Status-Status}' inventory")


@pytest.mark.timeout(900)
def test_upgrades(store: Store, web: Machine) -> None:
    path = store.files.path
    old = package(web, "1.0", "good")
    kept = run_cli(path, "guard", "--in-guest", "web", "--", "dpkg", "-i", old)
    assert "keeps what was done" in kept.stderr
    assert "Setting up inventory (1.0)" in kept.stdout
    good = (installed(web), inside(web, COUNT))
    assert good == ("1.0 installed", ROWS)

    bad = package(web, "2.0", "breaks")
    done = run_cli(path, "guard", "--in-guest", "--keep-failed", "web", "--", "dpkg", "-i", bad,
                   check=False)
    assert done.returncode == 1, "dpkg's own"
    assert "the command ended with 1: 'web' is back at epoch" in done.stderr
    assert (installed(web), inside(web, COUNT)) == good
    # The control: what would be left without a guard.
    failed = next(epoch for epoch in store.epochs() if epoch.message.startswith("failed: "))
    with store.fork(failed, "broken") as broken:
        assert installed(broken) == "2.0 half-configured"
        assert broken.exec(["sh", "-c", COUNT], timeout=60).status != 0, "the column is gone"

    lies = package(web, "2.1", "lies")
    done = run_cli(path, "guard", "--in-guest", "--check", f"{COUNT} | grep -x {ROWS}", "web",
                   "--", "dpkg", "-i", lies, check=False)
    assert done.returncode == 1
    assert "the check ended with 1" in done.stderr
    assert (installed(web), inside(web, COUNT)) == good

    hangs = package(web, "2.2", "hangs")
    since = web.console_log.stat().st_size
    guard = subprocess.Popen(
        [sys.executable, "-m", "epochs", "--store", str(path), "guard", "--in-guest", "web", "--",
         "dpkg", "-i", hangs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_console(web, "begun", since=since, limit=120)
    guard.send_signal(signal.SIGINT)
    _, said = guard.communicate(timeout=120)
    assert guard.returncode == 128 + signal.SIGINT, said
    assert "SIGINT came: 'web' is back at epoch" in said
    assert (installed(web), inside(web, COUNT)) == good
    assert inside(web, "pgrep -c dpkg || true") == "0"

    better = package(web, "3.0", "good")
    run_cli(path, "guard", "--in-guest", "web", "--", "dpkg", "-i", better)
    assert (installed(web), inside(web, COUNT)) == ("3.0 installed", ROWS)
    assert store.verify() == []
