"""Loop devices: a file as a block device (linux/loop.h, loop(4)).

Every device is attached with autoclear: the kernel detaches it when the last one who has it open
closes it, so that nothing is left behind by a process that is killed. Whoever builds on it (a
device-mapper table) keeps it from then on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .interface import BlockError

CTL_GET_FREE = 0x4C82
CONFIGURE = 0x4C0A  # Linux 5.8
SET_CAPACITY = 0x4C07
READ_ONLY, AUTOCLEAR, DIRECT_IO = 1, 4, 16  # LO_FLAGS_*
MAJOR = 7
_INFO = "QQQQQIIII64s64s32sQQ"  # struct loop_info64
_CONFIG = struct.Struct("<II" + _INFO + "64x")  # struct loop_config
assert _CONFIG.size == 304
_TRIES = 50  # another process may take the number that was free


@contextmanager
def attached(file: Path, *, read_only: bool = False, offset: int = 0, size: int = 0
             ) -> Iterator[Path]:
    """Attach ``file``, or ``size`` bytes of it from ``offset`` on (0: up to its end); yields the
    device's node. It is detached at the end of the block unless somebody else has opened it by
    then. I/O goes past the page cache where the file system can."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(file, flags | os.O_CLOEXEC)
    try:
        device, node = _configured(backing, file, AUTOCLEAR | DIRECT_IO
                                   | (READ_ONLY if read_only else 0), flags, offset, size)
    finally:
        os.close(backing)
    try:
        yield node
    finally:
        os.close(device)


def _configured(backing: int, file: Path, loop_flags: int, flags: int, offset: int,
                size: int) -> tuple[int, Path]:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise BlockError(f"{file} cannot become a block device: /dev/loop-control: "
                         f"{error.strerror}; 'modprobe loop' may help") from error
    try:
        config = _CONFIG.pack(backing, 0, 0, 0, 0, offset, size, 0, 0, 0, loop_flags,
                              os.fsencode(file)[-63:], b"", b"", 0, 0)
        for _ in range(_TRIES):
            node = Path(f"/dev/loop{fcntl.ioctl(control, CTL_GET_FREE)}")
            device = os.open(node, flags | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, CONFIGURE, config)
                return device, node
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise BlockError(f"{file} cannot become a block device: "
                                     f"{error.strerror}") from error
    finally:
        os.close(control)
    raise BlockError(f"{file} cannot become a block device: no loop device stays free")


def refresh(node: Path) -> None:
    """Let a device have the size that its file has now."""
    device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, SET_CAPACITY, 0)
    finally:
        os.close(device)


def backing_file(minor: int) -> Path | None:
    """The file behind a loop device, None if it is not attached."""
    try:
        text = Path(f"/sys/block/loop{minor}/loop/backing_file").read_text().rstrip("\n")
    except FileNotFoundError:
        return None
    return Path(text)


def devices_of(file: Path) -> list[Path]:
    """Nodes of all loop devices that are attached to a file."""
    wanted = file.resolve()
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            if Path(entry.read_text().rstrip("\n")) == wanted:
                found.append(Path("/dev") / entry.parent.parent.name)
        except FileNotFoundError:
            continue  # detached meanwhile
    return found
