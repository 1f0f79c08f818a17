"""``create``: a live epoch. The pause is :func:`_pause` and nothing else.

Steps as in docs/design.md part 5: intend, prepare, pause, seal, resume, write, commit. A failure
at any of them ends in :func:`undo`, which is also what ``recover`` runs after a kill.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import blockcow
import memsave
from blockcow import BlockError, Frozen, Layer
from epochs import headroom, points
from epochs.catalog import DiskRecord, EpochRecord, InstanceRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree, sync_directory, write_file
from epochs.errors import EpochsError, Failed, HypervisorDied, Refused, UsageError
from epochs.graph import TAG
from epochs.protocol import upkeep
from epochs.protocol.instances import RUNNING, open_monitor, require_live
from epochs.protocol.journal import Operation, operation
from epochs.protocol.launch import layout_of
from epochs.qemu import command, devicestate, ramblocks, screen
from epochs.qemu.monitor import Monitor
from epochs.store import StoreFiles, new_id

SPACE_MARGIN = 16 * 2**20  # bytes kept free beyond what an epoch may need
RAW_STATE = "device.raw"
DIRECT_ENOUGH = 16 * 2**20  # bytes dirty below which stopping the guest to pre-copy does not pay
SEALS = 8  # times that the state is saved anew if devices write to memory meanwhile
# Run states in which nothing but we lets the guest go on. Not: suspended to RAM, whence its own
# alarm clock wakes it; powered off; stopped by QEMU for an error.
HELD = ("paused", "prelaunch", "postmigrate")

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total), both in the same unit."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """The progress function of callers that show none."""


@dataclass
class _Work:
    """What the steps of one create share."""

    store: StoreFiles
    machine: MachineRecord
    disks: list[DiskRecord]
    instance: InstanceRecord
    epoch: str
    pack: str
    new_layers: dict[str, str]
    monitor: Monitor
    operation: Operation
    short_stops: list[float] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.store.epoch_dir(self.epoch)

    @property
    def raw_state(self) -> Path:
        return self.directory / RAW_STATE


def create(store: StoreFiles, machine: MachineRecord, *, message: str = "",
           tags: tuple[str, ...] = (), flat: bool | None = None,
           progress: Progress = no_progress) -> EpochRecord:
    """Seal the machine's present state as a child of its head, while it goes on.

    The caller holds the machine's lock. ``flat`` forces or forbids a new flat pack. Raises Refused
    if a check says no before anything changed, Failed if something broke and was undone.
    """
    check_tags(store, machine, tags)
    with store.shared():
        began = time.perf_counter()
        machine = store.catalog.machine(machine.name)  # its head may just have been deleted
        instance = require_live(store, machine)
        disks = store.catalog.disks(machine.id)
        plan: dict[str, Any] = {
            "epoch": new_id(), "pack": new_id(), "instance": instance.id,
            "layers": {disk.name: store.new_layer(disk.backend, disk.base) for disk in disks},
            "active": {disk.name: disk.active for disk in disks},
        }
        with operation(store, "create", machine.id, plan, undo) as under_way, \
                open_monitor(store, instance) as monitor:
            work = _Work(store, machine, disks, instance, plan["epoch"], plan["pack"],
                         plan["layers"], monitor, under_way)
            epoch = _seal(work, message, tags, flat, progress, began)
        upkeep.try_shorten_chains(store, machine)
    return epoch


def check_tags(store: StoreFiles, machine: MachineRecord, tags: tuple[str, ...]) -> None:
    """Refuse tags that are malformed or taken in this machine."""
    taken = {name for name, owner, _ in store.catalog.tags() if owner == machine.id}
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise UsageError(f"'{tag}' is not a tag; use letters, digits, '_', '.', '+', '-', "
                             "at most 100, starting with a letter or digit")
        if tag in taken or tags.count(tag) > 1:
            raise Refused(f"machine '{machine.name}' has a tag '{tag}' already; choose another "
                          f"or move it with 'epochs tag --force'")


def _seal(work: _Work, message: str, tags: tuple[str, ...], flat: bool | None,
          progress: Progress, began: float) -> EpochRecord:
    store, monitor = work.store, work.monitor
    points.hit("create.intended")
    running = _runs(monitor, work.machine)
    _refuse_blockers(monitor, work.machine)
    work.operation.phase("preparing", running=running)
    make_directory(work.directory)
    blocks = ramblocks.locate(monitor, work.instance.process.pid, command.RAM_BLOCK)
    layout = layout_of(blocks)
    addresses = {block.name: block.address for block in blocks}
    base, above = _images(work, layout)
    thumbnail = _thumbnail(work)
    with memsave.PackStore(store.packs_dir) as packs, \
            memsave.GuestMemory(work.instance.process.pid, layout, addresses) as guest:
        # From here on a failure may leave pages write-protected that no epoch has: only the commit
        # below makes the tracking credible again.
        with store.catalog.transaction():
            store.catalog.distrust(work.instance.id)
        with guest.capture(work.instance.trusted, store.packs_dir) as capture:
            everything = base.flat is None or not work.instance.trusted
            _check_space(work, min(layout.pages, _anonymous_pages(work.instance.process.pid))
                         if everything else 0)
            if running and not work.machine.spec.extra:
                # Devices of the user's own might write into guest memory behind the kernel's back
                # (pinned pages); all of ours go through the page tables.
                _precopy(work, capture)
            _check_space(work, capture.precopied_pages)
            _check_rooms(work)
            with _prepared_disks(work) as tickets:
                points.hit("create.prepared")
                capture.reserve()
                with _armed(tickets):
                    pause = _pause(work, tickets, capture, running)
                monitor.close()  # QEMU serves one client: let others ask while we write
                points.hit("create.resumed")
                frozen = [part for ticket in tickets for part in ticket.seal()]
            progress("disks", 1, 1)
            points.hit("create.disks-sealed")
            written = capture.write(base, above, packs, work.pack, flat=flat,
                                    progress=lambda done, total: progress("memory", done, total))
            points.hit("create.memory-written")
            method = guest.method
        image = written.image
        state = devicestate.with_configuration(work.raw_state.read_bytes(),
                                               work.machine.machine_type)
        write_file(store.state_file(work.epoch), state)
        work.raw_state.unlink()
        image.save(store.map_file(work.epoch))
        if thumbnail is not None:
            write_file(store.thumbnail_file(work.epoch), thumbnail)
        sync_directory(work.directory)
        sync_directory(work.directory.parent)
        points.hit("create.written")
        signature = packs.signature(work.pack) if written.pack_id else None
    map_bytes = store.map_file(work.epoch).read_bytes()
    stats = {
        **_figures(work, pause, capture, written, frozen), "tracking": method,
        "map_bytes": len(map_bytes), "state_bytes": len(state),
        "total_seconds": time.perf_counter() - began,
    }
    epoch = EpochRecord(
        id=work.epoch, machine=work.machine.id, machine_name=work.machine.name,
        parent=work.machine.head,
        created=time.time(), message=message, spec=work.machine.spec,
        compatibility=work.instance.compatibility, map_checksum=checksum(map_bytes),
        state_checksum=checksum(state), state_size=len(state), thumbnail=thumbnail is not None,
        stats=stats)
    _commit(work, epoch, tags, frozen, image, signature)
    return epoch


def _precopy(work: _Work, capture: memsave.Capture) -> None:
    """Copy what is written while the guest goes on. Direct I/O pins guest pages, and must be over
    at the moment in which pages are protected: then the guest is stopped for that moment."""
    if not any(disk.backend in blockcow.DIRECT for disk in work.disks):
        capture.precopy()
        return

    @contextmanager
    def stopped() -> Iterator[None]:
        began = time.perf_counter()
        work.monitor.execute("stop")  # returns with all I/O done
        try:
            yield
        finally:
            work.monitor.execute("cont")
            work.short_stops.append(time.perf_counter() - began)

    capture.precopy(enough=DIRECT_ENOUGH, rounds=2, drained=stopped)


def _images(work: _Work, layout: memsave.Layout) -> tuple[memsave.Image, memsave.Image | None]:
    """What the instance's memory was when its tracking began, and the parent epoch's."""
    base_file = work.store.base_map(work.instance.id)
    base = memsave.Image.load(base_file) if base_file.exists() else memsave.Image.zero(layout)
    parent = work.machine.head
    above = memsave.Image.load(work.store.map_file(parent)) if parent else None
    if above is not None and above.layout != layout:
        above = None  # other hardware since then: nothing to share with
    return base, above


def _figures(work: _Work, pause: _Pause, capture: memsave.Capture, written: memsave.WriteResult,
             frozen: list[Frozen]) -> dict[str, Any]:
    """What was measured, under the names of docs/json.md."""
    return {
        "pause_seconds": pause.total, "pause_steps": pause.steps,
        "short_stops_seconds": work.short_stops,
        "pages_new": written.new_pages, "pages_changed": written.changed_pages,
        "pages_zero": written.zero_pages, "pages_folded": written.folded_pages,
        "pages_sealed_in_pause": capture.sealed_pages,
        "pages_precopied": capture.precopied_pages, "pages_resident": written.image.resident,
        "pack_bytes": written.bytes_written, "flat": written.flat,
        "disk_bytes": {part.disk: part.written for part in frozen},
    }


def checksum(data: bytes) -> str:
    """BLAKE2b-128 of a small blob, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _runs(monitor: Monitor, machine: MachineRecord) -> bool:
    """Whether the guest runs (else it is held); Refused if it is neither."""
    status = monitor.status()
    if status != RUNNING and status not in HELD:
        raise Refused(f"machine '{machine.name}' cannot be checkpointed while it is '{status}'; "
                      "wake or restart it")
    return status == RUNNING


