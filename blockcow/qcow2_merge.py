"""Replacing a frozen layer by its union with layers beneath it.

The layer is copied beside itself and ``qemu-img rebase`` (safe mode) puts the copy over another
backing file: wherever the layer itself holds nothing and the old and the new backing differ, the
old content is written into the copy. It looks only at what is allocated in the layers passed
over, and not in those that both chains share. ``detect-zeroes`` on the copy keeps discarded
ranges from becoming written zeros.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from dataclasses import replace
from pathlib import Path

from .chains import merged_level
from .contents import checksum, data_extents, sealed, signature, sync_file
from .interface import BlockError, Chain, Layer, LayerDamaged
from .names import in_directory
from .qcow2_freeze import overlay_file
from .qcow2_header import read_overlay
from .tools import json_name, run

FICLONE = 0x40049409
"""linux/fs.h: _IOW(0x94, 9, int)"""

SUFFIX = ".merge"


def consolidate(directory: Path, chain: Chain, count: int) -> Layer:
    """See :meth:`blockcow.interface.Backend.consolidate`. Its level is that of
    :func:`blockcow.chains.merged_level`."""
    if not 2 <= count < len(chain):
        raise BlockError(f"{count} layers of a chain of {len(chain)} cannot be merged")
    top, below = chain[0], chain[count]
    if Path(top.file).is_absolute():
        raise BlockError(f"{top.file} belongs to the user and is never replaced")
    _expect_headers(directory, chain[: count + 1])
    name = overlay_file(top.id) + SUFFIX
    path = directory / name
    try:
        copy_sparse(in_directory(directory, top.file), path)
        image = {
            "driver": "qcow2",
            "detect-zeroes": "unmap",
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(path)},
        }
        run(["qemu-img", "rebase", "-b", below.file, "-F", below.format, json_name(image)],
            cwd=directory)  # fmt: skip
        _expect(path, top.size, below)
        digest, seen = sealed(path)
        sync_file(directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        raise
    level = merged_level([layer.level for layer in chain[:count]])
    return replace(top, file=name, backing=below.id, checksum=digest, signature=seen, level=level)


def _expect_headers(directory: Path, chain: Chain) -> None:
    """qemu-img finds the old backing files by the headers, which must say what the chain says."""
    for layer, below in itertools.pairwise(chain):
        path = in_directory(directory, layer.file)
        header = read_overlay(path)
        if header is None or header.backing_file != below.file:
            named = header.backing_file if header else "nothing"
            raise LayerDamaged(
                f"layer {layer.id}: the header of {path} names {named!r} as its backing file "
                f"instead of {below.file!r}; restore it with 'qemu-img rebase -u'",
                layer.id,
                path,
            )


def _expect(path: Path, size: int, below: Layer) -> None:
    made = read_overlay(path)
    run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)])
    if (
        made is None
        or not made.clean
        or (made.size, made.backing_file, made.backing_format) != (size, below.file, below.format)
    ):
        raise BlockError(f"the merged layer {path} is not what was asked for: {made}")


def promote(directory: Path, replacement: Layer) -> Layer:
    """Rename a replacement over the layer it replaces. Done again after a kill it finds the
    rename done and returns the same."""
    temporary = in_directory(directory, replacement.file)
    if not replacement.file.endswith(SUFFIX):
        raise BlockError(f"layer {replacement.id} is not a replacement: consolidate first")
    final = directory / overlay_file(replacement.id)
    try:
        temporary.rename(final)
    except FileNotFoundError:
        if not final.exists() or checksum(final) != replacement.checksum:
            raise LayerDamaged(
                f"the merged layer {replacement.id} is gone: neither {temporary} nor {final} "
                "holds it; merge again",
                replacement.id,
                temporary,
            ) from None
    sync_file(directory)
    return replace(replacement, file=final.name, signature=signature(final))


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, holes kept, mode 0600; a reflink where the file system can."""
    with contextlib.ExitStack() as stack:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, read)
        # A new inode always: the qemu-img of a killed process may still write to the old one.
        target.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        write = os.open(target, flags, 0o600)
        stack.callback(os.close, write)
        try:
            fcntl.ioctl(write, FICLONE, read)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                raise
        size = os.fstat(read).st_size
        os.ftruncate(write, size)
        for start, end in data_extents(read, size):
            os.lseek(read, start, os.SEEK_SET)
            os.lseek(write, start, os.SEEK_SET)
            left = end - start
            while left:
                count = os.sendfile(write, read, None, left)
                if count == 0:
                    raise BlockError(f"{source} shrank while it was copied")
                left -= count
