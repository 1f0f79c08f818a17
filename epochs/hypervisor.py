"""What the protocol asks of a hypervisor, and the words it is spoken in.

There is one :class:`Hypervisor` for each kind: :mod:`epochs.qemu.driver`, :mod:`epochs.xen.driver`.
A machine's specification says which it has; everything in :mod:`epochs.protocol` is the same for
all of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockcow import Frozen, Layer, LiveBlocks, Source
from epochs.catalog import (
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    JournalRecord,
    MachineRecord,
)
from epochs.errors import Failed
from epochs.fixup import Fixup, Wishes
from epochs.spec import XEN, DiskSpec, MachineSpec
from epochs.store import StoreFiles
from memsave import Image, WriteResult

if TYPE_CHECKING:
    from epochs.protocol.journal import Operation

RUNNING, PAUSED, OFF, DIED, SUSPENDED = "running", "paused", "off", "died", "suspended"

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total), both in the same unit."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """The progress function of callers that show none."""


@dataclass(frozen=True)
class State:
    """``word`` is one of off, running, paused, died, suspended (``detail`` says by whom), or the
    hypervisor's own word for a guest that is stuck."""

    word: str
    instance: InstanceRecord | None = None
    detail: str | None = None

    @property
    def alive(self) -> bool:
        return self.word not in (OFF, DIED)


@dataclass(frozen=True)
class Target:
    """Names of everything that launching one instance creates, fixed before it begins.

    ``layers`` maps disk names to ids of new active layers; a cold start keeps existing ones.
    """

    machine: str
    instance: str
    layers: Mapping[str, str]

    def to_plan(self) -> dict[str, Any]:
        return {"machine": self.machine, "instance": self.instance, "layers": dict(self.layers)}

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> Target:
        return cls(plan["machine"], plan["instance"], plan["layers"])


@dataclass
class Laps:
    """Named steps in seconds."""

    steps: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.steps[name] = now - self.last
        self.last = now

    def rest(self, steps: Mapping[str, float]) -> None:
        """Steps that another clock measured since the last one."""
        self.steps.update(steps)
        self.last = time.perf_counter()


@dataclass(frozen=True)
class Launch:
    """What an instance is made of: disks that are there already, each with its chain, and an epoch,
    or None to boot. ``fork``: it gets an identity of its own. ``same_generation``: the guest is not
    to notice that it is another one. ``layers``: those that are new."""

    machine: MachineRecord
    disks: list[DiskRecord]
    target: Target
    epoch: EpochRecord | None
    fork: bool
    same_generation: bool
    layers: dict[str, Layer]
    chains: dict[str, list[Layer]]
    clock: Laps


@dataclass
class Ready(ABC):
    """An instance that is held and complete but in no catalog row yet. Context manager: the end of
    the block lets go of the connection to it, not of the instance."""

    record: InstanceRecord
    layers: dict[str, Layer]
    packs: frozenset[str]
    timings: dict[str, float]
    standby: str | None = field(default=None, kw_only=True)
    """The machine that nobody sees whose instance it was (:mod:`epochs.protocol.standby`)."""

    @abstractmethod
    def go_on(self) -> None:
        """Let its guest run."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection."""

    def __enter__(self) -> Ready:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Work:
    """What one create has fixed before it begins: the names of all it makes."""

    store: StoreFiles
    machine: MachineRecord
    disks: list[DiskRecord]
    instance: InstanceRecord
    epoch: str
    pack: str
    new_layers: dict[str, str]
    operation: Operation
    flat: bool | None
    progress: Progress

    @property
    def directory(self) -> Path:
        return self.store.epoch_dir(self.epoch)


@dataclass(frozen=True)
class Sealed:
    """What came out of a create: ``signature`` is of its pack, ``figures`` are those of the pause,
    under the names of docs/json.md. ``based``: the image is what the instance's written pages are
    told from, from now on. Memory map, device state and thumbnail are in the epoch's directory."""

    frozen: list[Frozen]
    written: WriteResult
    signature: str | None
    figures: dict[str, Any]
    thumbnail: bool
    based: bool

    @property
    def image(self) -> Image:
        return self.written.image


