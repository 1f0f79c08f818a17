"""The ``qcow2`` backend: chains of overlays on any file system, unprivileged.

A user's disk stays where it is and becomes the frozen base. Every other layer is a file
``ID.qcow2`` in the layer directory, with its difference to the layer beneath.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import qcow2_merge
from .contents import Progress, sealed, sync_file
from .difference import differing
from .interface import (
    BlockError,
    Chain,
    Difference,
    FreezeTicket,
    JsonDict,
    Layer,
    LayerDamaged,
    LiveBlocks,
    Parts,
    Plain,
    Source,
)
from .layer_files import checked, in_place
from .names import in_directory
from .qcow2_freeze import Qcow2Freeze, files, overlay_layer, recover, remove
from .qcow2_graph import (
    active_options,
    backing_nodes,
    chain_options,
    frozen_options,
    nested,
    open_nodes,
    reopen_options,
)
from .qcow2_header import create_overlay


class Qcow2Backend(Plain):
    """See :class:`blockcow.interface.Backend`. ``directory`` must exist (mode 0700)."""

    name = "qcow2"

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 (keep symbolic links)

    def available(self) -> str | None:
        if shutil.which("qemu-img") is None:
            return "qemu-img is not installed: install it (Debian: apt install qemu-utils)"
        if not os.access(self.directory, os.W_OK | os.X_OK):
            return f"{self.directory} is not a directory that we can write to: create it, mode 0700"
        return None

    def adopt(self, source: Source, layer_id: str, progress: Progress | None = None, *,
              owner: str = "") -> Layer:
        """Reads all of the disk's data once, for the checksum. ``progress`` gets the bytes read
        since its last call. Raises BlockError if the disk changed meanwhile."""
        return in_place(source, layer_id, self.name, progress)

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        below = chain[0]
        layer = overlay_layer(layer_id, below)
        create_overlay(self.directory / layer.file, below.size, below.file, below.format)
        return layer

    def sync(self, layer: Layer) -> None:
        sync_file(self.directory / layer.file)
        sync_file(self.directory)

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        """Raises LayerDamaged if a layer's file is missing."""
        self._require_files(chain)
        below = chain_options(self.directory, chain[1:])
        backing = below[-1]["node-name"] if below else None
        path = in_directory(self.directory, chain[0].file)
        return [*below, active_options(path, node, backing)]

    def _require_files(self, chain: Chain) -> None:
        for layer in chain:
            path = in_directory(self.directory, layer.file)
            if not path.exists():
                raise LayerDamaged(f"layer {layer.id} ({path}) is missing", layer.id, path)

    def prepare_freeze(
        self, live: LiveBlocks, parts: Parts
    ) -> FreezeTicket:
        return Qcow2Freeze.prepare(self.directory, live, parts)

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        return recover(self.directory, live, parts)

    def files(self, layer_id: str) -> list[Path]:
        return files(self.directory, layer_id)

    def discard(self, layer_id: str) -> None:
        remove(self.directory, layer_id)

    def drop(self, layer: Layer) -> None:
        """Of a replacement that was not promoted only its own file; of any other layer every
        file of its id."""
        if Path(layer.file).is_absolute():
            return
        if layer.file.endswith(qcow2_merge.SUFFIX):
            (self.directory / layer.file).unlink(missing_ok=True)
        else:
            remove(self.directory, layer.id)

    def check(self, layer: Layer, full: bool) -> Layer:
        return checked(in_directory(self.directory, layer.file), layer, full)

    def usage(self, layer: Layer) -> int:
        """0 for a base that belongs to the user, whose space is not ours."""
        if Path(layer.file).is_absolute():
            return 0
        return (self.directory / layer.file).stat().st_blocks * 512

    @contextmanager
    def exposed(self, chain: Chain) -> Iterator[JsonDict]:
        self._require_files(chain)
        yield nested(chain_options(self.directory, chain))

    def difference(self, a: Chain, b: Chain) -> Difference:
        return differing(self.directory, a, b)

    def seal_layer(self, layer: Layer) -> Layer:
        """Freeze a layer that no process writes to any more: durable, checksummed."""
        digest, seen = sealed(in_directory(self.directory, layer.file))
        return replace(layer, checksum=digest, signature=seen)

    def consolidate(self, chain: Chain, count: int) -> Layer:
        """What is merged is checked before, so that no damage gets a fresh checksum."""
        for layer in chain[:count]:
            if layer.checksum is not None:
                self.check(layer, full=False)
        return qcow2_merge.consolidate(self.directory, chain, count)

    def promote(self, replacement: Layer) -> Layer:
        """The caller records the replacement before: killed in between, promote it again."""
        return qcow2_merge.promote(self.directory, replacement)

    def rebacking(self, live: LiveBlocks, active: Layer, node: str, chain: Chain) -> None:
        """``chain`` begins with the frozen layer under ``active``. Files that are open already
        keep their nodes. Killed in between, call it again: the guest reads the same all along (at
        worst the old nodes stay open, read-only, until the process ends)."""
        if not chain or active.backing != chain[0].id:
            raise BlockError(f"the chain does not begin with what lies under layer {active.id}")
        opened: list[str] = []
        try:
            top = self._open_chain(live, chain, opened)
            old = backing_nodes(live, node)
            live.execute("blockdev-reopen", options=[reopen_options(node, top)])
        except Exception as error:
            for name in reversed(opened):
                live.execute("blockdev-del", **{"node-name": name})
            raise BlockError(
                f"the layers under {active.id} could not be exchanged: {error}"
            ) from error
        keep = set(backing_nodes(live, node))
        for name in old:
            if name not in keep:
                live.execute("blockdev-del", **{"node-name": name})

    def _open_chain(self, live: LiveBlocks, chain: Chain, opened: list[str]) -> str:
        """Open what is not open yet, base first; returns the top node's name."""
        nodes = open_nodes(live)
        below: str | None = None
        for layer in reversed(chain):
            options = frozen_options(self.directory, layer, below)
            name: str = options["node-name"]
            if name not in nodes:
                live.execute("blockdev-add", **options)
                opened.append(name)
            below = name
        assert below is not None
        return below
