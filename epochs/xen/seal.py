"""A create's middle on Xen: the domain's pages are read while it runs, then it suspends itself, its
disks are frozen, the rest is read, and it goes on with its devices connected.

What happens in the pause is :class:`_Steps` and nothing else; the pause itself is
:meth:`memsave.xen.live.Host.capture`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import blockcow
import memsave
from epochs import points
from epochs.catalog import InstanceRecord, JournalRecord
from epochs.durable import make_directory
from epochs.errors import Failed
from epochs.hypervisor import Sealed, Work
from epochs.protocol import freezing
from epochs.store import StoreFiles
from epochs.xen import domains, toolstack
from epochs.xen.images import write_files
from memsave.xen import State, XenDomain
from memsave.xen.live import Host, Pause, Running

PREPARING, SUSPENDING, RESUMED = "preparing", "suspending", "resumed"
SETTLE_LIMIT = 10.0  # seconds for a guest that may have been asked to suspend itself


class NoBlocks:
    """Xen has no block layer of its own for backends to ask."""

    def execute(self, command: str, **_arguments: object) -> Any:
        """See :class:`blockcow.LiveBlocks`."""
        raise Failed(f"a domain of Xen cannot do {command}")

    def run_job(self, command: str, job_id: str, **_arguments: object) -> None:
        """See :class:`blockcow.LiveBlocks`."""
        raise Failed(f"a domain of Xen cannot do {command} ({job_id})")


class _Steps:
    """What a create does around and in the pause."""

    def __init__(self, work: Work, domid: int, tickets: list[blockcow.FreezeTicket]) -> None:
        self._work, self._domid, self._tickets = work, domid, tickets
        self.held = contextlib.ExitStack()

    def before(self) -> None:
        """The guest is about to be asked to suspend itself."""
        self._work.operation.phase(SUSPENDING)
        self.held.enter_context(freezing.armed(self._tickets))

    def freeze(self) -> None:
        """The guest is suspended."""
        points.hit("create.paused")
        points.hit("create.state-saved")  # its state is in the stream
        domains.refuse_if_saved_by_another(self._domid)  # it may have suspended it, not we
        for ticket in self._tickets:
            ticket.freeze()
        points.hit("create.disks-frozen")

    def read(self) -> None:
        """Everything is read; the guest goes on next."""
        points.hit("create.memory-sealed")


def seal(work: Work) -> Sealed:
    """See :meth:`epochs.hypervisor.Hypervisor.seal`."""
    points.hit("create.intended")
    store = work.store
    with Host() as host, XenDomain(store.packs_dir) as memory, \
            memsave.PackStore(store.packs_dir) as packs:
        domain = domains.present(host, work.instance)
        config = toolstack.config_of(domain.domid)
        work.operation.phase(PREPARING, running=not domain.paused)
        make_directory(work.directory)
        freezing.check_space(work.store, work.machine.name, domain.memory // memsave.PAGE)
        freezing.check_rooms(work)
        with freezing.prepared(work, NoBlocks()) as tickets:
            points.hit("create.prepared")
            pause = _captured(work, host, domain, memory, tickets)
            points.hit("create.resumed")
            work.operation.phase(RESUMED)
            frozen = [part for ticket in tickets for part in ticket.seal()]
        work.progress("disks", 1, 1)
        points.hit("create.disks-sealed")
        written = memory.write_image(
            _parent(work), packs, work.pack,
            lambda done, total: work.progress("memory", done, total))
        points.hit("create.memory-written")
        write_files(store, work.epoch, State.of(memory, config.detached().to_json(), ()),
                    written.image)
        points.hit("create.written")
        signature = packs.signature(work.pack) if written.pack_id else None
    return Sealed(frozen, written, signature, pause_figures(pause, domain), thumbnail=False,
                  based=False)


def _captured(work: Work, host: Host, domain: Running, memory: XenDomain,
              tickets: list[blockcow.FreezeTicket]) -> Pause:
    steps = _Steps(work, domain.domid, tickets)
    with steps.held:
        return host.capture(domain, memory, steps.freeze, before=steps.before, then=steps.read,
                            hands_off=domains.SavedByAnother)


def _parent(work: Work) -> memsave.Image | None:
    head = work.machine.head
    return memsave.Image.load(work.store.map_file(head)) if head else None


def pause_figures(pause: Pause, domain: Running) -> dict[str, Any]:
    """What was measured of a capture, under the names of docs/json.md."""
    steps: Mapping[str, float] = pause.steps
    return {
        "pause_seconds": 0.0 if domain.paused else pause.seconds, "pause_steps": dict(steps),
        "short_stops_seconds": [], "pages_sealed_in_pause": pause.pages_within,
        "pages_precopied": pause.pages_before,
        "tracking": "log-dirty" if pause.pages_before else "none",
    }


@contextlib.contextmanager
def after_create(store: StoreFiles, instance: InstanceRecord, record: JournalRecord) -> (
        Iterator[NoBlocks | None]):
    """See :meth:`epochs.hypervisor.Hypervisor.after_create`."""
    with Host() as host:
        found = host.find(domains.who(instance.id))
        if found is None:
            yield None
            return
        if record.phase in (PREPARING, SUSPENDING):
            settle(host, found, asked=record.phase == SUSPENDING)
        found = domains.present(host, instance)
        if not record.plan.get("running", True) and not found.paused:
            host.pause(found.domid)
        yield NoBlocks()


def settle(host: Host, found: Running, *, asked: bool) -> None:
    """After a capture that was given up: its request is taken back, its tracking ends, and the
    domain goes on. ``asked``: it may be on its way to suspend itself. SavedByAnother, with nothing
    done, if that is xl's business now."""
    domains.refuse_if_saved_by_another(found.domid)
    host.settle(found, SETTLE_LIMIT if asked else 0.0)
    after = host.find(found.uuid)
    if after is not None and after.reason in (None, domains.SUSPEND):
        host.resume(after)


