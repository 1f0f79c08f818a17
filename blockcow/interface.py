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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

JsonDict = dict[str, Any]


class BlockError(Exception):
    """A disk operation failed; the message is one sentence for the user."""


class SourceRefused(BlockError):
    """A disk that was offered cannot be used (missing, directory, in use, wrong format …)."""


class BlockRefused(BlockError):
    """Something that cannot be done as things are; nothing was changed."""


class BlockDamaged(BlockError):
    """What is stored beside layers (labels, metadata, tables) is not what was written."""


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

    ``owner`` says whose disk it is, for people, where a backend has a place to write that down
    ("machine:disk"). ``space``: bytes to set aside for the frozen layer, where a backend has to
    know beforehand; None lets it choose.
    """

    disk: str
    active: Layer
    new_id: str
    node: str
    new_node: str
    owner: str = ""
    space: int | None = None


@dataclass(frozen=True)
class Frozen:
    """Outcome of one disk's freeze: the layer now immutable and the one the guest writes to.
    ``written``: bytes that the frozen layer does not share with the one before it."""

    disk: str
    frozen: Layer
    active: Layer
    written: int


@dataclass(frozen=True)
class Room:
    """What is left where layers of a disk grow, in bytes. ``what`` names it for people and ``mend``
    says how it gets more; ``block`` is the unit in which space is taken, ``metadata`` what is left
    of the list of blocks (None where that is no limit of its own)."""

    what: str
    mend: str
    block: int
    data: int
    data_total: int
    metadata: int | None = None
    metadata_total: int | None = None


@dataclass(frozen=True)
class Difference:
    """Where two frozen layers of one disk differ: byte ranges ``(offset, length)``, sorted."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(length for _, length in self.ranges)


class FreezeTicket(Protocol):
    """A prepared freeze of all disks of one backend on one machine.

    Order of calls: ``prepare`` (made by :meth:`Backend.prepare_freeze`, guest running), ``arm``
    once all tickets are prepared, ``freeze`` once inside the pause, ``disarm`` of all tickets,
    then ``seal`` with the guest running again; or ``abort`` at any time before ``seal`` returned,
    with all tickets disarmed.
    """

    def arm(self) -> None:
        """The last step before the pause: keep others out. No tool is run from now on."""

    def disarm(self) -> None:
        """Let others in again; repeatable, and nothing if it is not armed."""

    def freeze(self) -> None:
        """Inside the pause. All disks or none. No process start, no fsync, no file creation."""

    def seal(self, progress: Callable[[int], None] | None = None) -> list[Frozen]:
        """After the pause: make the frozen layers durable, checksum them, say what came out."""

    def abort(self) -> None:
        """Undo what ``prepare`` made, as long as ``freeze`` has not succeeded."""


Chain = Sequence[Layer]
"""A layer and everything beneath it, top first. The last one has no backing."""

Parts = Sequence[tuple[Freeze, Chain]]
"""A machine's disks of one backend: what is to be frozen, and the chain it is the top of."""


