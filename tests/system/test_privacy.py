"""A memory image holds the guest's secrets: nobody else may read anything of a store, and forks
do not share an identity that they should have of their own."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store

pytestmark = pytest.mark.guest


def test_nothing_in_a_store_is_open_to_others(store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    epoch = web.create()
    store.fork(epoch, "trial")
    checked = 0
    for path in [store.files.path, *store.files.path.rglob("*")]:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            assert stat.S_IMODE(mode) == 0o700, path
        elif stat.S_ISSOCK(mode) or stat.S_ISREG(mode):
            assert stat.S_IMODE(mode) & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path
            checked += 1
    assert checked > 10
    for place in ("packs", "layers", f"epochs/{epoch.id}"):
        for path in (store.files.path / place).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def generation_id(machine: Machine, store: Store) -> str:
    """The VM generation id that QEMU shows the guest."""
    instance = store.files.catalog.instance_of(machine.record.id)
    assert instance is not None
    words = Path(f"/proc/{instance.process.pid}/cmdline").read_bytes().decode().split("\0")
    return next(word for word in words if word.startswith("vmgenid,"))


def test_every_fork_and_rollback_has_a_generation_id_of_its_own(
        store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    epoch = web.create()
    forks = store.fork_many(epoch, ["one", "two"])
    seen = {generation_id(machine, store) for machine in (web, *forks)}
    web.rollback(epoch, keep=False)
    seen.add(generation_id(web, store))
    assert len(seen) == 4
