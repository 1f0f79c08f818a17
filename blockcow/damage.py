"""Is a frozen layer still what was frozen? Shared by the backends that keep files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .contents import checksum, signature
from .interface import BlockError, Layer, LayerDamaged


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
