"""Who else has a disk image or block device in use, so that its bytes may change under us.

Every function looks at one kind of use and returns a clause for the user ("process 12 (qemu) has
it open for writing") or None. Without root only our own processes' files can be seen; QEMU's
locks, mounts, swap and loop devices are seen by everyone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of the 64-bit Linux ABIs: type, whence, start, length, pid."""

_LOCKS = {101: "writes to it", 103: "may resize it", 200: "does not let others read it"}
"""QEMU's image locks (block/file-posix.c): byte 100 + n is held by who uses permission n
(1 write, 3 resize), byte 200 + n by who does not share it (0 consistent read)."""

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("QQQQQIIII64s64s32sQQ")
_LOOP_READ_ONLY = 1


def in_use(path: Path) -> str | None:
    """The first use found, or None. Raises OSError if the file itself cannot be opened."""
    seen = path.stat()
    block = stat.S_ISBLK(seen.st_mode)
    return (
        (block and (mounted(seen.st_rdev) or swap(path) or claimed(path)))
        or (not block and (swap(path) or loop_device(seen)))
        or writer(seen)
        or image_lock(path)
        or None
    )


def mounted(device: int) -> str | None:
    """Where the block device with this number is mounted (proc(5), mountinfo)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return f"it is mounted on {_unescaped(fields[4])}"
    return None


def swap(path: Path) -> str | None:
    """Is it swap space?"""
    for line in Path("/proc/swaps").read_text(errors="surrogateescape").splitlines()[1:]:
        with contextlib.suppress(OSError):
            if path.samefile(_unescaped(line.split()[0])):
                return "it is swap space"
    return None


def claimed(device: Path) -> str | None:
    """Does the kernel refuse exclusive use of a block device (O_EXCL in open(2))? True when it,
    or a partition on it, is mounted, swap, or under device-mapper, md or a file system of many
    devices."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return "the kernel uses it (a mount, LVM, RAID or swap, perhaps on a partition)"
    return None


def loop_device(file: os.stat_result) -> str | None:
    """The loop device that can write to the file. Read-only ones do not count."""
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        device = Path("/dev") / entry.parent.parent.name
        with contextlib.suppress(OSError):
            if (entry.parent.parent / "ro").read_text().strip() == "1":
                continue
            if _backs(device, entry, file):
                return f"it is attached to {device}"
    return None


def _backs(device: Path, entry: Path, file: os.stat_result) -> bool:
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # not ours to open: go by the name, which may be of another mount namespace
        seen = Path(entry.read_text().rstrip("\n")).stat()
        return (seen.st_dev, seen.st_ino) == (file.st_dev, file.st_ino)
    try:
        status = bytearray(_LOOP_INFO.size)
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
        # lo_device is in the kernel's encoding: major << 20 | minor in new_encode_dev form
        number, inode = _LOOP_INFO.unpack(status)[:2]
        return (number, inode) == (_encoded(file.st_dev), file.st_ino)
    finally:
        os.close(fd)


def _encoded(device: int) -> int:
    """huge_encode_dev() of linux/kdev_t.h."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def writer(file: os.stat_result) -> str | None:
    """A process that has the file or block device open for writing."""
    for process, fd, seen in _open_files():
        same = (seen.st_dev, seen.st_ino) == (file.st_dev, file.st_ino)
        if stat.S_ISBLK(file.st_mode) and stat.S_ISBLK(seen.st_mode):
            same = seen.st_rdev == file.st_rdev
        if not same:
            continue
        with contextlib.suppress(OSError, IndexError):
            info = (process / "fdinfo" / fd).read_text()
            flags = int(info.split("flags:")[1].split()[0], 8)
            if flags & os.O_ACCMODE != os.O_RDONLY and not flags & os.O_PATH:
                name = (process / "comm").read_text().strip()
                return f"process {process.name} ({name}) has it open for writing"
    return None


def _open_files() -> Iterator[tuple[Path, str, os.stat_result]]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(process / "fd"):  # noqa: PTH208 (names are enough)
                with contextlib.suppress(OSError):
                    yield process, fd, os.stat(f"{process}/fd/{fd}")  # noqa: PTH116


def image_lock(path: Path) -> str | None:
    """A QEMU that holds a lock which contradicts reading. Nothing is locked by asking."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for byte, what in _LOCKS.items():
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return f"a QEMU process {what}"
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
    return None


def _unescaped(field: str) -> str:
    """proc's octal escapes (``\\040`` for a space) undone."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
