"""Reading ranges of an image through ``qemu-storage-daemon``, over NBD on a private socket.

The daemon opens the chain read-only with the same explicit graph as a guest would; it is handed
a listening socket, so that there is nothing to wait for. The protocol is that of the NBD
project's ``doc/proto.md``: fixed newstyle, simple replies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType

from .interface import BlockError, JsonDict
from .tools import leashed

SECONDS = 60
LARGEST_READ = 8 << 20
"""Bytes in one request; servers need not take more than 32 MiB."""

_OPTION = 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
_REQUEST, _SIMPLE_REPLY = 0x25609513, 0x67446698
_EXPORT_NAME, _GO, _READ, _DISCONNECT = 1, 7, 0, 2
_ACK, _INFO, _INFO_EXPORT = 1, 3, 0


class Reader:
    """One connection to one export. ``size`` is the disk's in bytes."""

    def __init__(self, connected: socket.socket, export: str) -> None:
        self._socket = connected
        self._cookie = 0
        self.size = self._go(export)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; raises BlockError."""
        pieces = []
        while length:
            piece = min(length, LARGEST_READ)
            pieces.append(self._read_once(offset, piece))
            offset += piece
            length -= piece
        return b"".join(pieces)

    def _read_once(self, offset: int, length: int) -> bytes:
        self._cookie += 1
        request = struct.pack(">IHHQQI", _REQUEST, 0, _READ, self._cookie, offset, length)
        self._socket.sendall(request)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != _SIMPLE_REPLY or cookie != self._cookie:
            raise BlockError("qemu-storage-daemon does not answer as NBD says")
        if error:
            raise BlockError(f"reading {length} bytes at {offset} failed: {os.strerror(error)}")
        return self._receive(length)

    def _go(self, export: str) -> int:
        magic, option, flags = struct.unpack(">8sQH", self._receive(18))
        if magic != b"NBDMAGIC" or option != _OPTION or not flags & 1:
            raise BlockError("qemu-storage-daemon does not greet as NBD says")
        self._socket.sendall(struct.pack(">I", 1))  # fixed newstyle, with the 124 zeros
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">QII", _OPTION, _GO, len(data)) + data)
        size = None
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or length > 1 << 16:
                raise BlockError("qemu-storage-daemon does not answer as NBD says")
            data = self._receive(length)
            if kind == _INFO and data[:2] == struct.pack(">H", _INFO_EXPORT):
                (size,) = struct.unpack_from(">Q", data, 2)
            elif kind == _ACK and size is not None:
                return int(size)
            elif kind & 1 << 31:
                raise BlockError(f"qemu-storage-daemon refused export {export!r}")

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise BlockError("qemu-storage-daemon closed the connection")
            view = view[count:]
        return bytes(buffer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


@contextlib.contextmanager
def exported(blockdevs: Sequence[JsonDict], nodes: Sequence[str]) -> Iterator[list[Reader]]:
    """Open the graph in a daemon of its own, and a :class:`Reader` for each of ``nodes``. Raises
    BlockError with the daemon's words. The daemon ends with the context."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="blockcow-"))
        address = f"{folder}/nbd"  # mode 0700: an abstract name would be open to every user
        listening.bind(address)
        listening.listen(len(nodes))
        command = ["qemu-storage-daemon"]
        for options in blockdevs:
            command += ["--blockdev", json.dumps(options)]
        command += ["--nbd-server", f"addr.type=fd,addr.str={listening.fileno()}"]
        for number, node in enumerate(nodes):
            command += ["--export", f"type=nbd,id=e{number},node-name={node},name=e{number}"]
        try:
            daemon = subprocess.Popen(
                leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[listening.fileno()],
            )
        except FileNotFoundError as error:
            raise BlockError(
                "qemu-storage-daemon is not installed: install it (Debian: qemu-system-common)"
            ) from error
        stack.callback(_end, daemon)
        listening.close()
        try:
            readers = []
            for number in range(len(nodes)):
                connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                stack.callback(connected.close)
                connected.settimeout(SECONDS)
                connected.connect(address)
                readers.append(stack.enter_context(Reader(connected, f"e{number}")))
        except (OSError, BlockError) as error:
            _end(daemon)
            assert daemon.stderr is not None
            words = daemon.stderr.read().decode(errors="replace").strip() or str(error)
            raise BlockError(f"the layers could not be read: {words}") from error
        yield readers


def _end(daemon: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
