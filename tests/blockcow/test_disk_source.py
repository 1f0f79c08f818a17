"""What is refused when a user offers a disk, one fault a test; and that the disk is untouched."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockcow_qemu import MIB, Live, tool
from blockcow_support import need

from blockcow import Source, SourceRefused
from blockcow.source import probe
from blockcow.usage import in_use


def refused(path: Path, *words: str, form: str | None = None) -> None:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SourceRefused) as caught:
        probe(path, form)
    for word in words:
        assert word in str(caught.value)
    assert before is None or path.read_bytes() == before


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", path, "64M")
    tool("qemu-io", "-c", "write -P 1 0 1M", path)
    return path


@pytest.mark.parametrize("form", [None, "raw"])
def test_raw_is_taken(base: Source, form: str | None) -> None:
    assert probe(base.path, form) == base


@pytest.mark.parametrize("form", [None, "qcow2"])
def test_qcow2_is_taken(image: Path, form: str | None) -> None:
    assert probe(image, form) == Source(image, "qcow2", 64 * MIB)


def test_qcow2_can_be_taken_as_raw_on_demand(image: Path) -> None:
    os.truncate(image, 4 * MIB)
    assert probe(image, "raw") == Source(image, "raw", 4 * MIB)


def test_relative_paths_become_absolute(base: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.path.parent)
    assert probe(Path(base.path.name)) == base


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist", "check the path")


def test_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")


def test_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "neither a file nor a block device")


def test_character_device() -> None:
    refused(Path("/dev/null"), "neither a file nor a block device")


def test_unknown_format_name(base: Source) -> None:
    refused(base.path, "'vmdk' is not supported", form="vmdk")


def test_raw_that_is_no_qcow2(base: Source) -> None:
    refused(base.path, "is not qcow2 but raw", form="qcow2")


@pytest.mark.parametrize("form", ["vmdk", "vhdx", "vdi"])
def test_other_formats(tmp_path: Path, form: str) -> None:
    path = tmp_path / "disk"
    tool("qemu-img", "create", "-f", form, path, "8M")
    refused(path, f"is a {form} image", "qemu-img convert")


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "is empty")


def test_size_that_is_no_multiple_of_512(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(1000))
    refused(tmp_path / "odd", "1000 bytes", "no multiple of 512", "truncate -s %512")


def test_qcow2_with_a_backing_file(tmp_path: Path, base: Source) -> None:
    path = tmp_path / "over.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-b", base.path, "-F", "raw", path)
    refused(path, "rests on another file", str(base.path), "qemu-img convert")


def test_qcow2_that_names_a_secret_as_backing_file_does_not_get_it_opened(tmp_path: Path) -> None:
    path, fifo = tmp_path / "over.qcow2", tmp_path / "trap"
    os.mkfifo(fifo)  # opening it would block
    tool("qemu-img", "create", "-f", "qcow2", "-u", "-b", fifo, "-F", "raw", path, "1M")
    refused(path, "rests on another file")


def test_encrypted_qcow2(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(32)
        file.write(
            struct.pack(">I", 1)
        )  # AES; creating LUKS measures time, which a busy machine makes fail
    refused(image, "is encrypted")


def test_qcow2_with_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "split.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, "1M")
    refused(path, "keeps its data in another file")


def test_truncated_qcow2(image: Path) -> None:
    os.truncate(image, 512 * 1024)
    refused(image, "is damaged", "qemu-img check -r all")


@pytest.mark.parametrize("length", [3, 4, 50, 104, 4096])
def test_stump_of_a_qcow2(image: Path, length: int) -> None:
    os.truncate(image, length)
    refused(image, form="qcow2")


def test_qcow2_marked_corrupt(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))
    refused(image, "is marked corrupt")


def test_qcow2_with_a_huge_table(image: Path) -> None:
    """A length from the file is not believed: QEMU's own limits and ours hold."""
    with image.open("r+b") as file:
        file.seek(36)
        file.write(struct.pack(">I", 0xFFFFFFFF))
    refused(image, "cannot be read as a disk image")


