"""What every backend must be able to do with a guest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Refused
from epochs.protocol import switch
from tests.system.guest import (
    WitnessFailed,
    assert_tidy,
    check_disks,
    ctl,
    wait_console,
    wait_witness,
)

OPERATIONS = int(os.environ.get("EPOCHS_OPERATIONS", "10"))  # 60 take 20 min a backend here


def story(store: Store, web: Machine, scratch: Path, *, forks: bool = True) -> None:
    """create, rollback, fork, delete in the middle, stop and start: with two disks. ``forks``:
    whether the backend can; else it must refuse, with the reason and what to do."""
    ctl(web, "nonce", "set", "one")
    first = web.create(tags=["first"])
    count = wait_witness(web, 0)
    ctl(web, "nonce", "set", "two")
    wait_witness(web, count + 20)
    second = web.create()
    ctl(web, "nonce", "set", "three")
    third = web.create()
    done = web.rollback(first, keep=True)
    assert ctl(web, "nonce", "get") == "one"
    wait_witness(web, count)
    kept = store.epoch(done["kept"])
    if forks:
        with store.fork(second, "trial") as trial:
            assert ctl(trial, "nonce", "get") == "two"
            ctl(trial, "nonce", "set", "other")
            wait_witness(trial, 0)
            trial.create()
        assert ctl(web, "nonce", "get") == "one", "the fork shared nothing that it changed"
    else:
        with pytest.raises(Refused, match=r"cannot be forked because of disk 'a': .*backend="):
            store.fork(second, "trial")
        assert [machine.name for machine in store.machines()] == ["web"]
    for epoch in store.epochs():
        check_disks(store, epoch, scratch)
    assert store.diff(first, second).disks["a"]
    assert store.diff(first, second).disks["b"] == store.diff(second, first).disks["b"]
    store.delete([second])
    assert store.verify() == []
    assert_tidy(store)
    web.rollback(kept, keep=False)
    assert ctl(web, "nonce", "get") == "three"
    wait_witness(web, 0)
    check_disks(store, third, scratch)
    said = web.console_log.stat().st_size
    web.stop()
    assert_tidy(store)
    web.start()
    wait_console(web, "TINY READY", since=said, limit=180)
    web.wait_agent()
    wait_witness(web, 0)


def mixed_layers(original: Callable[[str], dict[str, str]], wrong: str,
                 epoch: str) -> dict[str, str]:
    right = original(epoch)
    last = list(right)[-1]
    return {**right, last: original(wrong)[last]}


def negative_control(store: Store, web: Machine, *, forks: bool = True) -> None:
    """Memory of one epoch over a disk of another, on purpose: the witness must see it."""
    first = web.create()
    wait_witness(web, wait_witness(web, 0) + 40)
    second = web.create()
    catalog = store.files.catalog
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "epoch_layers", partial(mixed_layers, catalog.epoch_layers,
                                                       second.id))
        if forks:
            (record,) = switch.fork(store.files, replace(first.record), ["mixed"])
        else:
            record = web.record
            switch.rollback(store.files, record, replace(first.record), keep=False)
    broken = store.machine(record.name)
    with pytest.raises(WitnessFailed, match="MISMATCH"):
        for beyond in range(0, 3000, 50):
            wait_witness(broken, beyond)
    if forks:
        broken.remove(force=True)
    else:
        web.rollback(second, keep=False)
    wait_witness(web, 0)
