"""A guest on thin volumes of LVM: the story, and random operations with the witness writing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epochs import Machine, Store
from tests.dm.lab.story import OPERATIONS, negative_control, story
from tests.dm.lab.volumes import GROUP, group, lvm, volume, volumes
from tests.system.files import files_story
from tests.system.guest import Artefacts
from tests.system.model import Model

UML = ["--disk", "900M"]


@pytest.fixture
def given(tiny: Artefacts) -> Iterator[dict[str, str]]:
    """The guest's disks as thin volumes; nothing of ours is left in the group afterwards."""
    with group("/dev/ubdb", pool="700M"):
        yield {name: volume(name, tiny.directory / f"{name}.img", thin=True) for name in "ab"}
        assert {one["lv_name"] for one in volumes()} == {"a", "b", "pool"}
        lvm("lvchange", "--activate", "n", GROUP)


@pytest.fixture
def web(given: dict[str, str], store: Store, boot: Callable[..., Machine]) -> Machine:
    return boot("lvm", **given)


def test_story(web: Machine, store: Store, tmp_path: Path) -> None:
    assert {disk["backend"] for disk in web.status()["disks"]} == {"lvm-thin"}
    story(store, web, tmp_path)
    files_story(store, web, tmp_path)
    negative_control(store, web)
    tags = {one["lv_name"]: set(one["lv_tags"].split(",")) for one in volumes()}
    (record,) = store.machines()
    for disk in store.files.catalog.disks(record.record.id):
        mine = tags[f"epochs-{disk.active}"]
        assert {"epochs", f"epochs=web/{disk.name}"} <= mine, "lvs says whose it is"
    for epoch in store.epochs():
        for disk_name, layer in epoch.disks.items():
            assert f"epochs=web/{disk_name}#{epoch.id[:12]}" in tags[f"epochs-{layer}"] or (
                f"epochs=trial/{disk_name}#{epoch.id[:12]}" in tags[f"epochs-{layer}"])


@pytest.mark.timeout(2000)
def test_random_operations(web: Machine, store: Store, tmp_path: Path) -> None:
    model = Model(store, web, random.Random(20261126), boot_limit=180,
                  machines=2)
    model.run(OPERATIONS, "lvm-thin")
    model.check_everything(tmp_path)