def _refuse_blockers(monitor: Monitor, machine: MachineRecord) -> None:
    reasons = monitor.execute("query-migrate").get("blocked-reasons", [])
    if reasons:
        raise Refused(f"machine '{machine.name}' cannot be checkpointed: " + "; ".join(
            reason.strip() for reason in reasons))


def _check_space(work: _Work, pages: int) -> None:
    """Refuse before the pause if ``pages``, and the copies of them on their way, might not fit."""
    needed = 2 * pages * memsave.PAGE + SPACE_MARGIN
    stat = os.statvfs(work.store.path)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise Refused(f"the store {work.store.path} has {free // 2**20} MiB free, but an epoch of "
                      f"'{work.machine.name}' may need {needed // 2**20} MiB; delete epochs or "
                      "enlarge the file system")


def _check_rooms(work: _Work) -> None:
    """Refuse before the pause if the disks have little room to grow in, by what the guest has been
    writing between its last epochs."""
    history = [stats["disk_bytes"] for stats in
               work.store.catalog.recent_stats(work.machine.id, headroom.HISTORY)]
    needed: dict[str, headroom.Wanted] = {}
    for disk in work.disks:
        layer = work.store.catalog.layer(disk.active or disk.base)
        room = work.store.backend(disk.backend).room(layer)
        if room is None:
            continue
        own = headroom.wanted([written.get(disk.name, 0) for written in history], room.block,
                              layer.size)
        before = needed.get(room.what, headroom.Wanted(0, 0))
        both = needed[room.what] = headroom.Wanted(before.data + own.data,
                                                   before.metadata + own.metadata)
        for kind, left, wanted in (("data", room.data, both.data),
                                   ("metadata", room.metadata, both.metadata)):
            if left is not None and left < wanted:
                raise Refused(
                    f"{room.what} has {left / 2**20:.1f} MiB of {kind} free, but by what "
                    f"'{work.machine.name}' has been writing between epochs it may need "
                    f"{wanted / 2**20:.1f} MiB until the next one; {room.mend}, or delete epochs")


