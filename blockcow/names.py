"""Names derived from a layer id: files in the layer directory, node names inside QEMU.

Everything is derived and nothing is invented, so that whoever knows an id can find what a killed
process left behind.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .interface import BlockError

NODE_NAME_MAX = 31
"""Longest node name QEMU takes (include/block/block_int-common.h, ``node_name[32]``)."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_id(layer_id: str) -> str:
    """The id itself; raises BlockError unless it is safe as part of a file name."""
    if not _ID.fullmatch(layer_id):
        raise BlockError(
            f"layer id {layer_id!r} is not usable: give 1 to 100 letters, digits, '.', '_' or '-'"
        )
    return layer_id


def frozen_node(layer_id: str, path: Path, backing: str | None = None) -> str:
    """Node name of a frozen layer: the same for the same file over the same node ``backing``.

    The file's device and inode are part of it, and so is all that lies beneath. A layer that was
    promoted (renamed over) can so be opened beside its old file, with what rests on it, and one
    that is open already is found again by its name. While a hypervisor holds the old file its
    inode number cannot be given to another.
    """
    seen = path.stat()
    text = f"{layer_id}\0{path}\0{seen.st_dev}\0{seen.st_ino}\0{backing}"
    return f"l.{layer_id[:12]}.{hashlib.blake2s(text.encode()).hexdigest()[:12]}"


def file_node(node: str) -> str:
    """Node name of the protocol (file) node below the format node ``node``."""
    if len(node) + 2 <= NODE_NAME_MAX:
        return f"{node}.f"
    return f"f.{hashlib.blake2s(node.encode()).hexdigest()[:24]}"


def in_directory(directory: Path, file: str) -> Path:
    """The path of ``Layer.file``: relative to the directory, or absolute."""
    return Path(os.path.normpath(directory / file))
