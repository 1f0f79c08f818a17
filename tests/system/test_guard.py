"""`epochs guard`: kept on success, undone on failure, in time, after a check, or by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Epoch, Machine, Store
from epochs.retention import Policy
from tests.commands import run_cli
from tests.json_fields import rows, top_level

from .guest import CTL, ctl, wait_witness

pytestmark = pytest.mark.guest
EPOCHS = f"{sys.executable} -m epochs"
SPOIL = f"{EPOCHS} exec $EPOCHS_MACHINE -- {CTL} nonce set spoilt"


@pytest.fixture
def any_qemu() -> str:
    """One will do: nothing here depends on which it is."""
    return "7.2"


@pytest.fixture
def web(boot: Callable[..., Machine]) -> Machine:
    machine = boot()
    ctl(machine, "nonce", "set", "good")
    return machine


def guard(store: Store, *words: str) -> subprocess.CompletedProcess[str]:
    return run_cli(store.files.path, "guard", *words, check=False)


def test_on_this_host(store: Store, web: Machine) -> None:
    done = guard(store, "web", "--", "sh", "-c", f"{SPOIL}; exit 7")
    assert done.returncode == 7, done.stderr
    assert "the command ended with 7: 'web' is back at epoch" in done.stderr
    assert ctl(web, "nonce", "get") == "good"

    done = guard(store, "--check", "false", "web", "--", "sh", "-c", SPOIL)
    assert (done.returncode, ctl(web, "nonce", "get")) == (1, "good"), done.stderr

    done = guard(store, "--timeout", "4", "web", "--", "sh", "-c", f"{SPOIL}; sleep 1000")
    assert (done.returncode, ctl(web, "nonce", "get")) == (124, "good"), done.stderr
    assert "it took more than 4 s" in done.stderr

    done = guard(store, "web", "--", "sh", "-c", "kill -9 $$")
    assert (done.returncode, ctl(web, "nonce", "get")) == (137, "good"), done.stderr

    # The document stands alone, with the fields of docs/json.md.
    shown = run_cli(store.files.path, "--json", "guard", "--keep-failed", "web", "--", "sh", "-c",
                    f"echo words; {SPOIL}; exit 3", check=False)
    document = json.loads(shown.stdout)
    assert set(document) == top_level(rows()["guard"])
    assert "words" in shown.stderr
    with store.fork(document["failed"], "failed") as failed:
        assert ctl(failed, "nonce", "get") == "spoilt"

    # A guest that died cannot be kept; it goes back all the same.
    done = guard(store, "--keep-failed", "web", "--", "sh", "-c",
                 f"{SPOIL}; {EPOCHS} stop --kill $EPOCHS_MACHINE; exit 9")
    assert (done.returncode, ctl(web, "nonce", "get")) == (9, "good"), done.stderr
    assert "its state could not be kept: machine 'web' is off" in done.stderr
    # Nor does it matter why: here making the second epoch of the two breaks.
    spoils = f"{SPOIL}; EPOCHS_FAULT= {EPOCHS} pause $EPOCHS_MACHINE; exit 9"
    with pytest.MonkeyPatch.context() as patch:
        real = Machine.create

        def create(machine: Machine, message: str = "") -> Epoch:
            if message.startswith("failed"):
                raise OSError(28, "No space left on device")
            return real(machine, message)

        patch.setattr(Machine, "create", create)
        patch.setenv("EPOCHS_STORE", str(store.files.path))
        told = web.guard(["sh", "-c", spoils], keep_failed=True, stdout=2)
    assert (told.status, told.failed) == (9, None)
    assert "could not be kept: [Errno 28]" in str(told.undone)
    assert web.status()["state"] == "running", "not paused as the command left it"
    assert ctl(web, "nonce", "get") == "good"

    # What it may go back to is not pruned or deleted meanwhile.
    words = (f"{EPOCHS} create $EPOCHS_MACHINE && {EPOCHS} prune $EPOCHS_MACHINE --keep-last 1 && "
             f"! {EPOCHS} delete $EPOCHS_MACHINE~1 && {SPOIL} && exit 6")
    done = guard(store, "web", "--", "sh", "-c", words)
    assert (done.returncode, ctl(web, "nonce", "get")) == (6, "good"), done.stderr
    assert "is what a guarded command goes back to" in done.stderr
    assert web.head is not None
    store.delete([web.head])  # which can be, afterwards

    # Kept: this is also the control of all those above.
    done = guard(store, "--check", "true", "web", "--", "sh", "-c", f"{SPOIL}; echo out")
    assert (done.returncode, ctl(web, "nonce", "get")) == (0, "spoilt"), done.stderr
    assert done.stdout.endswith("out\n")
    way_back = store.epochs("web")[-1]
    assert way_back.message.startswith("before sh -c")
    web.rollback(way_back, keep=False)
    assert ctl(web, "nonce", "get") == "good"

    before = len(store.epochs())
    for words, reason in ((("web", "--", "no-such-command"), "there is no command"),
                          (("--timeout", "0", "web", "--", "true"), "more than 0 seconds")):
        done = guard(store, *words)
        assert done.returncode == 2
        assert reason in done.stderr
    web.pause()
    assert guard(store, "--in-guest", "web", "--", "true").returncode == 4
    web.start()
    assert len(store.epochs()) == before, "nothing was begun"
    wait_witness(web, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop(store: Store, web: Machine, tmp_path: Path, number: signal.Signals) -> None:
    """The command ends, and all that it started, and what it did is undone."""
    # A shell's background jobs ignore SIGINT, so the sleep has to be ended otherwise.
    script = (f"{SPOIL}; trap 'echo heard; exit 1' {number.name[3:]}; sleep 1000 & echo $!; "
              "wait")
    process = subprocess.Popen(
        [sys.executable, "-m", "epochs", "guard", "web", "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "EPOCHS_STORE": str(store.files.path)})
    assert process.stdout is not None
    line = ""
    while not line.strip().isdigit():
        line = process.stdout.readline()
        assert line, process.communicate()
    process.send_signal(number)
    rest, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "heard" in rest, "the command was told the same"
    assert f"{number.name} came: 'web' is back" in said
    assert ctl(web, "nonce", "get") == "good"
    left = Path(f"/proc/{line.strip()}/stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"


def test_in_the_guest(store: Store, web: Machine) -> None:
    script = f"{CTL} nonce set spoilt >/dev/null; echo out; echo err >&2; exit 5"
    done = guard(store, "--in-guest", "web", "--", "sh", "-c", script)
    assert (done.returncode, ctl(web, "nonce", "get")) == (5, "good"), done.stderr
    assert done.stdout == "out\n"
    assert done.stderr.startswith("err\n")
    done = guard(store, "--in-guest", "--check", f"{CTL} nonce get | grep good", "web", "--",
                 "sh", "-c", f"{CTL} nonce set spoilt")
    assert (done.returncode, ctl(web, "nonce", "get")) == (1, "good"), done.stderr
    done = guard(store, "--in-guest", "--timeout", "3", "web", "--", "sh", "-c",
                 f"{CTL} nonce set spoilt; sleep 1000")
    assert (done.returncode, ctl(web, "nonce", "get")) == (124, "good"), done.stderr
    assert web.exec(["sh", "-c", "pgrep -f 'sleep 1000'"]).status != 0, "undone with the rest"
    done = guard(store, "--in-guest", "web", "--", "sh", "-c", f"{CTL} nonce set kept")
    assert (done.returncode, ctl(web, "nonce", "get")) == (0, "kept"), done.stderr


def test_prune(store: Store, web: Machine) -> None:
    """What no rule keeps goes, the rest is intact, and what machines are at is not asked for."""
    made = [web.create(f"{number}", tags=["keep-me"] if number == 1 else []) for number in range(6)]
    ctl(web, "nonce", "set", "later")
    fork = store.fork(made[2], "trial")
    dry = run_cli(store.files.path, "prune", "web", "--keep-last", "2", "--keep-tag", "keep-*",
                  "--dry-run").stdout
    assert "2 would be deleted" in dry
    assert len(store.epochs()) == 6
    shown = json.loads(run_cli(store.files.path, "--json", "prune", "web", "--keep-last", "2",
                               "--keep-tag", "keep-*").stdout)
    assert set(shown) == top_level(rows()["prune"])
    assert {epoch.id for epoch in store.epochs()} == {made[n].id for n in (1, 2, 4, 5)}
    assert set(shown["deleted"]) == {made[n].id for n in (0, 3)}
    assert store.verify() == []
    web.rollback(made[1], keep=False)
    assert ctl(web, "nonce", "get") == "good"
    wait_witness(fork, 0)

    # A bound on space: the oldest go, but never what a machine is at or what is tagged.
    before = {epoch.id for epoch in store.epochs()}
    said = run_cli(store.files.path, "prune", "web", "--max-store", "1M", "-n").stdout
    assert said.count("may go for space") == 2
    assert {epoch.id for epoch in store.epochs()} == before
    web.prune(Policy(last=3, tags=("keep-*",)), max_store=1)
    assert {epoch.id for epoch in store.epochs()} == before
    done = web.prune(Policy(), max_store=1)
    assert {epoch.id for epoch in store.epochs()} == {made[1].id, made[2].id}
    assert done.used > 1
    assert done.freed > 0
    assert web.prune(Policy(), max_store=done.used).deleted == []
    wait_witness(web, 0)
    assert run_cli(store.files.path, "prune", "web", check=False).returncode == 2
