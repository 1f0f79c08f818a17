from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockcow_qemu import MIB, Live
from blockcow_support import need

from blockcow import Backend, Layer, Source, backend


@pytest.fixture(autouse=True, scope="session")
def qemu_is_there() -> None:
    need("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-storage-daemon")


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    directory = tmp_path / "layers"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def disks(layers: Path) -> Backend:
    return backend("qcow2", layers)


@pytest.fixture
def base(tmp_path: Path) -> Source:
    """A raw disk of 8 MiB with something in it."""
    path = tmp_path / "user.raw"
    path.write_bytes(bytes(MIB) + b"\x11" * MIB + bytes(6 * MIB))
    return Source(path, "raw", 8 * MIB)


@pytest.fixture
def adopted(disks: Backend, base: Source) -> Layer:
    return disks.adopt(base, "base")


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Start QEMU processes; all of them end with the test."""
    running: list[Live] = []

    def launch(*arguments: Any, **options: Any) -> Live:
        running.append(Live(*arguments, **options))
        return running[-1]

    yield launch
    for live in running:
        live.close()


def _mounted(kind: str, folder: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("mounting needs root")
        pytest.skip("mounting needs root")
    need(f"mkfs.{kind}", "mount")
    image, at = folder / f"{kind}.img", folder / kind
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    flags = ["-q", "-m", "reflink=1"] if kind == "xfs" else ["-q"]
    subprocess.run([f"/usr/sbin/mkfs.{kind}", *flags, str(image)], check=True)
    at.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
        image.unlink()


@pytest.fixture(scope="session", params=["xfs", "btrfs"])
def reflinking(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A loop-mounted file system with reflinks."""
    yield from _mounted(request.param, tmp_path_factory.mktemp("mnt"))
