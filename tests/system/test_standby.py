"""Standby instances: what is taken is what was sealed, and once; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Epoch, Machine, Store
from epochs.errors import NotFound, Refused
from epochs.points import POINTS
from epochs.processes import ProcessId
from epochs.protocol import standby
from epochs.qemu import monitor
from tests.commands import cli_json, run_cli

from .guest import (
    Artefacts,
    assert_no_lock_astray,
    assert_tidy,
    check_disks,
    ctl,
    processes_in,
    wait_fillers,
    wait_witness,
)

pytestmark = [pytest.mark.guest]
Boot = Callable[..., Machine]
RESEEDING = 90.0  # seconds; Linux reseeds once a minute


def prepared(boot: Boot) -> tuple[Machine, Epoch, int]:
    """A running machine with an epoch; nonce "sealed" in it and "present" now."""
    web = boot()
    ctl(web, "nonce", "set", "sealed")
    epoch = web.create(tags=["ready"])
    ctl(web, "nonce", "set", "present")
    return web, epoch, wait_witness(web, 0)


def ready(store: Store) -> list[int]:
    return [one["ready"] for one in store.standbys()]


def pids(store: Store) -> set[int]:
    """Of the standbys."""
    catalog = store.files.catalog
    found = [catalog.instance_of(one.machine) for one in catalog.standbys()]
    return {one.process.pid for one in found if one is not None}


def end(store: Store, pid: int) -> None:
    ProcessId.of(pid).kill()


def test_rollback(store: Store, boot: Boot, tmp_path: Path) -> None:
    """Three times, the standby being replaced in the background; with fix-up and without."""
    web, epoch, count = prepared(boot)
    for fixup in (False, True):
        store.standby(epoch, 1, machine="web", fixup=fixup)
        for _ in range(2):
            store.fill_standbys()
            assert [m.name for m in store.machines()] == ["web"], "nobody sees a standby"
            [waiting] = [pid for pid in pids(store)]
            done = web.rollback(epoch, keep=False, fixup=fixup)
            assert "take" in done["steps"], "nothing was launched"
            assert web.status()["pid"] == waiting
            assert ctl(web, "nonce", "get") == "sealed"
            wait_witness(web, count)
            ctl(web, "nonce", "set", "again")
            wait_fillers(store)
            assert ready(store) == [1]
        store.standby(epoch, 0, machine="web", fixup=fixup)
        assert pids(store) == set()
    done = web.rollback(epoch, keep=False)
    assert "spawn" in done["steps"], "the control: without a standby one is launched"
    after = web.create()
    check_disks(store, after, tmp_path)
    assert store.verify() == []
    assert "TINY READY" in web.console_log.read_text()


def drawn_apart(forks: list[Machine]) -> None:
    """Wait until all draw different random numbers: what the host mixed in is used from the
    kernel's next reseeding on, as these guests cannot ask for one."""
    deadline = time.monotonic() + RESEEDING
    while len({fork.exec(["/bin/busybox", "od", "-An", "-N8", "-tx1", "/dev/urandom"]).stdout
               for fork in forks}) < len(forks):
        assert time.monotonic() < deadline, "the same random numbers in two forks"
        time.sleep(1)


def test_forks(store: Store, boot: Boot) -> None:
    """Two standbys and three forks at once: two are taken, one is launched. Each is alone."""
    web, epoch, count = prepared(boot)
    store.standby(epoch, 2)
    waiting = pids(store)
    assert len(waiting) == 2
    forks = store.fork_many(epoch, ["one", "two", "three"])
    assert len(waiting & {fork.status()["pid"] for fork in forks}) == 2
    for fork in forks:
        assert ctl(fork, "nonce", "get") == "sealed"
        ctl(fork, "nonce", "set", fork.name)
        wait_witness(fork, count)
    assert [ctl(fork, "nonce", "get") for fork in forks] == ["one", "two", "three"]
    assert ctl(web, "nonce", "get") == "present"
    drawn_apart(forks)
    child = forks[0].create()
    with store.fork(child, "four") as four:
        assert ctl(four, "nonce", "get") == "one"
    for fork in forks:
        fork.remove(force=True, with_epochs=True)
    wait_fillers(store)
    assert ready(store) == [2]
    assert_tidy(store)


