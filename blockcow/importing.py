"""Copying a disk that a user offers onto a device of ours, which reads as zero so far."""

from __future__ import annotations

import os
from pathlib import Path

from .contents import BLOCK, CHUNK, Progress, checksum_of, data_extents
from .interface import BlockError, Source
from .tools import run


def copy_into(device: Path, source: Source, progress: Progress | None = None) -> str:
    """Stream the disk onto ``device``, holes and zeros left out, and make it durable; returns the
    checksum of what is there, read back. ``progress`` gets the bytes done since its last call.
    BlockError, also if the source is of another size than it was."""
    if source.format == "raw":
        extents = _copy_raw(device, source, progress)
    else:
        run(["qemu-img", "convert", "-n", "--target-is-zero", "-f", source.format, "-O", "raw",
             str(source.path), str(device)])
        extents = [(0, source.size)]
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read now comes from the device
        return checksum_of(fd, extents)
    finally:
        os.close(fd)


def _copy_raw(device: Path, source: Source, progress: Progress | None) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    read = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.lseek(read, 0, os.SEEK_END) != source.size:
                raise BlockError(f"{source.path} changed its size: offer it again")
            for first, last in data_extents(read, source.size):
                # Whole blocks, as the checksum takes them: what lies around the data is a hole.
                start = max(first // BLOCK * BLOCK, found[-1][1] if found else 0)
                end = min(source.size, -(-last // BLOCK) * BLOCK)
                for offset in range(start, end, CHUNK):
                    _copy_chunk(read, write, offset, min(CHUNK, end - offset))
                    if progress is not None:
                        progress(min(CHUNK, end - offset))
                if start < end:
                    found.append((start, end))
            os.fsync(write)
        finally:
            os.close(write)
    except OSError as error:
        raise BlockError(f"{source.path} was not copied: {error.strerror}") from error
    finally:
        os.close(read)
    return found


def _copy_chunk(read: int, write: int, offset: int, length: int) -> None:
    data = memoryview(os.pread(read, length, offset))
    if len(data) != length:
        raise BlockError("the disk shrank while it was read")
    for at in range(0, length, BLOCK):
        piece = data[at:at + BLOCK]
        if piece != bytes(len(piece)):
            done = 0
            while done < len(piece):
                done += os.pwrite(write, piece[done:], offset + at + done)
