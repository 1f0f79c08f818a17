"""Checking a disk that a user offers, before anything is built on it."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Any

from .interface import BlockError, Source, SourceRefused
from .tools import UNTRUSTED_SECONDS, json_of, run
from .usage import in_use

FORMATS = ("raw", "qcow2")
_SECTOR = 512
FLUSH_BUFFERS = 0x1261  # linux/fs.h: BLKFLSBUF


def probe(path: Path, format: str | None = None) -> Source:
    """Check the disk image or block device at ``path``.

    ``format`` is ``raw`` or ``qcow2``; None finds it out, and then refuses what looks like some
    other image format rather than take it for raw. The returned path is absolute, its symbolic
    links kept (``/dev/vg/lv`` stays valid when ``/dev/dm-3`` does not). Raises SourceRefused with
    one sentence: the thing, the reason, the mend.
    """
    if format is not None and format not in FORMATS:
        raise SourceRefused(f"format {format!r} is not supported: give raw or qcow2")
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() follows links)
    kind = _kind(path)
    try:
        used = in_use(path)
    except PermissionError:
        raise SourceRefused(
            f"{path} cannot be read: give us read permission, or run as its owner"
        ) from None
    except OSError as error:
        raise SourceRefused(f"{path} cannot be read: {error.strerror}") from error
    if used:
        raise SourceRefused(f"{path} is in use, {used}: end that first, or offer a copy")
    found = _format(path, format)
    size = _raw_size(path) if found == "raw" else _qcow2_size(path)
    if size == 0:
        raise SourceRefused(f"{path} is empty: offer a disk image or a block device")
    if size % _SECTOR:
        raise SourceRefused(
            f"{path} has {size} bytes, which is no multiple of 512: it is cut short, or no disk; "
            f"if it is one, 'truncate -s %512 {path}' fills it up"
        )
    if kind == "block device" and found == "qcow2":
        raise SourceRefused(
            f"{path} is a block device that holds qcow2: copy it to a file, or give format raw "
            "if the guest is to see the qcow2 itself"
        )
    return Source(path, found, size)


def forget_cached(path: Path) -> None:
    """What the page cache holds of a block device goes: it does not change with what is written
    past it, which is how Xen's block backend writes. Nothing for a file."""
    if _kind(path) != "block device":
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, FLUSH_BUFFERS)
    finally:
        os.close(fd)


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SourceRefused(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise SourceRefused(f"{path} cannot be looked at: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise SourceRefused(f"{path} is a directory: give the disk image in it")
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISBLK(mode):
        return "block device"
    raise SourceRefused(f"{path} is neither a file nor a block device: give one of them")


def _format(path: Path, wanted: str | None) -> str:
    if wanted == "raw":
        return "raw"
    found = str(_info(path, None)["format"])
    if wanted == "qcow2" and found != "qcow2":
        raise SourceRefused(f"{path} is not qcow2 but {found}: give the format it has")
    if found not in FORMATS:
        raise SourceRefused(
            f"{path} is a {found} image, which is not supported: convert it with 'qemu-img convert "
            f"-O qcow2 {path} NEW', or give format raw if the guest is to see it as it is"
        )
    return found


def _info(path: Path, form: str | None) -> dict[str, Any]:
    """What qemu-img says of it: in a process of its own, bounded in time and memory, for the file
    may be made to harm. It opens no backing file."""
    chosen = ["-f", form] if form else []
    command = ["qemu-img", "info", "--output=json", *chosen, str(path)]
    try:
        said = json_of(run(command, untrusted=True))
    except BlockError as error:
        raise SourceRefused(f"{path} cannot be read as a disk image: {error}") from error
    if not isinstance(said, dict) or "format" not in said or "virtual-size" not in said:
        raise SourceRefused(f"{path} cannot be read as a disk image: qemu-img says nothing of it")
    return said


def _raw_size(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _qcow2_size(path: Path) -> int:
    said = _info(path, "qcow2")
    special = said.get("format-specific", {}).get("data", {})
    mend = f"'qemu-img convert -O qcow2 {path} NEW' makes one that stands alone"
    if said.get("encrypted") or "encrypt" in special:
        raise SourceRefused(f"{path} is encrypted, which is not supported: decrypt it into a copy")
    if "data-file" in special:
        raise SourceRefused(
            f"{path} keeps its data in another file ({special['data-file']}): {mend}"
        )
    if "backing-filename" in said:
        raise SourceRefused(
            f"{path} rests on another file ({said['backing-filename']}), whose changes would go "
            f"unseen: {mend}"
        )
    if special.get("corrupt"):
        raise SourceRefused(f"{path} is marked corrupt: 'qemu-img check -r all {path}' may mend it")
    _expect_whole(path)
    return int(said["virtual-size"])


def _expect_whole(path: Path) -> None:
    """Tables and reference counts, not the data. Exit code 3 means leaked clusters: harmless."""
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)]
    try:
        done = run(command, untrusted=True, timeout=10 * UNTRUSTED_SECONDS, accept=(0, 2, 3))
    except BlockError as error:
        raise SourceRefused(f"{path} cannot be checked: {error}") from error
    if done.returncode == 2:
        raise SourceRefused(
            f"{path} is damaged (qemu-img check finds errors): 'qemu-img check -r all {path}' may "
            "mend it, or restore it from a backup"
        )
