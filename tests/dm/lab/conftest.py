"""Fixtures for tests inside User-Mode Linux: the driver, stores and machines over its devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockcow.devmapper import DeviceMapper, open_driver
from epochs import Machine, Store
from tests.system.guest import Artefacts, assert_tidy, processes_in, wait_console, wait_witness


@pytest.fixture
def dm() -> Iterator[DeviceMapper]:
    """The driver; nothing of ours is live before the test nor after it."""
    driver = open_driver()
    assert driver.devices("epochs-") == []
    yield driver
    assert driver.devices("epochs-") == []
    assert subprocess.run(["losetup", "--list", "--noheadings"], capture_output=True, text=True,
                          check=True).stdout == ""


@pytest.fixture(scope="session")
def tiny() -> Artefacts:
    return Artefacts(Path(os.environ["EPOCHS_TINY"]))


@pytest.fixture
def store(dm: DeviceMapper, tmp_path: Path) -> Iterator[Store]:
    """An empty store; at the end nothing is left of what was in it."""
    with Store(tmp_path / "store") as opened:
        yield opened
        opened.settle()
        assert_tidy(opened)
        for machine in opened.machines():
            machine.remove(force=True, with_epochs=True)
        opened.delete(opened.epochs())
        assert opened.files.catalog.layers() == []
        assert_tidy(opened)
        for pool in opened.pools():
            opened.remove_pool(pool.record.name)
    assert processes_in(tmp_path) == []


@pytest.fixture
def boot(store: Store, tiny: Artefacts) -> Callable[..., Machine]:
    """Add and start a tiny guest with its disks on a backend; returns when its witness runs."""
    def boot(backend: str, name: str = "web", **disks: str) -> Machine:
        spec = tiny.spec()
        machine = store.add(name, replace(spec, disks=tuple(
            replace(disk, backend=backend, file=disks.get(disk.name, disk.file))
            for disk in spec.disks)))
        machine.start()
        wait_console(machine, "TINY READY", limit=180)
        machine.wait_agent()
        wait_witness(machine, 0)
        return machine

    return boot