def test_unreadable(base: Source) -> None:
    base.path.chmod(0)
    code = (
        "import os, sys; os.setuid(65534); os.chdir('/')\n"
        "from pathlib import Path; from blockcow.source import probe\n"
        "try: probe(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    if os.geteuid() != 0:
        refused(base.path, "cannot be read")
        return
    for folder in base.path.parents:  # up to pytest's own, of which xdist's workers have one more
        folder.chmod(0o755)
        if folder.name.startswith("pytest-of-"):
            break
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\nimport blockcow.source\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, str(base.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("SourceRefused ") and "cannot be read: give us" in done.stdout


def test_open_for_writing_by_a_process(base: Source) -> None:
    with base.path.open("rb"):
        assert probe(base.path) == base  # readers do not matter
    with base.path.open("r+b"):
        refused(base.path, f"process {os.getpid()} (", "has it open for writing")
    assert probe(base.path) == base


def test_open_for_writing_under_another_name(base: Source, tmp_path: Path) -> None:
    other = tmp_path / "hardlink"
    other.hardlink_to(base.path)
    with other.open("ab"):
        refused(base.path, "has it open for writing")


def test_in_use_by_a_virtual_machine(base: Source, start: Callable[..., Live]) -> None:
    options = {"driver": "file", "node-name": "n", "filename": str(base.path)}
    live = start([{**options, "read-only": True}])
    assert probe(base.path) == base  # read-only is shared
    live.close()
    live = start([{"driver": "raw", "node-name": "r", "file": options}],
                 extra=["-device", "virtio-blk-pci,drive=r"])  # fmt: skip
    refused(base.path, f"process {live.process.pid} (qemu-system", "open for writing")


def test_image_lock_alone_is_enough(
    base: Source, start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen by a user who may not look into the other process."""
    monkeypatch.setattr("blockcow.usage.writer", lambda file: None)
    options = {"driver": "file", "node-name": "n", "filename": str(base.path)}
    live = start([{"driver": "raw", "node-name": "r", "file": options}],
                 extra=["-device", "virtio-blk-pci,drive=r"])  # fmt: skip
    refused(base.path, "a QEMU process writes to it")
    live.close()
    assert probe(base.path) == base


@pytest.fixture
def loop(base: Source) -> Iterator[Path]:
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("loop devices need root")
        pytest.skip("loop devices need root")
    device = Path(tool("losetup", "--find", "--show", base.path).strip())
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)


@pytest.mark.root
def test_attached_to_a_loop_device(loop: Path, base: Source) -> None:
    refused(base.path, f"attached to {loop}")


@pytest.mark.root
def test_attached_to_a_read_only_loop_device(base: Source, loop: Path) -> None:
    tool("losetup", "--detach", loop)
    again = tool("losetup", "--find", "--show", "--read-only", base.path).strip()
    try:
        assert probe(base.path) == base
    finally:
        tool("losetup", "--detach", again)
        tool("losetup", loop, base.path)


@pytest.mark.root
def test_block_device_is_taken(loop: Path) -> None:
    assert probe(loop) == Source(loop, "raw", 8 * MIB)


@pytest.mark.root
def test_mounted_block_device(loop: Path, tmp_path: Path) -> None:
    need("mkfs.ext4")
    tool("/usr/sbin/mkfs.ext4", "-q", loop)
    at = tmp_path / "a b"
    at.mkdir()
    tool("mount", loop, at)
    try:
        refused(loop, f"it is mounted on {at}")
    finally:
        tool("umount", at)
    assert probe(loop).size == 8 * MIB


@pytest.mark.root
def test_block_device_that_the_kernel_claims(loop: Path) -> None:
    fd = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        assert "the kernel uses it" in str(in_use(loop))
    finally:
        os.close(fd)
    assert in_use(loop) is None


@pytest.mark.root
def test_block_device_open_for_writing(loop: Path) -> None:
    fd = os.open(loop, os.O_RDWR)
    try:
        refused(loop, "has it open for writing")
    finally:
        os.close(fd)


@pytest.mark.root
def test_block_device_with_qcow2_on_it(loop: Path, image: Path) -> None:
    with loop.open("wb") as device, image.open("rb") as file:
        shutil.copyfileobj(file, device)
    refused(loop, "is a block device that holds qcow2")


@pytest.mark.root
def test_swap(loop: Path, base: Source) -> None:
    need("mkswap", "swapon")
    tool("/usr/sbin/mkswap", loop)
    tool("/usr/sbin/swapon", loop)
    try:
        refused(loop, "it is swap space")
    finally:
        tool("/usr/sbin/swapoff", loop)
