"""What differs between two directory trees: files by their content, then by their attributes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epochs.errors import Failed

_PIECE = 1 << 20
ADDED, REMOVED, CHANGED, ATTRIBUTES = "added", "removed", "changed", "attributes"


@dataclass(frozen=True)
class FileChange:
    """``path`` as in the guest, from the root of its file system. ``change``: added, removed,
    changed (content or kind), or attributes (owner, mode, times, extended attributes)."""

    path: str
    change: str


def compare(a: Path, b: Path) -> list[FileChange]:
    """Changes from tree ``a`` to tree ``b``, sorted by path. Of directories only their attributes
    count, not their times, which change with what is in them; access times never count."""
    try:
        return sorted(_compare(str(a), str(b)), key=lambda one: one.path)
    except OSError as error:
        raise Failed(f"a file system cannot be read through: {error.filename}: {error.strerror}"
                     ) from error


def _compare(a: str, b: str) -> Iterator[FileChange]:
    waiting = [""]  # not by recursion: a guest's directories may be deep
    while waiting:
        below = waiting.pop()
        left, right = _entries(a, below), _entries(b, below)
        for name in sorted(left.keys() | right.keys()):
            path = f"{below}/{name}"
            if name not in right:
                yield from _whole(a, path, left[name], REMOVED)
            elif name not in left:
                yield from _whole(b, path, right[name], ADDED)
            elif stat.S_IFMT(left[name].st_mode) != stat.S_IFMT(right[name].st_mode):
                yield from _whole(a, path, left[name], REMOVED)
                yield from _whole(b, path, right[name], ADDED)
            else:
                change = _change(a + path, b + path, left[name], right[name])
                if change:
                    yield FileChange(path, change)
                if stat.S_ISDIR(left[name].st_mode):
                    waiting.append(path)


def _entries(root: str, below: str) -> dict[str, os.stat_result]:
    with os.scandir(root + below if below else root) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def _whole(root: str, path: str, seen: os.stat_result, change: str) -> Iterator[FileChange]:
    waiting = [(path, seen)]
    while waiting:
        one, found = waiting.pop()
        yield FileChange(one, change)
        if stat.S_ISDIR(found.st_mode):
            waiting += [(f"{one}/{name}", entry) for name, entry in _entries(root, one).items()]


def _change(a: str, b: str, left: os.stat_result, right: os.stat_result) -> str | None:
    directory = stat.S_ISDIR(left.st_mode)
    # The kernel renews ctime with whatever it changes in an inode; where times have whole seconds
    # only (vfat, old ext), that proves nothing.
    exact = left.st_ctime_ns % 10**9 or right.st_ctime_ns % 10**9
    if exact and not directory and _stamp(left) == _stamp(right):
        return None
    if stat.S_ISREG(left.st_mode) and not _same_bytes(a, b, left.st_size, right.st_size):
        return CHANGED
    if stat.S_ISLNK(left.st_mode) and os.readlink(a) != os.readlink(b):  # noqa: PTH115 (bytes)
        return CHANGED
    same = ((left.st_mode, left.st_uid, left.st_gid, left.st_rdev)
            == (right.st_mode, right.st_uid, right.st_gid, right.st_rdev)
            and (directory or left.st_mtime_ns == right.st_mtime_ns)
            and _attributes(a) == _attributes(b))
    return None if same else ATTRIBUTES


def _stamp(seen: os.stat_result) -> tuple[int, ...]:
    return seen.st_ino, seen.st_ctime_ns, seen.st_size, seen.st_mtime_ns


def _same_bytes(a: str, b: str, left_size: int, right_size: int) -> bool:
    if left_size != right_size:
        return False
    with open(a, "rb") as left, open(b, "rb") as right:  # noqa: PTH123 (a guest's names)
        while data := left.read(_PIECE):
            if data != right.read(_PIECE):
                return False
    return True


def _attributes(path: str) -> dict[str, bytes]:
    return {name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)}