def test_goes_with_its_epoch_and_its_machine(store: Store, boot: Boot) -> None:
    web, epoch, _ = prepared(boot)
    second = web.create()
    store.standby(epoch, 1)
    store.standby(second, 1, machine="web")
    assert len(pids(store)) == 2
    store.delete([epoch])
    assert [(one["epoch"], one["machine"]) for one in store.standbys()] == [(second.id, "web")]
    assert len(pids(store)) == 1
    assert_tidy(store)
    web.stop(kill=True)
    assert pids(store) == set()
    assert processes_in(store.files.path) == []
    web.rollback(second, keep=False)  # and is there again when the machine runs
    wait_fillers(store)
    assert ready(store) == [1]
    store.standby(second, 1)
    web.remove(force=True)
    assert [(one["machine"], one["ready"]) for one in store.standbys()] == [(None, 1)]
    with store.fork(second, "late") as late:
        assert ctl(late, "nonce", "get") == "present"
    store.delete([second])
    wait_fillers(store)
    assert store.standbys() == []
    assert processes_in(store.files.path) == []


def test_reads_right_when_layers_below_were_merged(store: Store, boot: Boot,
                                                   tmp_path: Path) -> None:
    """Epochs below the standby's are deleted and merged, and epochs are made beside it."""
    web, _, _ = prepared(boot)
    for _ in range(3):
        wait_witness(web, wait_witness(web, 0) + 20)
        web.create()
    ctl(web, "nonce", "set", "middle")
    middle = web.create()
    store.standby(middle, 1, machine="web", fixup=False)
    for _ in range(9):  # the chain policy merges
        wait_witness(web, wait_witness(web, 0) + 20)
        last = web.create()
    store.delete([one for one in store.epochs() if one.id not in (middle.id, last.id)])
    assert ready(store) == [1]
    done = web.rollback(middle, keep=False, fixup=False)
    assert "take" in done["steps"]
    assert ctl(web, "nonce", "get") == "middle"
    wait_witness(web, wait_witness(web, 0) + 20)
    after = web.create()
    assert store.verify() == []
    check_disks(store, after, tmp_path)
    web.stop()
    web.start()
    web.wait_agent()
    wait_witness(web, 0)


def test_one_that_died_is_not_missed(store: Store, boot: Boot) -> None:
    web, epoch, count = prepared(boot)
    store.standby(epoch, 1, machine="web")
    end(store, pids(store).pop())
    run_cli(store.files.path, "recover")
    assert store.files.catalog.standbys() == [], "whatever comes next drops it"
    launched_instead(store, web, epoch, count)


def launched_instead(store: Store, web: Machine, epoch: Epoch, count: int) -> None:
    """A rollback does not miss the standby, and another one is made."""
    done = web.rollback(epoch, keep=False)
    assert "spawn" in done["steps"], "launched"
    assert ctl(web, "nonce", "get") == "sealed"
    wait_witness(web, count)
    wait_fillers(store)
    assert ready(store) == [1]
    assert_tidy(store)


def test_one_that_hangs_is_not_waited_for(store: Store, boot: Boot,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    web, epoch, count = prepared(boot)
    store.standby(epoch, 1, machine="web")
    monkeypatch.setattr(monitor, "ANSWER_LIMIT", 2.0)
    [hung] = pids(store)
    os.kill(hung, signal.SIGSTOP)
    launched_instead(store, web, epoch, count)
    assert hung not in pids(store)


def test_what_cannot_be_is_refused(store: Store, boot: Boot, tiny: Artefacts) -> None:
    _, epoch, _ = prepared(boot)
    store.add("other", tiny.spec(disks=("a",)))
    with pytest.raises(Refused, match="has disks a, b, machine 'other' has a"):
        store.standby(epoch, 1, machine="other")
    with pytest.raises(NotFound):
        store.standby(epoch, 1, machine="nobody")
    with pytest.raises(Refused, match="0 to 64"):
        store.standby(epoch, 65)
    assert store.standbys() == []


def test_two_want_the_same_one(store: Store, boot: Boot) -> None:
    _, epoch, count = prepared(boot)
    store.standby(epoch, 1)
    command = [sys.executable, "-m", "epochs", "--store", str(store.files.path), "fork", epoch.id]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in ("one", "two")]
    for one in both:
        _, said = one.communicate(timeout=120)
        assert one.returncode == 0, said
    for name in ("one", "two"):
        assert ctl(store.machine(name), "nonce", "get") == "sealed"
        wait_witness(store.machine(name), count)
    wait_fillers(store)
    assert ready(store) == [1]
    assert_tidy(store)


