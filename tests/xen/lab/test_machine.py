"""Domains as machines: epochs of them while they run, back to them, forks beside them, with one
disk on a thin volume of LVM and one in a pool of ours, the witness writing to both."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from tests.dm.lab.story import negative_control
from tests.json_fields import documented, fields
from tests.system.guest import assert_tidy, check_disks, ctl, wait_witness
from tests.system.model import Model
from tests.xen.lab.domu import domains

XEN = ["--disk", "700M", "--disk", "700M"]
pytestmark = pytest.mark.timeout(1400)


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.whole), "pvh"])
def test_story(kind: str, boot: Callable[[str], Machine], store: Store, tmp_path: Path) -> None:
    web = boot(kind)
    ctl(web, "nonce", "set", "one")
    wait_witness(web, 10, 60)
    first = web.create(tags=["first"])
    print("first", first.stats)
    shown = fields(first.to_json())
    assert documented("Epoch of a domain") <= shown
    assert {field for field in shown - documented("Epoch of a domain") - documented("Epoch")
            if not re.match(r"disks\.|stats\.disk_bytes\.", field)} == set()
    assert first.stats["pages_precopied"] > first.stats["pages_sealed_in_pause"] > 0, "it ran on"
    assert first.stats["pages_precopied"] < 6 * (128 << 8), "no pages that it does not have"
    domid = web.status()["domid"]
    assert ctl(web, "nonce", "get") == "one"
    count = wait_witness(web, 20, 60)
    ctl(web, "nonce", "set", "two")
    second = web.create()
    print("second", second.stats)
    ctl(web, "nonce", "set", "three")
    assert web.status()["domid"] == domid, "it is the same domain all the time"
    done = web.rollback(first, keep=True)
    print("rollback", done)
    assert ctl(web, "nonce", "get") == "one"
    wait_witness(web, count, 60)
    assert domains() == ["web"]
    with store.fork(second, "trial") as trial:
        assert ctl(trial, "nonce", "get") == "two"
        ctl(trial, "nonce", "set", "other")
        wait_witness(trial, 0, 60)
        trial.create()
        assert sorted(domains()) == ["trial", "web"]
        assert ctl(web, "nonce", "get") == "one", "the fork shared nothing that it changed"
    for epoch in store.epochs():
        check_disks(store, epoch, tmp_path)
    store.delete([second])
    assert store.verify() == []
    assert_tidy(store)
    web.rollback(done["kept"], keep=False)
    assert ctl(web, "nonce", "get") == "three"
    wait_witness(web, 0, 60)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_the_witness_sees_memory_over_another_epoch_s_disk(
        kind: str, boot: Callable[[str], Machine], store: Store) -> None:
    negative_control(store, boot(kind))


@pytest.mark.whole  # many restores; libxl gives its hotplug scripts 40 s, which can be too few here
@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_random_operations(kind: str, boot: Callable[[str], Machine], store: Store,
                           tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = Model(store, boot(kind), random.Random(20261126), boot_limit=180, machines=2)
    model.run(request.config.getoption("--operations"), "xen")
    model.check_everything(tmp_path)