def _anonymous_pages(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 // memsave.PAGE
    return 0


def _thumbnail(work: _Work) -> bytes | None:
    if not work.machine.spec.vga:
        return None
    return screen.thumbnail(screen.capture(work.monitor, work.directory))


def _parts(work: _Work) -> dict[str, list[tuple[blockcow.Freeze, list[Layer]]]]:
    """Freezes by backend, with each disk's chain."""
    found: dict[str, list[tuple[blockcow.Freeze, list[Layer]]]] = {}
    for disk in work.disks:
        chain = work.store.catalog.chain(disk.active or disk.base)
        found.setdefault(disk.backend, []).append(
            (_freeze(work.machine, disk.name, chain[0], work.new_layers[disk.name], work.epoch),
             chain))
    return found


def _freeze(machine: MachineRecord, disk: str, active: Layer, new_id: str,
            epoch: str) -> blockcow.Freeze:
    space = next((one.snapshot for one in machine.spec.disks if one.name == disk), None)
    return blockcow.Freeze(disk, active, new_id, command.disk_node(active.id),
                           command.disk_node(new_id), f"{machine.name}/{disk}#{epoch[:12]}", space)


@contextmanager
def _prepared_disks(work: _Work) -> Iterator[list[blockcow.FreezeTicket]]:
    """Freezes that are ready to be done; what is not sealed at the end is aborted."""
    tickets: list[blockcow.FreezeTicket] = []
    try:
        for name, parts in _parts(work).items():
            tickets.append(work.store.backend(name).prepare_freeze(work.monitor, parts))
        points.hit("create.disks-prepared")
        # The file that QEMU writes device state into exists before the pause, and private.
        os.close(os.open(work.raw_state, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        yield tickets
    except BaseException:
        for ticket in tickets:
            with suppress(BlockError, EpochsError, OSError):  # undo does the same by name
                ticket.abort()
        raise


@contextmanager
def _armed(tickets: list[blockcow.FreezeTicket]) -> Iterator[None]:
    """Others are kept out around the pause; they are let in again by all tickets before any of
    them is sealed or aborted."""
    with ExitStack() as stack:
        for ticket in tickets:
            stack.callback(ticket.disarm)
        for ticket in tickets:
            ticket.arm()
        yield


@dataclass(frozen=True)
class _Pause:
    total: float
    steps: dict[str, float]


def _pause(work: _Work, tickets: list[blockcow.FreezeTicket], capture: memsave.Capture,
           running: bool) -> _Pause:
    """Stop, device state, freeze, memory, go on. Returns seconds, total and of each step."""
    monitor = work.monitor
    steps: dict[str, float] = {}
    began = last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        steps[name] = now - last
        last = now

    if running:
        monitor.execute("stop")
    lap("stop")
    try:
        points.hit("create.paused")
        _save_state(work)
        lap("device_state")
        points.hit("create.state-saved")
        for ticket in tickets:
            ticket.freeze()
        lap("freeze_disks")
        points.hit("create.disks-frozen")
        capture.seal()
        lap("seal_memory")
        points.hit("create.memory-sealed")
        _settle(work, capture)
        lap("settle")
    finally:
        if running:
            monitor.execute("cont")
    lap("resume")
    return _Pause(last - began if running else 0.0, steps)


def _save_state(work: _Work) -> None:
    work.monitor.execute("xen-save-devices-state", filename=str(work.raw_state), live=False)


def _settle(work: _Work, capture: memsave.Capture) -> None:
    """Make device state and memory those of one instant, whatever devices do.

    QEMU's main loop runs in the pause, too. The devices of ours keep off the memory of a machine
    that stands still (virtio-serial takes no input then: enable_backend in hw/char/virtio-
    console.c); one of the user's own might not, and a queue whose state is older than its ring in
    memory does not load. So if anything was written since the state was saved, both are taken
    again. Only exact tracking can tell.
    """
    if not capture.exact:
        return
    for _ in range(SEALS):
        if capture.untouched():
            return
        _save_state(work)
        capture.seal()
    raise Failed(f"devices of machine '{work.machine.name}' keep writing to its memory while it is "
                 "paused; remove them from its QEMU arguments")


def _commit(work: _Work, epoch: EpochRecord, tags: tuple[str, ...], frozen: list[Frozen],
            image: memsave.Image, pack_signature: str | None) -> None:
    """One transaction: the epoch, its layers, the machine's head, and the journal row gone."""
    store, catalog = work.store, work.store.catalog
    by_disk = {part.disk: part for part in frozen}
    pending = _pending(store, work.instance.id)
    image.save(pending, durable=False)  # a power cut ends the instance, too
    with catalog.transaction():
        for part in frozen:
            catalog.put_layer(part.frozen)
            catalog.put_layer(part.active)
            catalog.set_active(work.machine.id, part.disk, part.active.id)
        if pack_signature is not None:
            catalog.add_pack(work.pack, pack_signature)
        catalog.add_epoch(epoch, {disk.name: by_disk[disk.name].frozen.id for disk in work.disks},
                          image.packs)
        for tag in tags:
            catalog.put_tag(tag, work.machine.id, epoch.id)
        catalog.set_head(work.machine.id, epoch.id)
        store.moved_on(_new_layers(work.disks, work.new_layers))
        catalog.put_instance(replace(work.instance, trusted=False), image.packs)
        work.operation.phase("committed")
    points.hit("create.committed")
    finish_commit(store, work.operation.record)


def _pending(store: StoreFiles, instance_id: str) -> Path:
    """What becomes the instance's base map once the epoch is committed."""
    return store.base_map(instance_id).with_suffix(".next")


def _new_layers(disks: list[DiskRecord], layers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The layers that a create makes, as (backend, id)."""
    return [(disk.backend, layers[disk.name]) for disk in disks if disk.name in layers]


def finish_commit(store: StoreFiles, record: JournalRecord) -> None:
    """After the commit: the instance's base map becomes the epoch's, tracking is credible."""
    catalog = store.catalog
    pending = _pending(store, record.plan["instance"])
    if pending.exists():
        pending.rename(store.base_map(record.plan["instance"]))
    with catalog.transaction():
        catalog.trust(record.plan["instance"])
        catalog.end(record.id)


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Bring the guest back to running and remove everything of an epoch that was not committed."""
    if record.phase == "committed":
        finish_commit(store, record)
        return
    machine = store.catalog.machine_by_id(record.machine or "")
    instance = store.catalog.instance_of(record.machine or "")
    monitor: Monitor | None = None
    try:
        # The guest first; then the files, because on a full disk the catalog cannot be written
        # before they are gone.
        if instance is not None and instance.id == record.plan["instance"]:
            monitor = _resume(store, instance, bool(record.plan.get("running")))
        points.hit("undo-create.resumed")
        remove_tree(store.epoch_dir(record.plan["epoch"]))
        _pending(store, record.plan["instance"]).unlink(missing_ok=True)
        memsave.PackStore(store.packs_dir).drop(record.plan["pack"])
        held = _unfrozen(store, machine, monitor, record.plan) if machine is not None else {}
    finally:
        if monitor is not None:
            monitor.close()
    points.hit("undo-create.unfrozen")
    # One transaction: done again with the layers recorded already, the new active layer would be
    # taken for the one that was frozen.
    with store.catalog.transaction():
        for name, layers in held.items():
            for layer in reversed(layers):  # bottom first: backing must exist
                store.catalog.put_layer(layer)
            store.catalog.set_active(record.machine or "", name, layers[0].id)
        store.moved_on(_new_layers(store.catalog.disks(record.machine or ""),
                                   record.plan["layers"]))
        store.catalog.end(record.id)


def _resume(store: StoreFiles, instance: InstanceRecord, running: bool) -> Monitor | None:
    try:
        monitor = open_monitor(store, instance)
    except HypervisorDied:
        return None
    if running and monitor.status() in ("paused", "save-vm", "finish-migrate"):
        monitor.execute("cont")
    return monitor


def _unfrozen(store: StoreFiles, machine: MachineRecord, monitor: Monitor | None,
              plan: Mapping[str, Any]) -> dict[str, list[Layer]]:
    """Let the backends say which layers hold each disk's present state now, top first. A disk
    whose active layer is another one than when the create began is not its business any more."""
    by_backend: dict[str, list[tuple[blockcow.Freeze, list[Layer]]]] = {}
    for disk in store.catalog.disks(machine.id):
        if disk.active is None or disk.active != plan["active"].get(disk.name):
            continue
        chain = store.catalog.chain(disk.active)
        by_backend.setdefault(disk.backend, []).append(
            (_freeze(machine, disk.name, chain[0], plan["layers"][disk.name], plan["epoch"]),
             chain))
    held: dict[str, list[Layer]] = {}
    for backend, parts in by_backend.items():
        held.update(store.backend(backend).recover_freeze(monitor, parts))
    return held
