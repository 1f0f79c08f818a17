"""Killed anywhere: the command gets SIGKILL at every named point, then `recover` and all
invariants. The same points once more with a failure instead of a kill."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Epoch, Machine, Store
from epochs.points import ALL, POINTS
from tests.commands import cli_json, run_cli
from tests.dm.swept import VISITED as IN_POOLS

from .guest import assert_no_lock_astray, assert_tidy, check_disks, ctl, wait_console, wait_witness

pytestmark = [pytest.mark.guest, pytest.mark.slow]
Boot = Callable[..., Machine]

CREATE = [*POINTS["create"]]
LAUNCH = [*POINTS["launch"]]


def prepared(boot: Boot) -> tuple[Machine, str, int]:
    """A running machine with one epoch, nonce "sealed" in it and "present" now."""
    web = boot()
    ctl(web, "nonce", "set", "sealed")
    first = web.create(tags=["first"])
    ctl(web, "nonce", "set", "present")
    return web, first.id, wait_witness(web, 0)


def struck(store: Store, point: str, action: str, *command: str) -> None:
    """Run a command that is killed (or fails) at a point; it must have got there."""
    done = run_cli(store.files.path, *command, fault=f"{point}:{action}", check=False)
    if action == "kill":
        assert done.returncode == -signal.SIGKILL, (point, done.returncode, done.stderr)
    else:
        assert done.returncode == 5, (point, done.returncode, done.stderr)
        assert "fault injected" in done.stderr


def settled(store: Store, point: str, again: tuple[str, ...] = ()) -> None:
    """`recover` settles it, a second one finds nothing, and nothing is left astray. ``again``:
    points at which recovery itself is killed first."""
    for second in again:
        struck(store, second, "kill", "recover")
    run_cli(store.files.path, "recover")
    assert cli_json(store.files.path, "recover")["recovered"] == []  # type: ignore[index]
    assert_tidy(store)
    assert_no_lock_astray(store)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", ["kill", "fail"])
def test_create(store: Store, boot: Boot, tmp_path: Path, action: str) -> None:
    web, _, count = prepared(boot)
    for point in CREATE:
        before = {epoch.id for epoch in store.epochs()}
        struck(store, point, action, "create", "web")
        settled(store, point)
        made = {epoch.id for epoch in store.epochs()} - before
        assert len(made) == (1 if point == "create.committed" else 0), point
        assert web.status()["state"] == "running", point
        assert ctl(web, "nonce", "get") == "present", point
        count = wait_witness(web, count)
        after = web.create(f"after {point}")
        assert store.verify([after]) == [], point
        check_disks(store, after, tmp_path)
        with store.fork(after, "probe") as probe:
            assert ctl(probe, "nonce", "get") == "present", point
            wait_witness(probe, count)
    assert store.verify() == []


@pytest.mark.timeout(1800)
def test_recovery_that_is_killed_too(store: Store, boot: Boot, tmp_path: Path) -> None:
    """A create killed after its freeze, then `recover` at each of its own points; a rollback
    before and after its switch; then the machine goes on, is rolled back and boots."""
    web, first, _ = prepared(boot)
    for point in ("create.paused", "create.disks-frozen", "create.disks-sealed"):
        for hypervisor_too in (False, True):
            struck(store, point, "kill", "create", "web")
            if hypervisor_too:
                record = store.files.catalog.instance_of(web.record.id)
                assert record is not None
                record.process.kill()
            settled(store, point, POINTS["undo-create"])
            if hypervisor_too:
                assert web.status()["state"] == "died"
                said = web.console_log.stat().st_size
                web.start()
                wait_console(web, "TINY READY", since=said)
                web.wait_agent()
                ctl(web, "nonce", "set", "present")
            assert ctl(web, "nonce", "get") == "present", point
            assert wait_witness(web, 0) > 0, point
    for point in ("rollback.prepared", "rollback.switched"):
        struck(store, point, "kill", "rollback", "web", first, "--discard")
        settled(store, point, ("undo-switch.processes-gone",) if point == "rollback.switched"
                else ("undo-switch.files-gone",))
        assert web.status()["state"] == "running", point
        wait_witness(web, 0)
    assert store.verify() == []
    check_disks(store, web.create(), tmp_path)
    wait_witness(web, 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", ["kill", "fail"])
def test_rollback(store: Store, boot: Boot, action: str) -> None:
    web, first, count = prepared(boot)
    for point in ("rollback.intended", *LAUNCH, *POINTS["rollback"][1:]):
        struck(store, point, action, "rollback", "web", "web@first", "--discard")
        settled(store, point)
        switched = point in ("rollback.switched", "rollback.old-gone", "rollback.taken-over",
                             "rollback.resumed")
        assert web.status()["state"] == "running", point
        assert ctl(web, "nonce", "get") == ("sealed" if switched else "present"), point
        wait_witness(web, 0)
        ctl(web, "nonce", "set", "present")
        if not switched:
            count = wait_witness(web, count)
    web.rollback(first, keep=False)
    assert ctl(web, "nonce", "get") == "sealed"


@pytest.mark.timeout(1800)
def test_rollback_of_a_paused_machine(store: Store, boot: Boot) -> None:
    """Whether the guest runs is known by the switch, and what recovers keeps to it."""
    web, first, _ = prepared(boot)
    web.pause()
    for point in ("rollback.prepared", "rollback.switched", "rollback.old-gone"):
        struck(store, point, "kill", "rollback", "web", first, "--discard")
        settled(store, point)
        assert web.status()["state"] == "paused", point
    web.start()
    assert ctl(web, "nonce", "get") == "sealed"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", ["kill", "fail"])
def test_fork(store: Store, boot: Boot, action: str) -> None:
    web, _, count = prepared(boot)
    for point in ("fork.intended", *LAUNCH, *POINTS["fork"][1:]):
        struck(store, point, action, "fork", "web@first", "trial")
        settled(store, point)
        names = {machine.name for machine in store.machines()}
        if point in ("fork.committed", "fork.resumed"):
            assert names == {"web", "trial"}, point
            trial = store.machine("trial")
            assert trial.status()["state"] == "running", point
            assert ctl(trial, "nonce", "get") == "sealed", point
            wait_witness(trial, 0)
            trial.remove(force=True)
        else:
            assert names == {"web"}, point
        assert ctl(web, "nonce", "get") == "present", point
        count = wait_witness(web, count)


def struck_in_delete(store: Store, web: Machine, point: str) -> tuple[Epoch, Epoch]:
    """Delete a middle epoch, killed at a point; returns it and its child. Whether a deletion has
    to merge layers depends on what the chain policy merged before, so it may take a few."""
    for _ in range(8):
        middle = web.create()
        wait_witness(web, wait_witness(web, 0) + 20)
        last = web.create()
        done = run_cli(store.files.path, "delete", middle.id, fault=f"{point}:kill", check=False)
        if done.returncode == -signal.SIGKILL:
            return middle, last
        assert done.returncode == 0, (point, done.stderr)
    raise AssertionError(f"no deletion came to {point}")


@pytest.mark.timeout(1800)
def test_delete(store: Store, boot: Boot, tmp_path: Path) -> None:
    """In the middle of the graph, with the layers merged afterwards."""
    web, first, count = prepared(boot)
    for point in (*POINTS["delete"], *POINTS["consolidate"]):
        middle, last = struck_in_delete(store, web, point)
        settled(store, point, POINTS["undo-consolidate"] if point in POINTS["consolidate"][:3]
                else ())
        left = {epoch.id for epoch in store.epochs()}
        assert middle.id not in left, point
        assert {first, last.id} <= left, point
        assert store.verify() == [], point
        check_disks(store, store.epoch(last.id), tmp_path)
        with store.fork(last, "probe") as probe:
            assert ctl(probe, "nonce", "get") == "present", point
            wait_witness(probe, 0)
        count = wait_witness(web, count)


@pytest.mark.timeout(900)
def test_start(store: Store, boot: Boot) -> None:
    web, _, _ = prepared(boot)
    for point in (*POINTS["start"], "launch.spawned", "launch.disks-cloned"):
        web.stop(kill=True)
        struck(store, point, "kill", "start", "web")
        settled(store, point)
        committed = point == "start.committed"
        assert web.status()["state"] == ("running" if committed else "off"), point
        if not committed:
            web.start()
    web.stop(kill=True)
    said = web.console_log.stat().st_size
    web.start()
    wait_console(web, "TINY READY", since=said)
    web.wait_agent()
    wait_witness(web, 0)


def test_rebacking(store: Store, boot: Boot) -> None:
    """A create that merged layers is killed when the guest reads through the merged one: the epoch
    is there, and the guest goes on."""
    web, _, count = prepared(boot)
    for _ in range(8):
        before = {epoch.id for epoch in store.epochs()}
        done = run_cli(store.files.path, "create", "web", fault="rebacking.done:kill", check=False)
        assert len({epoch.id for epoch in store.epochs()} - before) == 1
        if done.returncode == -signal.SIGKILL:
            break
    else:
        pytest.fail("no create merged layers")
    settled(store, "rebacking.done")
    assert web.status()["state"] == "running"
    assert ctl(web, "nonce", "get") == "present"
    wait_witness(web, count)
    assert store.verify() == []


def test_every_point_is_visited_by_a_sweep() -> None:
    """A new point must be added to a sweep above, to those over pools (tests/dm/swept.py), or to
    those over mounts (test_files.py), networks (test_networks.py), standby instances
    (test_standby.py), files of Xen (tests/epochs/test_xen_images.py) and the taking over of
    domains (tests/xen/lab/test_takeover.py)."""
    visited = {*CREATE, *LAUNCH, *POINTS["rollback"], *POINTS["fork"], *POINTS["delete"],
               *POINTS["consolidate"], *POINTS["start"], *POINTS["undo-create"],
               *POINTS["undo-switch"], *POINTS["undo-consolidate"], *IN_POOLS,
               *POINTS["mount"], *POINTS["rebacking"], *POINTS["import-xen"],
               *POINTS["export-xen"], *POINTS["take-over"], *POINTS["network"],
               *POINTS["standby"]}
    assert visited == ALL
