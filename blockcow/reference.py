"""Hints beside an active layer: the frozen layer that it shares most with.

With it the checksum of the next frozen layer comes from the known one by reading only what changed.
A hint only saves reading: it may be lost, old, or name a layer that is gone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .interface import Layer
from .names import checked_id

SUFFIX = ".ref"


@dataclass(frozen=True)
class Reference:
    """``file`` as in :class:`blockcow.interface.Layer`."""

    id: str
    file: str
    checksum: str
    signature: str


def reference_file(directory: Path, active_id: str) -> Path:
    return directory / f"{checked_id(active_id)}{SUFFIX}"


def refer(directory: Path, active_id: str, frozen: Layer) -> None:
    """Note that the active layer is now what ``frozen`` is. Raises OSError."""
    hint = {"id": frozen.id, "file": frozen.file, "checksum": frozen.checksum,
            "signature": frozen.signature}
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    write = os.open(reference_file(directory, active_id), flags, 0o600)
    try:
        os.write(write, json.dumps(hint).encode())
    finally:
        os.close(write)


def referred(directory: Path, active_id: str) -> Reference | None:
    """What was noted last; None if nothing usable."""
    try:
        hint = json.loads(reference_file(directory, active_id).read_bytes()[:4096])
        found = Reference(hint["id"], hint["file"], hint["checksum"], hint["signature"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if found.checksum else None
