"""Disks: freeze, clone, drop, compare. One backend per way to keep layers.

    >>> disks = backend(choose(directory), directory)

The words are defined in :mod:`blockcow.interface`, the bytes on disk in ``docs/layers.md``.
Exceptions: :class:`BlockError` is the base; :class:`SourceRefused` and :class:`LayerDamaged`
are its kinds.
"""

from __future__ import annotations

from pathlib import Path

from .interface import (
    Backend,
    BlockError,
    Chain,
    Difference,
    Freeze,
    FreezeTicket,
    Frozen,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Source,
    SourceRefused,
)

BACKENDS = ("qcow2", "reflink")


def backend(name: str, directory: Path) -> Backend:
    """The backend of that name for one layer directory. Raises BlockError for another name."""
    if name == "qcow2":
        from .qcow2 import Qcow2Backend

        return Qcow2Backend(directory)
    if name == "reflink":
        from .reflink import ReflinkBackend

        return ReflinkBackend(directory)
    raise BlockError(f"there is no disk backend {name!r}: choose one of {', '.join(BACKENDS)}")


def choose(directory: Path) -> str:
    """The best backend for a directory: ``reflink`` where its file system can, else ``qcow2``."""
    return "reflink" if backend("reflink", directory).available() is None else "qcow2"


__all__ = [
    "BACKENDS",
    "Backend",
    "BlockError",
    "Chain",
    "Difference",
    "Freeze",
    "FreezeTicket",
    "Frozen",
    "Layer",
    "LayerDamaged",
    "LiveBlocks",
    "Source",
    "SourceRefused",
    "backend",
    "choose",
]