class Hypervisor(ABC):
    """One kind of hypervisor. Holds no state of its own."""

    @abstractmethod
    def accept(self, store: StoreFiles, name: str, spec: MachineSpec) -> MachineSpec:
        """A specification with what it leaves open filled in. Refused if it cannot work; nothing
        is recorded or changed."""

    @abstractmethod
    def choose_backend(self, store: StoreFiles, disk: DiskSpec, source: Source) -> str:
        """The backend of a disk for which none is named. Refused if one has to be."""

    @abstractmethod
    def platform(self, store: StoreFiles, spec: MachineSpec) -> tuple[str, str]:
        """(accelerator, machine type) that a machine gets on this host."""

    @abstractmethod
    def state(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord) -> State:
        """What an instance is doing now."""

    @abstractmethod
    def ended(self, instance: InstanceRecord) -> bool:
        """Whether an instance is gone; nothing is asked of it that it might not answer."""

    @abstractmethod
    def describe(self, store: StoreFiles, instance: InstanceRecord) -> dict[str, Any]:
        """What ``status`` says of a living instance: its ``pid`` and ``address``, or ``domid``
        (docs/json.md)."""

    @abstractmethod
    def forked(self, machine: MachineRecord, epoch: EpochRecord,
               source: MachineRecord | None) -> MachineRecord:
        """A new machine of an epoch, with what the hypervisor must keep of it filled in. ``source``
        is the machine that it was made of, if that is still there."""

    @abstractmethod
    def launch(self, store: StoreFiles, launch: Launch) -> Ready:
        """Make an instance: of an epoch, or about to boot. What was made until it raises is removed
        by ``end``."""

    has_standbys = False
    """Whether instances can be made ahead of need."""

    def held(self, store: StoreFiles, machine: MachineRecord, record: InstanceRecord,
             layers: dict[str, Layer], packs: frozenset[str]) -> Ready:
        """A standby that was made ahead of need, as the instance of ``machine`` that ``record``
        says. HypervisorDied if it is gone."""
        raise Failed(f"machine '{machine.name}' has no standby instances")

    @abstractmethod
    def end(self, store: StoreFiles, instance_id: str) -> None:
        """End an instance at once, recorded or not, and everything that was making it, and wait
        until they are gone; nothing if there is none."""

    def strike(self, store: StoreFiles, machine: MachineRecord,
               instance: InstanceRecord) -> None:
        """Have the guest of a recorded instance run no more, at once; whoever calls this calls
        ``end`` as well. What the machine's next instance needs is free when this returns."""
        self.end(store, instance.id)

    def released(self, store: StoreFiles,  # noqa: B027 - most have nothing to do
                 machine_id: str) -> None:
        """Nothing of the machine runs any more: give back what it had on this host besides."""

    def alone(self, store: StoreFiles,  # noqa: B027 - most have nothing to do
              machine: MachineRecord, instance_id: str) -> None:
        """The instance is now its machine's only one: take over what there is once."""

    @abstractmethod
    def fix_up(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
               event: str, epoch: str, wishes: Wishes) -> Fixup:
        """Tell a running guest that it goes on from an epoch, by "rollback" or "fork"."""

    @abstractmethod
    def go_on(self, store: StoreFiles, instance: InstanceRecord, *,
              only_held: bool = False) -> None:
        """Let a guest run. ``only_held``: unless something else than a command of ours holds it.
        HypervisorDied if it is gone."""

    @abstractmethod
    def hold(self, store: StoreFiles, instance: InstanceRecord) -> None:
        """Let a guest stand still."""

    @abstractmethod
    def power_off(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
                  limit: float) -> None:
        """Ask a guest to shut itself down and wait for it; Failed after ``limit`` seconds."""

    @abstractmethod
    def live(self, store: StoreFiles, instance: InstanceRecord) -> (
            AbstractContextManager[LiveBlocks]):
        """What disk backends may ask of the running hypervisor. HypervisorDied if it is gone."""

    def require_sealable(self, store: StoreFiles,  # noqa: B027 - most have nothing to ask
                         instance: InstanceRecord, disks: list[DiskRecord]) -> None:
        """Refused if an epoch of a living instance cannot be made now; nothing was begun yet."""

    @abstractmethod
    def seal(self, work: Work) -> Sealed:
        """The middle of a create: from preparing to everything written. The points of
        :mod:`epochs.points` say in what order."""

    @abstractmethod
    def after_create(self, store: StoreFiles, instance: InstanceRecord, record: JournalRecord) -> (
            AbstractContextManager[LiveBlocks | None]):
        """After a create that was given up, at whatever point: bring the guest back to what it did
        before, and yield what backends may ask of it, None if it is gone."""

    @abstractmethod
    def console(self, store: StoreFiles, instance: InstanceRecord) -> int:
        """A descriptor, to read and write, of a living instance's console; the caller closes it."""

    @abstractmethod
    def console_log(self, store: StoreFiles, machine: MachineRecord) -> Path:
        """Where what a machine's console said is kept."""


def hypervisor(spec: MachineSpec) -> Hypervisor:
    """The driver for a machine."""
    return hypervisor_named(spec.hypervisor)


def hypervisor_named(kind: str) -> Hypervisor:
    """The driver of that name (:data:`epochs.spec.QEMU`, :data:`epochs.spec.XEN`)."""
    if kind == XEN:
        from epochs.xen.driver import XenDriver

        return XenDriver()
    from epochs.qemu.driver import QemuDriver

    return QemuDriver()
