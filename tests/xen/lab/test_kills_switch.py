"""``rollback``, ``fork`` and ``start`` of a domain killed at every named point: the next command
settles it; there is one domain, with its name, in one of the two states."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epochs import Machine, Store
from epochs.points import POINTS
from tests.dm.lab.test_kills import live, settle, strike
from tests.system.guest import ctl, wait_witness
from tests.xen.lab.domu import domains
from tests.xen.lab.test_kills import Sweep

SWITCHED = ("rollback.switched", "rollback.old-gone", "rollback.taken-over", "rollback.resumed")
FORKED = ("fork.committed", "fork.resumed")
XEN = ["--disk", "700M", "--disk", "700M"]
pytestmark = pytest.mark.timeout(1400)


def test_rollback_and_fork(boot: Callable[[str], Machine], store: Store, sweep: Sweep) -> None:
    web = boot("pvh")
    ctl(web, "nonce", "set", "one")
    first = web.create()
    devices = len(live())
    for point in sweep(("rollback.intended", *POINTS["launch"], *POINTS["rollback"][1:]),
                       ("launch.loaded", "rollback.switched")):
        ctl(web, "nonce", "set", "two")
        strike(store, point, "rollback", "web", first.id, "--discard")
        settle(store)
        assert ctl(web, "nonce", "get") == ("one" if point in SWITCHED else "two"), point
        wait_witness(web, 0, 60)
        assert domains() == ["web"], point
        assert len(live()) == devices, point
    for point in sweep(("fork.intended", *POINTS["launch"], *POINTS["fork"][1:]),
                       ("fork.committed",)):
        strike(store, point, "fork", first.id, "trial")
        settle(store)
        forked = point in FORKED
        assert sorted(domains()) == (["trial", "web"] if forked else ["web"]), point
        if forked:
            trial = store.machine("trial")
            assert ctl(trial, "nonce", "get") == "one"
            trial.remove(force=True)
        assert len(live()) == devices, point
    web.stop(kill=True)
    for point in sweep(("start.intended", "launch.disks-cloned", *POINTS["start"][1:]),
                       ("start.launched",)):
        strike(store, point, "start", "web")
        settle(store)
        started = point == "start.committed"
        assert domains() == (["web"] if started else []), point
        if started:
            web.stop(kill=True)
