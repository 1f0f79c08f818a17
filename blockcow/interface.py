"""The interface that every disk backend implements, and the words it is spoken in.

A *layer* is what one disk looked like at one instant. Layers form a chain: a layer holds what
differs from its ``backing`` layer. A layer is *active* while a guest writes to it and *frozen*
for ever afterwards. This package knows nothing of machines, epochs or catalogs: callers name
layers with ids that they have recorded beforehand, so that whatever is left by a killed process
can be found and removed by name.

The backends do not talk to a hypervisor either. What they need done inside one (QEMU's block
graph) goes through :class:`LiveBlocks`, which the caller supplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

JsonDict = dict[str, Any]


class BlockError(Exception):
    """A disk operation failed; the message is one sentence for the user."""


class SourceRefused(BlockError):
    """A disk that was offered cannot be used (missing, directory, in use, wrong format …)."""


class LayerDamaged(BlockError):
    """A layer's bytes are not those that were frozen. ``layer_id`` and ``path`` say which."""

    def __init__(self, message: str, layer_id: str, path: Path) -> None:
        super().__init__(message)
        self.layer_id = layer_id
        self.path = path


@dataclass(frozen=True)
class Layer:
    """One layer of one disk, as the caller's catalog stores it.

    ``file`` is relative to the layer directory, or absolute for a base that stays where its
    owner keeps it (which is then never written to). ``size`` is the virtual size in bytes.
    ``checksum`` (of the file's data, holes excluded) and ``signature`` (what stat said when the
    checksum was last known to be right, as "size:mtime_ns:ctime_ns:inode") are None while the
    layer is active. ``level`` says how many times the layer's content was merged: see
    :mod:`blockcow.chains`.
    """

    id: str
    backend: str
    format: str
    file: str
    size: int
    backing: str | None = None
    checksum: str | None = None
    signature: str | None = None
    level: int = 0


@dataclass(frozen=True)
class Source:
    """A disk image that a user offers, after it was checked."""

    path: Path
    format: str
    size: int


class LiveBlocks(Protocol):
    """What a backend may ask of a running hypervisor. Implemented over QMP by the caller."""

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one QMP command and return its result; raises on error."""

    def run_job(self, command: str, job_id: str, **arguments: object) -> None:
        """Start a block job (``blockdev-create`` …), wait until it concluded, dismiss it."""


@dataclass(frozen=True)
class Freeze:
    """One disk's part in a freeze of the layer that the guest writes to.

    ``new_id`` names the one layer that the freeze creates. With qcow2 that is the new active
    layer, and the old active one becomes the frozen one; with reflink it is the frozen copy, and
    the active layer stays what it was. :class:`Frozen` says which. ``node`` is the hypervisor's
    node name of the active layer now, ``new_node`` the one a new active layer must get.
    """

    disk: str
    active: Layer
    new_id: str
    node: str
    new_node: str


@dataclass(frozen=True)
class Frozen:
    """Outcome of one disk's freeze: the layer now immutable and the one the guest writes to."""

    disk: str
    frozen: Layer
    active: Layer


@dataclass(frozen=True)
class Difference:
    """Where two frozen layers of one disk differ: byte ranges ``(offset, length)``, sorted."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(length for _, length in self.ranges)


class FreezeTicket(Protocol):
    """A prepared freeze of all disks of one backend on one machine.

    Order of calls: ``prepare`` (made by :meth:`Backend.prepare_freeze`, guest running), then
    ``freeze`` once inside the pause, then ``seal`` with the guest running again; or ``abort`` at
    any time before ``seal`` returned.
    """

    def freeze(self) -> None:
        """Inside the pause. All disks or none. No process start, no fsync, no file creation."""

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        """After the pause: make the frozen layers durable, checksum them, say what came out."""

    def abort(self) -> None:
        """Undo what ``prepare`` made, as long as ``freeze`` has not succeeded."""


Chain = Sequence[Layer]
"""A layer and everything beneath it, top first. The last one has no backing."""


class Backend(Protocol):
    """One way to keep layers. Constructed with the directory that holds the layer files."""

    name: str

    def available(self) -> str | None:
        """None if this backend can work in its directory, else one sentence saying why not."""

    def adopt(
        self, source: Source, layer_id: str, progress: Callable[[int], None] | None = None
    ) -> Layer:
        """Make a frozen base layer from a user's disk, which itself is never written to."""

    def clone(self, chain: Chain, layer_id: str) -> Layer:
        """A new writable (active) layer over the frozen layer ``chain[0]``."""

    def sync(self, layer: Layer) -> None:
        """Make a layer that was just cloned durable, so that the catalog may name it."""

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        """``-blockdev`` arguments, in order, to open the active layer ``chain[0]`` as ``node``."""

    def prepare_freeze(
        self, live: LiveBlocks, parts: Sequence[tuple[Freeze, Chain]]
    ) -> FreezeTicket:
        """Everything of a freeze that can be done while the guest runs."""

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Sequence[tuple[Freeze, Chain]]
    ) -> Mapping[str, list[Layer]]:
        """After a killed freeze, with nothing committed: per disk name the layers that now hold
        the machine's present state above ``active.backing`` (top, i.e. active, first), and
        nothing else left behind. ``live`` is None if the hypervisor is gone too."""

    def files(self, layer_id: str) -> list[Path]:
        """Every file that this id may have left behind, finished or temporary."""

    def drop(self, layer: Layer) -> None:
        """Remove a layer's files (idempotent). Never a base that belongs to the user."""

    def check(self, layer: Layer, full: bool) -> Layer:
        """Verify one frozen layer. ``full`` reads every byte; otherwise an unchanged signature is
        enough. Returns the layer with a renewed signature; raises LayerDamaged."""

    def usage(self, layer: Layer) -> int:
        """Bytes that the layer occupies on disk."""

    def difference(self, a: Chain, b: Chain) -> Difference:
        """Exact byte ranges in which two frozen layers of one disk differ."""

    # -- keeping chains short ------------------------------------------------------------------
    def consolidate(self, chain: Chain, count: int) -> Layer:
        """Build a replacement for the frozen layer ``chain[0]`` with the same content, holding the
        union of ``chain[:count]`` directly over ``chain[count]``, in a temporary file beside it
        (the returned layer's ``file``; durable, checksummed). No existing file is touched."""

    def promote(self, replacement: Layer) -> Layer:
        """Rename a consolidated replacement over the layer it replaces (atomic, durable). Whoever
        has the old file open keeps the old bytes, which say the same."""

    def rebacking(self, live: LiveBlocks, active: Layer, node: str, chain: Chain) -> None:
        """In a running hypervisor, exchange what lies under the active layer for ``chain``, which
        has the same content, and close what is no longer needed."""
