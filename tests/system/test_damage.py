"""Verify finds damage: a flipped bit, a truncation or a missing file in anything an epoch needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import memsave
from epochs import Epoch, Machine, Store
from epochs.errors import Damaged
from tests.commands import run_cli

from .guest import ctl, wait_witness

pytestmark = pytest.mark.guest


def flip(file: Path) -> None:
    """Turn one bit in the middle of a file's data."""
    data = file.read_bytes()
    at = next(i for i in [*range(len(data) // 2, len(data)), *range(len(data))] if data[i])
    with file.open("r+b") as handle:
        handle.seek(at)
        handle.write(bytes([data[at] ^ 0x10]))


def truncate(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def remove(file: Path) -> None:
    file.unlink()


def own_files(store: Store, epoch: Epoch) -> dict[str, Path]:
    """One file of every kind that only this epoch depends on."""
    files = store.files
    others = [e for e in store.epochs() if e.id != epoch.id]
    packs = files.catalog.epoch_packs(epoch.id) - {
        pack for other in others for pack in files.catalog.epoch_packs(other.id)}
    (pack,) = packs
    layer = files.catalog.layer(epoch.disks["b"])
    found = {"page map": files.map_file(epoch.id), "device state": files.state_file(epoch.id),
             "pack": files.packs_dir / f"{pack}.pack", "index": files.packs_dir / f"{pack}.idx",
             "layer": files.layers_dir / layer.file}
    assert all(file.is_file() for file in found.values())
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda f: f.__name__)
def test_damage_is_found_and_refused(store: Store, boot: Callable[..., Machine],
                                     damage: Callable[[Path], None], tmp_path: Path) -> None:
    web = boot()
    sound = web.create(tags=["sound"])
    ctl(web, "dirty", "2")
    wait_witness(web, wait_witness(web, 0) + 20)
    target = web.create(tags=["target"])
    web.rollback(sound, keep=False)  # so that the running guest depends on nothing of the target
    ctl(web, "nonce", "set", "alive")
    path = store.files.path
    assert run_cli(path, "verify").returncode == 0
    for kind, file in own_files(store, target).items():
        saved = file.read_bytes()
        damage(file)
        for command in (["rollback", "web", target.id, "--discard"], ["fork", target.id, "no"]):
            refused = run_cli(path, *command, check=False)
            assert refused.returncode == 6, (kind, refused.stderr)
            assert target.id[:12] in refused.stderr, kind
        assert ctl(web, "nonce", "get") == "alive", "the running guest was not touched"
        found = run_cli(path, "verify", check=False)
        assert found.returncode == 6, (kind, found.stdout, found.stderr)
        assert target.id[:12] in found.stdout + found.stderr, kind
        assert str(file) in found.stdout + found.stderr, kind
        assert run_cli(path, "verify", "web@sound").returncode == 0, f"{kind}: others stay usable"
        with store.fork(sound, "other") as other:
            wait_witness(other, 0)
        file.write_bytes(saved)
        file.chmod(0o600)
        assert run_cli(path, "verify").returncode == 0, f"{kind}: mended, so not a false alarm"
    with store.fork(target, "mended") as mended:
        wait_witness(mended, 0)


def test_damage_behind_an_unchanged_signature(store: Store, boot: Callable[..., Machine]) -> None:
    """A disk that rots leaves no trace in stat(2). `verify` finds it, and from then on the epoch is
    refused, until its bytes are right again."""
    web = boot()
    sound = web.create()
    ctl(web, "dirty", "2")
    target = web.create()
    web.rollback(sound, keep=False)
    catalog = store.files.catalog
    file = own_files(store, target)["pack"]
    saved = file.read_bytes()

    def as_if_untouched() -> None:
        with memsave.PackStore(store.files.packs_dir) as packs, catalog.transaction():
            catalog.set_pack_signature(file.stem, packs.signature(file.stem))

    flip(file)
    as_if_untouched()
    assert [finding.epoch for finding in store.verify()] == [target.id]
    for _ in range(2):
        with pytest.raises(Damaged, match="damaged"):
            store.fork(target, "no")
    file.write_bytes(saved)
    as_if_untouched()
    with store.fork(target, "mended") as mended:
        wait_witness(mended, 0)
    assert store.epoch(target).record.damaged is None


def test_a_changed_base_image_is_refused(store: Store, tiny, tmp_path: Path) -> None:
    """The user's own disk file, changed under the layers that rest on it."""
    from dataclasses import replace

    copy = tmp_path / "a.img"
    copy.write_bytes((tiny.directory / "a.img").read_bytes())
    spec = tiny.spec()
    disks = (replace(spec.disks[0], file=str(copy)), spec.disks[1])
    web = store.add("web", replace(spec, disks=disks))
    web.start()
    epoch = web.create()
    flip(copy)
    with pytest.raises(Damaged, match="damaged"):
        store.fork(epoch, "no")
    assert web.status()["state"] == "running"
