"""``add --xen DOMAIN``: a domain that runs without us becomes a machine, and is not booted anew.

It is read as for ``create``. While it is suspended its disks become base layers, and the machine,
its first epoch and those layers are recorded in one transaction; until then, whatever happens, it
is let go on as it was. After it the domain is destroyed, and the caller rolls the new machine back
to the epoch: the guest goes on from the instant at which it suspended itself, on clones of its
disks. Its own disks are not written to any more.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import memsave
from blockcow import Layer, SourceRefused
from blockcow.source import forget_cached
from epochs import points
from epochs.catalog import DiskRecord, EpochRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree
from epochs.errors import NotFound, Refused
from epochs.hypervisor import Progress, hypervisor, no_progress
from epochs.processes import boot_id
from epochs.protocol import freezing, lifecycle
from epochs.protocol.journal import Operation, operation
from epochs.spec import XEN, DiskSpec, MachineSpec, check_name
from epochs.store import StoreFiles, new_id
from epochs.xen import domains, images, toolstack
from epochs.xen.config import DomainConfig
from epochs.xen.offered import accepted
from epochs.xen.seal import SUSPENDING, pause_figures, settle
from memsave.xen import State, XenDomain
from memsave.xen.live import Host, Running

READING, SWITCHED = "reading", "switched"


def take_over(store: StoreFiles, name: str, domain: str, disks: tuple[DiskSpec, ...] = (), *,
              progress: Progress = no_progress) -> EpochRecord:
    """A machine that is off, out of the running domain of that name or number; returns its epoch.

    NotFound, Refused with the domain as it was.
    """
    check_name(name)
    if store.catalog.find_machine(name) is not None:
        raise Refused(f"there is a machine '{name}' already; choose another name")
    with store.shared(), Host() as host:
        found = _running(store, host, domain)
        config = toolstack.config_of(found.domid)
        spec = accepted(MachineSpec(memory=0, hypervisor=XEN, disks=disks,
                                    config=config.to_json().decode()), config, but=found.domid)
        try:
            machine, sources = lifecycle.offered(store, hypervisor(spec), name, spec)
        except SourceRefused as error:
            raise Refused(f"domain '{config.name}' cannot be taken over: {error}") from error
        for disk, backend, _ in sources:
            if backend == "lvm-thick":
                raise Refused(f"disk '{disk.name}' is on an ordinary volume, which goes on being "
                              "written to: a running domain is taken over from thin volumes only, "
                              f"or with --disk {disk.name}={disk.file},backend=dmthin")
        freezing.check_space(store, name, found.memory // memsave.PAGE)
        if host.free_memory + found.memory < config.footprint and not toolstack.makes_room():
            raise Refused(f"domain '{config.name}' has {found.memory >> 20} MiB, a new one like it "
                          f"needs {config.footprint >> 20} MiB, and the host has too little free; "
                          "stop another one")
        plan = {"machine": machine.id, "epoch": new_id(), "pack": new_id(),
                "domain": found.uuid.hex, "domid": found.domid, "boot": boot_id(),
                "layers": [[backend, lifecycle.new_base(store, disk, backend)]
                           for disk, backend, _ in sources]}
        with operation(store, "take-over", machine.id, plan, undo) as under_way:
            points.hit("take-over.intended")
            epoch = _Moved(store, host, found, config, machine, sources, plan, under_way,
                           progress).read()
            points.hit("take-over.committed")
            toolstack.destroy(found.domid, store.machine_dir(machine.id))
            points.hit("take-over.old-gone")
            under_way.end()
    return epoch


def _running(store: StoreFiles, host: Host, domain: str) -> Running:
    """The domain of a name or number; Refused if it cannot be taken over as it is now."""
    there = [one for one in host.domains() if one.domid and not one.dying]
    found = next((one for one in there if domain in (str(one.domid), host.name(one.domid))), None)
    if found is None:
        raise NotFound(f"there is neither a configuration file nor a running domain '{domain}'")
    if any(one.id == found.uuid.hex for one in store.catalog.instances()):
        raise Refused(f"domain '{domain}' is a machine of this store already")
    if found.reason is not None or found.paused:
        raise Refused(f"domain '{domain}' does not run; let it go on with 'xl unpause', or give "
                      "its configuration file once it is gone")
    domains.refuse_if_saved_by_another(found.domid)
    return found


class _Moved:
    """What happens around and in the pause of one take-over."""

    def __init__(self, store: StoreFiles, host: Host, found: Running, config: DomainConfig,
                 machine: MachineRecord, sources: list[lifecycle.Offered], plan: dict[str, Any],
                 under_way: Operation, progress: Progress) -> None:
        self.store, self.host, self.found, self.config = store, host, found, config
        self.machine, self.sources, self.plan = machine, sources, plan
        self.under_way, self.progress = under_way, progress
        self.layers: list[Layer] = []

    def read(self) -> EpochRecord:
        """Read the domain and record everything; it is suspended then."""
        began = time.perf_counter()
        store = self.store
        self.under_way.phase(READING)
        make_directory(store.machine_dir(self.machine.id))
        make_directory(store.epoch_dir(self.plan["epoch"]))
        with XenDomain(store.packs_dir) as memory, memsave.PackStore(store.packs_dir) as packs:
            pause = self.host.capture(
                self.found, memory, self._adopt, stay=True, hands_off=domains.SavedByAnother,
                before=lambda: self.under_way.phase(SUSPENDING),
                then=lambda: points.hit("take-over.read"))
            written = memory.write_image(
                None, packs, self.plan["pack"],
                lambda done, total: self.progress("memory", done, total))
            points.hit("take-over.memory-written")
            signature = packs.signature(self.plan["pack"]) if written.pack_id else None
            epoch = images.written_epoch(
                store, self.plan["epoch"],
                State.of(memory, self.config.detached().to_json(), ()), written,
                images.compatibility(self.config, self.host.version), self.machine,
                f"taken over from domain '{self.config.name}'",
                {**pause_figures(pause, self.found), "disk_bytes": {},
                 "total_seconds": time.perf_counter() - began})
        self._commit(epoch, written, signature)
        return epoch

    def _adopt(self) -> None:
        """The domain is suspended; what it had on its way to its disks it sends again later."""
        points.hit("take-over.suspended")
        domains.refuse_if_saved_by_another(self.found.domid)  # it may have suspended it, not we
        for (disk, backend, source), (_, layer) in zip(self.sources, self.plan["layers"],
                                                       strict=True):
            forget_cached(Path(disk.file))
            self.layers.append(self.store.backend(backend).adopt(
                source, layer, lifecycle.disk_progress(self.progress, disk, source),
                owner=f"{self.machine.name}/{disk.name}#base"))
        points.hit("take-over.disks-adopted")

    def _commit(self, epoch: EpochRecord, written: memsave.WriteResult,
                signature: str | None) -> None:
        store = self.store
        names = [disk.name for disk, _, _ in self.sources]
        with store.catalog.transaction():
            for layer in self.layers:
                store.catalog.put_layer(layer)
            if signature is not None:
                store.catalog.add_pack(self.plan["pack"], signature)
            store.catalog.add_machine(self.machine, [
                DiskRecord(name, layer.backend, layer.id, None)
                for name, layer in zip(names, self.layers, strict=True)])
            store.catalog.add_epoch(epoch, {name: layer.id for name, layer in
                                            zip(names, self.layers, strict=True)},
                                    written.image.packs)
            store.catalog.set_head(self.machine.id, epoch.id)
            store.moved_on((layer.backend, layer.id) for layer in self.layers)
            self.under_way.phase(SWITCHED)


def undo(store: StoreFiles, record: JournalRecord) -> None:
    """Before everything was recorded: the domain goes on as it was, and nothing of ours stays.
    After it: the domain goes."""
    plan = record.plan
    if domains.is_dom0():
        with Host() as host:
            found = host.find(uuid.UUID(hex=plan["domain"]))
            if found is not None and (found.domid, boot_id()) != (plan["domid"], plan["boot"]):
                found = None  # xl or the user have made it anew
            if found is not None and record.phase == SWITCHED:
                toolstack.destroy(found.domid, store.machine_dir(plan["machine"]))
            elif found is not None and record.phase == SUSPENDING:
                settle(host, found, asked=True)
            elif found is not None and record.phase == READING:
                settle(host, found, asked=False)
    if record.phase == SWITCHED:
        machine = store.catalog.machine_by_id(plan["machine"])
        if machine is not None:
            store.notice(f"domain '{machine.name}' was taken over and is off: 'epochs rollback "
                         f"{machine.name} {plan['epoch'][:12]} --discard' lets it go on where it "
                         "was")
    else:
        for backend, layer in plan["layers"]:
            store.backend(backend).discard(layer)
        remove_tree(store.epoch_dir(plan["epoch"]))
        remove_tree(store.machine_dir(plan["machine"]))
        memsave.PackStore(store.packs_dir).drop(plan["pack"])
    with store.catalog.transaction():
        if record.phase != SWITCHED:
            store.moved_on((backend, layer) for backend, layer in plan["layers"])
        store.catalog.end(record.id)
