"""A create's middle on QEMU. The pause is :func:`_pause` and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import blockcow
import memsave
from epochs import points
from epochs.catalog import InstanceRecord, MachineRecord
from epochs.durable import make_directory, sync_directory, write_file
from epochs.errors import Failed, HypervisorDied, Refused
from epochs.hypervisor import RUNNING, Sealed, Work
from epochs.protocol import freezing
from epochs.qemu import command, devicestate, ramblocks, screen
from epochs.qemu.connection import HELD, open_monitor
from epochs.qemu.launch import layout_of
from epochs.qemu.monitor import Monitor
from epochs.store import StoreFiles

RAW_STATE = "device.raw"
DIRECT_ENOUGH = 16 * 2**20  # bytes dirty below which stopping the guest to pre-copy does not pay
SEALS = 8  # times that the state is saved anew if devices write to memory meanwhile


@dataclass(frozen=True)
class QemuWork:
    """A create on a QEMU that is connected to."""

    work: Work
    monitor: Monitor
    short_stops: list[float] = field(default_factory=list)

    @property
    def raw_state(self) -> Path:
        return self.work.directory / RAW_STATE


def seal(work: Work) -> Sealed:
    """See :meth:`epochs.hypervisor.Hypervisor.seal`."""
    with open_monitor(work.store, work.instance) as monitor:
        return _seal(QemuWork(work, monitor))


def _seal(qemu: QemuWork) -> Sealed:
    work, monitor = qemu.work, qemu.monitor
    store, pid = work.store, work.instance.process.pid
    points.hit("create.intended")
    running = _runs(monitor, work.machine)
    _refuse_blockers(monitor, work.machine)
    work.operation.phase("preparing", running=running)
    make_directory(work.directory)
    blocks = ramblocks.locate(monitor, pid, command.RAM_BLOCK)
    layout = layout_of(blocks)
    addresses = {block.name: block.address for block in blocks}
    base, above = _images(work, layout)
    thumbnail = _thumbnail(qemu)
    with memsave.PackStore(store.packs_dir) as packs, \
            memsave.GuestMemory(pid, layout, addresses) as guest:
        # From here on a failure may leave pages write-protected that no epoch has: only the commit
        # makes the tracking credible again.
        with store.catalog.transaction():
            store.catalog.distrust(work.instance.id)
        with guest.capture(work.instance.trusted, store.packs_dir) as capture:
            everything = base.flat is None or not work.instance.trusted
            freezing.check_space(work.store, work.machine.name,
                                 min(layout.pages, _anonymous_pages(pid)) if everything else 0)
            if running and not work.machine.spec.extra:
                # Devices of the user's own might write into guest memory behind the kernel's back
                # (pinned pages); all of ours go through the page tables.
                _precopy(qemu, capture)
            freezing.check_space(work.store, work.machine.name, capture.precopied_pages)
            freezing.check_rooms(work)
            with freezing.prepared(work, monitor) as tickets:
                # The file that QEMU writes device state into exists before the pause, and private.
                os.close(os.open(qemu.raw_state, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                points.hit("create.prepared")
                capture.reserve()
                with freezing.armed(tickets):
                    pause = _pause(qemu, tickets, capture, running)
                monitor.close()  # QEMU serves one client: let others ask while we write
                points.hit("create.resumed")
                frozen = [part for ticket in tickets for part in ticket.seal()]
            work.progress("disks", 1, 1)
            points.hit("create.disks-sealed")
            written = capture.write(
                base, above, packs, work.pack, flat=work.flat,
                progress=lambda done, total: work.progress("memory", done, total))
            points.hit("create.memory-written")
            method = guest.method
        state = devicestate.with_configuration(qemu.raw_state.read_bytes(),
                                               work.machine.machine_type)
        write_file(store.state_file(work.epoch), state)
        qemu.raw_state.unlink()
        written.image.save(store.map_file(work.epoch))
        if thumbnail is not None:
            write_file(store.thumbnail_file(work.epoch), thumbnail)
        sync_directory(work.directory)
        sync_directory(work.directory.parent)
        points.hit("create.written")
        signature = packs.signature(work.pack) if written.pack_id else None
    figures = {
        "pause_seconds": pause.total, "pause_steps": pause.steps,
        "short_stops_seconds": qemu.short_stops, "pages_sealed_in_pause": capture.sealed_pages,
        "pages_precopied": capture.precopied_pages, "tracking": method,
    }
    return Sealed(frozen, written, signature, figures, thumbnail is not None, based=True)


def _precopy(qemu: QemuWork, capture: memsave.Capture) -> None:
    """Copy what is written while the guest goes on. Direct I/O pins guest pages, and must be over
    at the moment in which pages are protected: then the guest is stopped for that moment."""
    if not any(disk.backend in blockcow.DIRECT for disk in qemu.work.disks):
        capture.precopy()
        return

    @contextmanager
    def stopped() -> Iterator[None]:
        began = time.perf_counter()
        qemu.monitor.execute("stop")  # returns with all I/O done
        try:
            yield
        finally:
            qemu.monitor.execute("cont")
            qemu.short_stops.append(time.perf_counter() - began)

    capture.precopy(enough=DIRECT_ENOUGH, rounds=2, drained=stopped)


def _images(work: Work, layout: memsave.Layout) -> tuple[memsave.Image, memsave.Image | None]:
    """What the instance's memory was when its tracking began, and the parent epoch's."""
    base_file = work.store.base_map(work.instance.id)
    base = memsave.Image.load(base_file) if base_file.exists() else memsave.Image.zero(layout)
    parent = work.machine.head
    above = memsave.Image.load(work.store.map_file(parent)) if parent else None
    if above is not None and above.layout != layout:
        above = None  # other hardware since then: nothing to share with
    return base, above


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


def _anonymous_pages(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 // memsave.PAGE
    return 0


def _thumbnail(qemu: QemuWork) -> bytes | None:
    if not qemu.work.machine.spec.vga:
        return None
    return screen.thumbnail(screen.capture(qemu.monitor, qemu.work.directory))


@dataclass(frozen=True)
class _Pause:
    total: float
    steps: dict[str, float]


def _pause(qemu: QemuWork, tickets: list[blockcow.FreezeTicket], capture: memsave.Capture,
           running: bool) -> _Pause:
    """Stop, device state, freeze, memory, go on. Returns seconds, total and of each step."""
    monitor = qemu.monitor
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
        _save_state(qemu)
        lap("device_state")
        points.hit("create.state-saved")
        for ticket in tickets:
            ticket.freeze()
        lap("freeze_disks")
        points.hit("create.disks-frozen")
        capture.seal()
        lap("seal_memory")
        points.hit("create.memory-sealed")
        _settle(qemu, capture)
        lap("settle")
    finally:
        if running:
            monitor.execute("cont")
    lap("resume")
    return _Pause(last - began if running else 0.0, steps)


def _save_state(qemu: QemuWork) -> None:
    qemu.monitor.execute("xen-save-devices-state", filename=str(qemu.raw_state), live=False)


def _settle(qemu: QemuWork, capture: memsave.Capture) -> None:
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
        _save_state(qemu)
        capture.seal()
    raise Failed(f"devices of machine '{qemu.work.machine.name}' keep writing to its memory while "
                 "it is paused; remove them from its QEMU arguments")


@contextmanager
def after_create(store: StoreFiles, instance: InstanceRecord, *, running: bool) -> (
        Iterator[Monitor | None]):
    """See :meth:`epochs.hypervisor.Hypervisor.after_create`."""
    try:
        monitor = open_monitor(store, instance)
    except HypervisorDied:
        yield None
        return
    with monitor:
        if running and monitor.status() in ("paused", "save-vm", "finish-migrate"):
            monitor.execute("cont")
        yield monitor
