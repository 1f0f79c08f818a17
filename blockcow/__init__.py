"""Disks: freeze, clone, drop, compare. One backend per way to keep layers.

    >>> disks = backend(choose(directory), directory)

The words are defined in :mod:`blockcow.interface`, the bytes on disk in ``docs/layers.md``.
Exceptions: :class:`BlockError` is the base; :class:`SourceRefused` and :class:`LayerDamaged`
are its kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .interface import (
    Backend,
    BlockDamaged,
    BlockError,
    BlockRefused,
    Chain,
    Difference,
    Freeze,
    FreezeTicket,
    Frozen,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Room,
    Source,
    SourceRefused,
)

if TYPE_CHECKING:
    from .dmthin import Pools

BACKENDS = ("qcow2", "reflink", "dmthin", "lvm-thin", "lvm-thick", "dmsnap")
LVM = "lvm"
"""What a user names; :func:`lvm_backend` says which of the two it is for a disk."""
DIRECT = frozenset({"dmthin", "lvm-thin", "lvm-thick", "dmsnap"})
"""Backends that have ``direct`` set: guests' I/O goes past the page cache."""


def backend(name: str, directory: Path, locks: Path | None = None,
            pools: Pools | None = None, owner: str = "") -> Backend:
    """The backend of that name for one layer directory. Raises BlockError for another name.

    Those over device-mapper need a directory for lock files, and what the caller knows of pools;
    volumes of LVM are tagged with ``owner``, and those of other owners left alone.
    """
    if name == "qcow2":
        from .qcow2 import Qcow2Backend

        return Qcow2Backend(directory)
    if name == "reflink":
        from .reflink import ReflinkBackend

        return ReflinkBackend(directory)
    if name == "dmthin" and locks is not None and pools is not None:
        from .dmthin import DmThinBackend

        return DmThinBackend(directory, locks, pools)
    if name == "lvm-thin" and locks is not None:
        from .lvm_thin import LvmThinBackend

        return LvmThinBackend(directory, locks, owner)
    if name == "lvm-thick" and locks is not None:
        from .lvm_thick import LvmThickBackend

        return LvmThickBackend(directory, locks, owner)
    if name == "dmsnap" and locks is not None:
        from .dmsnap import DmSnapBackend

        return DmSnapBackend(directory, locks)
    raise BlockError(f"there is no disk backend {name!r}: choose one of {', '.join(BACKENDS)}")


def lvm_backend(path: Path, locks: Path) -> str:
    """The backend for the logical volume at ``path``. Raises SourceRefused if it is none."""
    from .lvm_tools import Lvm, kind_of

    return kind_of(Lvm(locks).offered(path))


def written_volume(path: Path, locks: Path, owner: str) -> tuple[str, str | None]:
    """Of an ordinary logical volume, which a guest writes to itself: the signature that its base
    layer would have, and the name of a snapshot of it that belongs to somebody else than
    ``owner``."""
    from .lvm_tools import TAG, Lvm

    lvm = Lvm(locks)
    given = lvm.offered(path)
    for found in lvm.volumes(f'vg_name="{given.vg}" && origin="{given.name}" && tags="{TAG}"'):
        if f"{TAG}-store={owner}" not in found.tags:
            return f"lv:{given.uuid}", found.full_name
    return f"lv:{given.uuid}", None


def choose(directory: Path) -> str:
    """The best backend for a directory: ``reflink`` where its file system can, else ``qcow2``."""
    return "reflink" if backend("reflink", directory).available() is None else "qcow2"


__all__ = [
    "BACKENDS",
    "DIRECT",
    "LVM",
    "Backend",
    "BlockDamaged",
    "BlockError",
    "BlockRefused",
    "Chain",
    "Difference",
    "Freeze",
    "FreezeTicket",
    "Frozen",
    "Layer",
    "LayerDamaged",
    "LiveBlocks",
    "Room",
    "Source",
    "SourceRefused",
    "backend",
    "choose",
    "lvm_backend",
    "written_volume",
]
