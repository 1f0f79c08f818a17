"""A command on a domain is killed at every named point, with the domain suspended, too; the next
one settles it: the guest goes on, and nothing is left in xenstore, device-mapper or the store."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable

import pytest

from epochs import Machine, Store
from epochs.points import POINTS
from tests.commands import forked
from tests.dm.lab.test_kills import live, settle, strike
from tests.system.guest import wait_witness

PARTS = 12
XEN = ["--disk", "700M", "--disk", "700M"]
Sweep = Callable[[Iterable[str], Iterable[str]], list[str]]
WITHIN = ("create.prepared", "create.disks-frozen", "create.resumed")
pytestmark = pytest.mark.timeout(1400)


def known() -> list[str]:
    """Domains of which xenstore has anything."""
    paths = ("/local/domain", "/vm", "/libxl", "/local/domain/0/backend/vbd")
    return [f"{path}/{name}" for path in paths for name in subprocess.run(
        ["xenstore-list", path], capture_output=True, text=True, check=False).stdout.split()]


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.whole), "pvh"])
def test_create(kind: str, boot: Callable[[str], Machine], store: Store, sweep: Sweep) -> None:
    web = boot(kind)
    first = web.create()
    devices, nodes = live(), known()
    count = wait_witness(web, 0, 60)
    for point in sweep(POINTS["create"], WITHIN if kind == "pvh" else WITHIN[1:2]):
        before = {epoch.id for epoch in store.epochs()}
        strike(store, point, "create", "web")
        settle(store)
        made = {epoch.id for epoch in store.epochs()} - before
        assert len(made) == (point == "create.committed"), point
        count = wait_witness(web, count, 60)
        store.delete(made)
        assert (live(), known()) == (devices, nodes), point
    web.pause()
    strike(store, "create.disks-frozen", "create", "web")
    settle(store)
    assert web.status()["state"] == "paused", "it is left as it was"
    assert store.verify([web.create()]) == []
    assert web.status()["state"] == "paused"
    web.start()
    count = wait_witness(web, count, 60)
    strike(store, "create.disks-frozen", "create", "web")
    for point in POINTS["undo-create"]:
        strike(store, point, "recover")
    settle(store)
    wait_witness(web, count, 60)
    store.delete([epoch for epoch in store.epochs() if epoch.id != first.id])
    assert store.verify([first]) == []


@pytest.mark.whole
def test_killed_at_any_time(boot: Callable[[str], Machine], store: Store,
                            sweep: Sweep) -> None:
    """Between the points, too: while the guest is on its way to suspend itself."""
    web = boot("pvh")
    web.create()
    took = web.create().stats["total_seconds"]  # the first one writes more
    begun = []
    count = wait_witness(web, 0, 60)
    for part in map(int, sweep(map(str, range(PARTS)), ["3", "9"])):
        with forked(store.files.path, "create", "web") as command:
            time.sleep(took * part / PARTS)  # the moment is the point
            command.kill()
            command.ended()
            begun.append(store.files.catalog.journal() != [])
        settle(store)
        assert web.status()["state"] == "running"
        count = wait_witness(web, count, 60)
    assert any(begun), "one was at work, with what it intends written down"
    assert store.verify() == []