def test_memory_is_bounded(store: Store, boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    web, epoch, _ = prepared(boot)
    with monkeypatch.context() as bound:
        bound.setattr(standby, "SHARE", 2**20)  # of any host one standby has more
        store.standby(epoch, 5)
    [one] = store.standbys()
    assert one["ready"] == 1
    assert "as much as they may" in one["trouble"]
    assert one["memory"] > 2**20
    store.fill_standbys()  # the control
    [one] = store.standbys()
    assert (one["ready"], one["trouble"]) == (5, None)
    assert web.status()["state"] == "running"


def test_command_line(store: Store, boot: Boot) -> None:
    web, epoch, _ = prepared(boot)
    path = store.files.path
    said = run_cli(path, "standby", "web@ready", "--for", "web").stdout
    assert f"epoch {epoch.id[:12]}: 1 of 1 ready for rollbacks of 'web'" in said
    assert run_cli(path, "standby").stdout.rpartition(",")[0] == said.rpartition(",")[0]
    assert ".standby" not in run_cli(path, "list").stdout
    done = cli_json(path, "rollback", "web", "web@ready", "--discard")
    assert "take" in done["steps"]  # type: ignore[index,call-overload]
    assert ctl(web, "nonce", "get") == "sealed"
    wait_fillers(store)
    [hidden] = [one.machine for one in store.files.catalog.standbys()]
    refused = run_cli(path, "remove", "--force", f".standby-{hidden}", check=False)
    assert refused.returncode == 3, refused.stderr
    assert run_cli(path, "standby", "web@ready", "--for", "nobody", check=False).returncode == 3
    assert run_cli(path, "standby", "web@ready", "--count", "65", check=False).returncode != 0
    run_cli(path, "standby", "web@ready", "--for", "web", "--count", "0")
    assert run_cli(path, "standby").stdout == "no standby instances\n"
    with pytest.raises(NotFound):
        store.standby("web@nothing", 1)


def killed(store: Store, point: str, *command: str) -> None:
    done = run_cli(store.files.path, *command, fault=f"{point}:kill", check=False)
    assert done.returncode == -signal.SIGKILL, (point, done.returncode, done.stderr)
    run_cli(store.files.path, "recover")
    assert cli_json(store.files.path, "recover")["recovered"] == []  # type: ignore[index,call-overload]
    assert_tidy(store)
    assert_no_lock_astray(store)


@pytest.mark.timeout(300)
def test_a_failure_once_forks_are_there(store: Store, boot: Boot) -> None:
    """They are finished at once, those that were standbys and the one that was launched."""
    _, epoch, count = prepared(boot)
    for point in ("fork.committed", "fork.resumed"):
        store.standby(epoch, 2)
        done = run_cli(store.files.path, "fork", "web@ready", "trial", "--count", "3",
                       fault=f"{point}:fail", check=False)
        assert done.returncode == 5, done.stderr
        assert "undoing it did not work" not in done.stderr
        for number in (1, 2, 3):
            trial = store.machine(f"trial-{number}")
            assert ctl(trial, "nonce", "get") == "sealed", point
            wait_witness(trial, count)
            trial.remove(force=True)
    store.standby(epoch, 0)
    assert_tidy(store)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills(store: Store, boot: Boot) -> None:
    """A command that makes, takes or ends a standby is killed at each of its points."""
    web, epoch, count = prepared(boot)
    made = ("standby.intended", *POINTS["launch"], "standby.launched", "standby.recorded")
    for point in made:
        killed(store, point, "standby", "web@ready", "--for", "web", "--no-fixup")
        run_cli(store.files.path, "standby", "web@ready", "--for", "web", "--no-fixup")
        assert ready(store) == [1], point
        killed(store, "standby.ended", "standby", "web@ready", "--for", "web", "--no-fixup",
               "--count", "0")
        assert pids(store) == set(), point
    for point in POINTS["rollback"]:
        store.standby(epoch, 1, machine="web", fixup=False)
        killed(store, point, "rollback", "web", "web@ready", "--discard", "--no-fixup")
        switched = point not in ("rollback.intended", "rollback.prepared")
        assert ready(store) == [0 if switched else 1], point
        assert ctl(web, "nonce", "get") == ("sealed" if switched else "present"), point
        wait_witness(web, 0)
        ctl(web, "nonce", "set", "present")
    store.standby(epoch, 0, machine="web", fixup=False)
    for point in POINTS["fork"]:
        store.standby(epoch, 1)
        killed(store, point, "fork", "web@ready", "trial")
        switched = point in ("fork.committed", "fork.resumed")
        assert ready(store) == [0 if switched else 1], point
        if switched:
            trial = store.machine("trial")
            assert trial.console_log.exists(), point
            assert (store.files.path / "locks" / f"machine-{trial.record.id}").exists(), point
            assert ctl(trial, "nonce", "get") == "sealed", point
            wait_witness(trial, count)
            trial.remove(force=True)
        assert [machine.name for machine in store.machines()] == ["web"], point
    assert store.verify() == []
