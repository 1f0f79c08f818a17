"""Freezing qcow2 disks in a running QEMU, and tidying up after a freeze that was killed.

========  =======  ====================================================================
step      guest    what happens
========  =======  ====================================================================
prepare   runs     empty overlay files written, opened in QEMU, attached to nothing; the
                   active files' dirty pages written out, so that the pause need not
freeze    stopped  one ``transaction`` of ``blockdev-snapshot``: QEMU does all or none, and
                   reopens the old active layers read-only
seal      runs     fsync and checksum of what is frozen now
========  =======  ====================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .contents import sealed, sync_data, sync_file
from .interface import (
    BlockError,
    Chain,
    Freeze,
    Frozen,
    JsonDict,
    Layer,
    LiveBlocks,
    Parts,
    PlainFreeze,
)
from .names import checked_id, in_directory
from .qcow2_graph import active_options, backing_nodes, open_nodes
from .qcow2_header import create_overlay, read_overlay


def overlay_file(layer_id: str) -> str:
    return f"{checked_id(layer_id)}.qcow2"


def overlay_layer(layer_id: str, backing: Layer) -> Layer:
    """The active layer ``layer_id`` over ``backing``, as the catalog stores it."""
    return Layer(
        id=layer_id,
        backend="qcow2",
        format="qcow2",
        file=overlay_file(layer_id),
        size=backing.size,
        backing=backing.id,
    )


class Qcow2Freeze(PlainFreeze):
    """See :class:`blockcow.interface.FreezeTicket`. Made by :meth:`prepare`."""

    def __init__(self, directory: Path, live: LiveBlocks, parts: Parts) -> None:
        self._directory = directory
        self._live = live
        self._parts = parts
        self._frozen = False
        self._actions: list[JsonDict] = [
            {"type": "blockdev-snapshot", "data": {"node": part.node, "overlay": part.new_node}}
            for part, _ in parts
        ]

    @classmethod
    def prepare(cls, directory: Path, live: LiveBlocks, parts: Parts) -> Qcow2Freeze:
        """Make and open the overlays; raises BlockError with nothing left behind."""
        for part, chain in parts:
            _expect_active(part, chain)
        ticket = cls(directory, live, parts)
        created: list[Freeze] = []
        try:
            for part, _ in parts:
                path = in_directory(directory, overlay_file(part.new_id))
                create_overlay(path, part.active.size, part.active.file, part.active.format)
                created.append(part)
                live.execute("blockdev-add", **active_options(path, part.new_node, None))
            for part, _ in parts:
                sync_data(in_directory(directory, part.active.file))
        except BaseException as error:
            for part in created:
                _remove_unattached(directory, live, part)
            if isinstance(error, BlockError) or not isinstance(error, Exception):
                raise
            raise BlockError(f"the disks could not be prepared for the freeze: {error}") from error
        return ticket

    def freeze(self) -> None:
        """Exactly one QMP transaction. Raises BlockError if it failed: no disk changed then."""
        if self._frozen:
            raise BlockError("this freeze was done already: prepare another one")
        if not self._actions:
            self._frozen = True
            return
        try:
            self._live.execute("transaction", actions=self._actions)
        except Exception as error:
            raise BlockError(f"QEMU did not freeze the disks: {error}") from error
        self._frozen = True

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        if not self._frozen:
            raise BlockError("nothing is frozen yet: call freeze() before seal()")
        outcome = []
        for part, _ in self._parts:
            active = overlay_layer(part.new_id, part.active)
            sync_file(in_directory(self._directory, active.file))
            path = in_directory(self._directory, part.active.file)
            checksum, signature = sealed(path, progress)
            frozen = replace(part.active, checksum=checksum, signature=signature)
            outcome.append(Frozen(part.disk, frozen, active, path.stat().st_blocks * 512))
        if self._parts:
            sync_file(self._directory)
        return outcome

    def abort(self) -> None:
        """Remove the overlays. After a freeze that succeeded they hold what the guest writes:
        then nothing is touched (:func:`recover` says what the machine's state is)."""
        if self._frozen:
            return
        for part, _ in self._parts:
            _remove_unattached(self._directory, self._live, part)


def _expect_active(part: Freeze, chain: Chain) -> None:
    if not chain or chain[0].id != part.active.id or part.active.backing is None:
        raise BlockError(f"disk {part.disk!r}: the chain does not begin with its active layer")


def _remove_unattached(directory: Path, live: LiveBlocks | None, part: Freeze) -> None:
    if live is not None and part.new_node in open_nodes(live):
        live.execute("blockdev-del", **{"node-name": part.new_node})
    remove(directory, part.new_id)


def remove(directory: Path, layer_id: str) -> None:
    """Unlink whatever files a layer id has; idempotent."""
    for path in files(directory, layer_id):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def files(directory: Path, layer_id: str) -> list[Path]:
    """The overlay, the one being created, the one being merged."""
    name = overlay_file(layer_id)
    return [directory / name, directory / f"{name}.tmp", directory / f"{name}.merge"]


def recover(directory: Path, live: LiveBlocks | None, parts: Parts) -> dict[str, list[Layer]]:
    """See :meth:`blockcow.interface.Backend.recover_freeze`. Safe to be killed and run again.

    With QEMU alive its graph decides: an overlay that has a backing node is on top, any other
    is removed. With QEMU gone, an overlay that holds nothing is removed, for the disk reads the
    same without it; one that holds something was on top.
    """
    outcome = {}
    for part, _ in parts:
        path = in_directory(directory, overlay_file(part.new_id))
        if _on_top(live, part, path):
            active_path = in_directory(directory, part.active.file)
            sync_file(path)
            checksum, signature = sealed(active_path)
            frozen = replace(part.active, checksum=checksum, signature=signature)
            outcome[part.disk] = [overlay_layer(part.new_id, part.active), frozen]
        else:
            _remove_unattached(directory, live, part)
            outcome[part.disk] = [part.active]
    if parts:
        sync_file(directory)
    return outcome


def _on_top(live: LiveBlocks | None, part: Freeze, path: Path) -> bool:
    if live is not None:
        return part.new_node in open_nodes(live) and bool(backing_nodes(live, part.new_node))
    overlay = read_overlay(path)
    return overlay is not None and not overlay.empty
