"""Layers that are files: a user's disk that stays where it is, and whether a frozen layer is still
what was frozen. Shared by the backends that keep files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .contents import Progress, checksum, signature
from .interface import BlockError, Layer, LayerDamaged, Source
from .names import checked_id


def in_place(source: Source, layer_id: str, backend: str, progress: Progress | None) -> Layer:
    """The frozen base layer that a user's disk is, without a copy. Reads all its data once, for
    the checksum; ``progress`` gets the bytes read since its last call. BlockError if the disk
    changed meanwhile."""
    before = signature(source.path)
    digest = checksum(source.path, progress)
    if signature(source.path) != before:
        raise BlockError(f"{source.path} was written to while it was read: stop who uses it")
    return Layer(checked_id(layer_id), backend, source.format, str(source.path.absolute()),
                 source.size, checksum=digest, signature=before)


def checked(path: Path, layer: Layer, full: bool) -> Layer:
    """See :meth:`blockcow.interface.Backend.check`. ``path`` is the layer's file."""
    if layer.checksum is None:
        raise BlockError(f"layer {layer.id} is not frozen yet: there is no checksum to check")
    whose = f"the disk {path}, on which layer {layer.id} rests," if Path(
        layer.file).is_absolute() else f"layer {layer.id} ({path})"  # fmt: skip
    mend = (
        "restore that file from a backup, and do not write to it while epochs use it"
        if Path(layer.file).is_absolute()
        else "delete the epochs that use it, or restore the file from a backup"
    )
    try:
        seen = signature(path)
        if not full and seen == layer.signature:
            return layer
        actual = checksum(path)
    except FileNotFoundError:
        raise LayerDamaged(f"{whose} is missing: {mend}", layer.id, path) from None
    except (OSError, BlockError) as error:
        raise LayerDamaged(f"{whose} cannot be read ({error}): {mend}", layer.id, path) from error
    if actual != layer.checksum:
        told = "was modified since it was added" if Path(layer.file).is_absolute() else "is damaged"
        raise LayerDamaged(f"{whose} {told} (its checksum differs): {mend}", layer.id, path)
    return replace(layer, signature=seen)
