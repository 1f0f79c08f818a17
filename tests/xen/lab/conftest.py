"""Fixtures in dom0: disks for a domU, and nothing left of it afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memsave.xen.live import Host
from tests.xen.lab.domu import DOMU, domains, xl


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_domains() -> Iterator[None]:
    """No domain is there before the test; those that are there after it go."""
    assert domains() == []
    yield
    for name in domains():
        xl("destroy", name)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """The domU's two disks, as loop devices over copies."""
    made = []
    for name, disk in (("xvda", "a"), ("xvdb", "b")):
        copy = tmp_path / f"{disk}.img"
        shutil.copy(DOMU / f"{disk}.img", copy)
        device = subprocess.run(["losetup", "--find", "--show", str(copy)], check=True,
                                capture_output=True, text=True).stdout.strip()
        made.append((name, device))
    yield made
    for name in domains():
        xl("destroy", name)
    for _, device in made:
        subprocess.run(["losetup", "--detach", device], check=True)
