"""A file whose reads are answered when the test says so: a minimal FUSE server on a thread.

Source: include/uapi/linux/fuse.h (protocol 7.31).
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from pathlib import Path
from types import TracebackType

INIT, LOOKUP, FORGET, GETATTR, OPEN, READ, OPENDIR, BATCH_FORGET = 26, 1, 2, 3, 14, 15, 27, 42
RELEASES = (18, 29, 25)
DIRECT_IO = 1  # FOPEN_DIRECT_IO
MNT_DETACH = 2


def _attributes(inode: int, mode: int, size: int) -> bytes:
    return struct.pack("<6Q10I", inode, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0,
                       0, 4096, 0)


class SlowFile:
    """``path`` holds 4096 bytes 'D'. A read sets ``asked`` and returns after ``answer``."""

    def __init__(self, directory: Path) -> None:
        self._mount = directory / "mount"
        self._mount.mkdir()
        self.path = self._mount / "file"
        self.asked, self.answer = threading.Event(), threading.Event()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
        if self._libc.mount(b"memsave", str(self._mount).encode(), b"fuse", 0, options.encode()):
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 20)
            except OSError:  # unmounted
                return
            _, code, unique, node = struct.unpack("<IIQQ", request[:24])
            if code not in (FORGET, BATCH_FORGET):
                error, answer = self._reply(code, node)
                os.write(self._fd, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)

    def _reply(self, code: int, node: int) -> tuple[int, bytes]:
        if code == INIT:
            return 0, struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0,
                                  *([0] * 7))
        if code == LOOKUP:
            return 0, struct.pack("<4QII", 2, 0, 1, 1, 0, 0) + _attributes(2, 0o100600, 4096)
        if code == GETATTR:
            return 0, struct.pack("<QII", 1, 0, 0) + (
                _attributes(1, 0o40755, 0) if node == 1 else _attributes(2, 0o100600, 4096))
        if code in (OPEN, OPENDIR):
            return 0, struct.pack("<QII", 1, DIRECT_IO, 0)
        if code == READ:
            self.asked.set()
            self.answer.wait()
            return 0, b"D" * 4096
        return (0, b"") if code in RELEASES else (-38, b"")

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.answer.set()
        self._libc.umount2(str(self._mount).encode(), MNT_DETACH)
        self._thread.join(10)
        os.close(self._fd)