class Backend(Protocol):
    """One way to keep layers. Constructed with the directory that holds the layer files.

    ``direct``: guests' I/O goes past the host's page cache, because what is behind it can run out
    of space: a write that fails must fail for the guest's request, not later in a cache.
    ``takes_over``: there is one place only for a machine's disk, see :meth:`take_over`.
    """

    name: str
    direct: bool
    takes_over: bool

    def available(self) -> str | None:
        """None if this backend can work in its directory, else one sentence saying why not."""

    def adopt(
        self, source: Source, layer_id: str, progress: Callable[[int], None] | None = None, *,
        owner: str = "",
    ) -> Layer:
        """Make a frozen base layer from a user's disk, which itself is never written to (but see
        :mod:`blockcow.lvm_thick`). ``owner`` as in :class:`Freeze`."""

    def clone(self, chain: Chain, layer_id: str, *, owner: str = "") -> Layer:
        """A new writable (active) layer over the frozen layer ``chain[0]``."""

    def fork_refusal(self, layer: Layer) -> str | None:
        """None if more than one active layer at a time can be over a frozen layer, else why not,
        and what to do instead."""

    def ready_to_take_over(self, chain: Chain) -> None:
        """Whether :meth:`take_over` could be done now; the guest that has the layer before it
        stands still. Raises LayerDamaged or BlockRefused if not."""

    def take_over(self, chain: Chain) -> Layer:
        """The active layer ``chain[0]`` is now its machine's only one, no hypervisor has the one
        before it open, and the guest has not written to this one yet. Returns the layer as it is
        from now on. Killed anywhere, call it again."""

    def sync(self, layer: Layer) -> None:
        """Make a layer that was just cloned durable, so that the catalog may name it."""

    def activate(self, chain: Chain) -> None:
        """Make the active layer ``chain[0]`` something that a hypervisor can open (devices).
        Nothing to do where layers are files. Raises LayerDamaged if it is gone."""

    def deactivate(self, layer: Layer) -> None:
        """Undo :meth:`activate` once no hypervisor has it open; idempotent."""

    def go_on(self, layer: Layer) -> None:
        """Let the I/O of an active layer go on that a killed :meth:`rebacking` holds up."""

    def blockdev(self, chain: Chain, node: str) -> list[JsonDict]:
        """``-blockdev`` arguments, in order, to open the active layer ``chain[0]`` as ``node``."""

    def prepare_freeze(
        self, live: LiveBlocks, parts: Parts
    ) -> FreezeTicket:
        """Everything of a freeze that can be done while the guest runs."""

    def recover_freeze(
        self, live: LiveBlocks | None, parts: Parts
    ) -> Mapping[str, list[Layer]]:
        """After a killed freeze, with nothing committed: per disk name the layers that now hold
        the machine's present state above ``active.backing`` (top, i.e. active, first), and
        nothing else left behind. ``live`` is None if the hypervisor is gone too."""

    def files(self, layer_id: str) -> list[Path]:
        """Every file that this id may have left behind, finished or temporary."""

    def discard(self, layer_id: str) -> None:
        """Remove whatever this id may have left behind, files, devices and volumes; idempotent."""

    def strays(self, known: set[str]) -> list[str]:
        """What this backend has made that is no file and belongs to no layer id in ``known``, in
        words for people."""

    def drop(self, layer: Layer) -> None:
        """Remove a layer's files (idempotent). Never a base that belongs to the user."""

    def check(self, layer: Layer, full: bool) -> Layer:
        """Verify one frozen layer. ``full`` reads every byte; otherwise an unchanged signature is
        enough. Returns the layer with a renewed signature; raises LayerDamaged."""

    def room(self, layer: Layer) -> Room | None:
        """What is left where this layer grows; None where that is the file system of the layer
        directory, which the caller knows itself."""

    def usage(self, layer: Layer) -> int:
        """Bytes that the layer occupies on disk."""

    def exposed(self, chain: Chain) -> AbstractContextManager[JsonDict]:
        """The frozen layer ``chain[0]`` as a tree of options of a read-only QEMU block node, which
        tools take as a ``json:`` name; valid within the context. Raises LayerDamaged."""

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


class Plain:
    """What most backends answer where they have nothing special to do."""

    direct = False
    takes_over = False

    def sync(self, layer: Layer) -> None:
        """Nothing to do: what was made is durable."""

    def activate(self, chain: Chain) -> None:
        """Nothing to do: layers are files."""

    def deactivate(self, layer: Layer) -> None:
        """Nothing to do: layers are files."""

    def go_on(self, layer: Layer) -> None:
        """Nothing is ever held up."""

    def fork_refusal(self, layer: Layer) -> str | None:
        return None

    def ready_to_take_over(self, chain: Chain) -> None:
        """Nothing has to be taken over."""

    def take_over(self, chain: Chain) -> Layer:
        return chain[0]

    def strays(self, known: set[str]) -> list[str]:
        return []

    def room(self, layer: Layer) -> Room | None:
        return None

    # -- chains: of layers that stand alone ----------------------------------------------------
    def consolidate(self, chain: Chain, count: int) -> Layer:
        raise BlockError("these layers stand alone: there is nothing to merge")

    def promote(self, replacement: Layer) -> Layer:
        raise BlockError("these layers stand alone: there is nothing to merge")

    def rebacking(self, live: LiveBlocks, active: Layer, node: str, chain: Chain) -> None:
        """Nothing lies under a layer that stands alone."""


class PlainFreeze:
    """What most tickets do where there is nobody to keep out."""

    def arm(self) -> None:
        """Nothing to do."""

    def disarm(self) -> None:
        """Nothing to do."""
