"""A guest over a pool of ours: the story, and random operations with the witness writing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Refused
from tests.dm.lab.story import OPERATIONS, negative_control, story
from tests.system.files import files_story, shell
from tests.system.guest import wait_witness
from tests.system.model import Model

UML = ["--disk", "768M"]


@pytest.fixture
def pool(store: Store) -> Store:
    store.create_pool("fast", "/dev/ubdb", force=True)
    return store


def test_story(pool: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    web = boot("dmthin")
    story(pool, web, tmp_path)
    files_story(pool, web, tmp_path)
    negative_control(pool, web)


@pytest.mark.timeout(2000)
def test_random_operations(pool: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    model = Model(pool, boot("dmthin"), random.Random(20261125), boot_limit=180,
                  machines=2)
    model.run(OPERATIONS, "dmthin")
    model.check_everything(tmp_path)


def test_the_pool_is_full_while_the_guest_writes(store: Store, boot: Callable[..., Machine],
                                                 tmp_path: Path) -> None:
    """The guest waits, is told so, and goes on when the pool has more; nothing is lost."""
    store.create_pool("small", tmp_path / "small.img", size=34 * 2**20)
    web = boot("dmthin")
    with pytest.raises(Refused, match=r"pool 'small' has .* of data free, but .* may need"):
        web.create()
    assert web.status()["state"] == "running"
    store.extend_pool("small", size=56 * 2**20)
    first = web.create()
    shell(web, "(for d in a b; do dd if=/dev/urandom of=/$d/fill bs=64k count=384 conv=notrunc; "
               "done; sync) >/dev/null 2>&1 &")
    deadline = time.monotonic() + 300  # the kernel alone waits 60 s before it fails a write
    while web.status()["state"] == "running":
        assert time.monotonic() < deadline, "the pool does not run full"
        time.sleep(0.5)  # QEMU's event may have come before anybody listened
    assert web.status()["state"] == "io-error"
    detail = web.status()["detail"] or ""
    assert "pool 'small'" in detail
    store.extend_pool("small", size=200 * 2**20)
    assert web.start() == "resumed"
    web.wait_agent(240)  # it has much to write
    count = wait_witness(web, 0, limit=120)
    wait_witness(web, count + 20, limit=120)
    second = web.create()
    assert store.verify() == []
    for epoch in (first, second):
        web.rollback(epoch, keep=False)
        wait_witness(web, 0)
    # What the guest gives up, and no epoch has, is free again.
    shell(web, "dd if=/dev/urandom of=/b/more bs=64k count=128 conv=fsync 2>/dev/null; sync")
    full = store.pool("small").to_json()["data_free"]
    shell(web, "rm /b/more; sync; fstrim /b")
    assert store.pool("small").to_json()["data_free"] - full > 6 * 2**20
    assert store.verify() == []
