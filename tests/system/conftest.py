"""Fixtures for whole-system tests: QEMU binaries, guests that run, stores that are torn down.

A missing tool or guest is a failure where $CI is set, and a skip elsewhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epochs import Machine, Store

from .guest import Artefacts, assert_tidy, processes_in, wait_console, wait_witness


def required(variable: str) -> Path:
    """A folder that scripts/test exports; see scripts/guests."""
    value = os.environ.get(variable)
    if value and Path(value).is_dir():
        return Path(value)
    reason = f"{variable} is not set; run the tests with scripts/test"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny() -> Artefacts:
    """The tiny guest: Debian's cloud kernel, busybox, witness, two ext4 disks."""
    return Artefacts(required("EPOCHS_TINY"))


@pytest.fixture(params=["7.2", "10.0"])
def any_qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every QEMU that Epochs supports, one after the other."""
    if request.param == "10.0":
        folder = required("EPOCHS_QEMU10")
        monkeypatch.setenv("EPOCHS_QEMU", str(folder / "qemu-system-x86_64"))
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path, any_qemu: str) -> Iterator[Store]:
    """An empty store, with every QEMU in turn; at the end every guest in it is gone and nothing is
    left astray."""
    try:
        with Store(tmp_path / "store") as opened:
            yield opened
            opened.settle()
            assert_tidy(opened)
            for machine in opened.machines():
                machine.remove(force=True, with_epochs=True)
            opened.delete(opened.epochs())  # of machines that the test itself removed
            assert opened.files.catalog.layers() == []
            assert_tidy(opened)
    finally:
        astray = processes_in(tmp_path)
        for process in astray:
            os.kill(process, signal.SIGKILL)
    assert astray == []


@pytest.fixture
def boot(store: Store, tiny: Artefacts) -> Callable[..., Machine]:
    """Add and start a tiny guest; returns when its witness runs and its agent answers."""
    def boot(name: str = "web", **spec: object) -> Machine:
        machine = store.add(name, tiny.spec(**spec))  # type: ignore[arg-type]
        machine.start()
        wait_console(machine, "TINY READY")
        machine.wait_agent()
        wait_witness(machine, 0)
        return machine

    return boot
