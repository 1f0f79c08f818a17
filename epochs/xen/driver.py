"""The Xen driver: what :class:`epochs.hypervisor.Hypervisor` asks, of libxenguest and `xl`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blockcow
from blockcow import LiveBlocks, SourceRefused
from epochs import points
from epochs.catalog import (
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    JournalRecord,
    MachineRecord,
)
from epochs.errors import Failed, Incompatible, Refused, UsageError
from epochs.fixup import Fixup, Wishes
from epochs.hypervisor import DIED, Hypervisor, Launch, Ready, Sealed, State, Work
from epochs.processes import working_in
from epochs.spec import XEN, DiskSpec, MachineSpec
from epochs.store import StoreFiles
from epochs.xen import domains, images, seal, toolstack
from epochs.xen.config import DomainConfig, overridden
from epochs.xen.offered import accepted, refuse_kind, refuse_unsaved
from memsave.xen import XenDomain, XlSave, xlfile
from memsave.xen.live import Host

CONSOLES = Path("/var/log/xen/console")  # where xenconsoled keeps what guests say, if it does


@dataclass
class ReadyDomain(Ready):
    """A domain that is paused and complete."""

    host: Host

    def go_on(self) -> None:
        self.host.unpause(self.record.process.pid)

    def close(self) -> None:
        self.host.close()


class XenDriver(Hypervisor):
    """See :class:`epochs.hypervisor.Hypervisor`."""

    def accept(self, store: StoreFiles, name: str, spec: MachineSpec) -> MachineSpec:
        if spec.config is None:
            raise UsageError("a domain of Xen needs its configuration: --xen FILE")
        with Host() as host:
            _refuse_name(host, name)
        return accepted(spec, toolstack.understood(spec.config))

    def choose_backend(self, store: StoreFiles, disk: DiskSpec, source: blockcow.Source) -> str:
        try:
            return blockcow.lvm_backend(source.path, store.path / "locks")
        except SourceRefused as error:
            raise Refused(
                f"disk '{disk.name}' ({source.path}) cannot be frozen where it is: {error}; say "
                f"where it is to go, as --disk {disk.name}={source.path},backend=dmthin") from error

    def platform(self, store: StoreFiles, spec: MachineSpec) -> tuple[str, str]:
        return XEN, toolstack.configuration(spec.config or "").kind

    def state(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord) -> State:
        return domains.state(instance)

    def ended(self, instance: InstanceRecord) -> bool:
        return domains.state(instance).word == DIED

    def describe(self, store: StoreFiles, instance: InstanceRecord) -> dict[str, Any]:
        with Host() as host:
            found = host.find(domains.who(instance.id))
        return {"domid": found.domid if found is not None else None}

    def forked(self, machine: MachineRecord, epoch: EpochRecord,
               source: MachineRecord | None) -> MachineRecord:
        spec = machine.spec
        if spec.config is not None:
            own = toolstack.configuration(spec.config).with_macs_of(machine.id)
            spec = replace(spec, config=own.to_json().decode())
        return replace(machine, spec=spec, machine_type=epoch.compatibility["guest"], accel=XEN)

    # -- instances --------------------------------------------------------------------------------
    def launch(self, store: StoreFiles, launch: Launch) -> ReadyDomain:
        directory = store.instance_dir(launch.target.instance)
        host = Host()
        try:
            _make_way(store, host, launch)
            devices = {disk.name: _device(store, disk.backend, launch.chains[disk.name])
                       for disk in launch.disks}
            config = (_boot(host, directory, launch, devices) if launch.epoch is None
                      else _restore(store, host, directory, launch, launch.epoch, devices))
            launch.clock.lap("restore")
            found = host.find(domains.who(launch.target.instance))
            if found is None:
                raise Failed(f"the domain of '{launch.machine.name}' is gone as soon as it was "
                             "made")
            record = InstanceRecord(
                launch.target.instance, launch.machine.id, domains.process_of(found.domid), "xl",
                images.compatibility(config, host.version), time.time(), trusted=False)
            return ReadyDomain(record, launch.layers, frozenset(), launch.clock.steps, host)
        except BaseException:
            host.close()
            raise

    def end(self, store: StoreFiles, instance_id: str) -> None:
        for process in working_in(store.instance_dir(instance_id)):
            process.kill()  # an xl that was making it
        if not domains.is_dom0():
            return
        with Host() as host:
            found = host.find(domains.who(instance_id))
        if found is not None:
            toolstack.destroy(found.domid, store.instance_dir(instance_id))

    def alone(self, store: StoreFiles, machine: MachineRecord, instance_id: str) -> None:
        """It gets the machine's name, if it has another one."""
        with Host() as host:
            found = host.find(domains.who(instance_id))
            if found is not None and host.name(found.domid) != machine.name:
                toolstack.rename(found.domid, machine.name, store.instance_dir(instance_id))

    def fix_up(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
               event: str, epoch: str, wishes: Wishes) -> Fixup:
        return Fixup.nothing(machine.name, "a domain of Xen has no guest agent", wishes)

    def go_on(self, store: StoreFiles, instance: InstanceRecord, *,
              only_held: bool = False) -> None:
        with Host() as host:
            found = domains.present(host, instance)
            if found.reason == domains.SUSPEND and not only_held:
                domains.refuse_if_saved_by_another(found.domid)
                host.resume(found)
            if found.paused:
                host.unpause(found.domid)

    def hold(self, store: StoreFiles, instance: InstanceRecord) -> None:
        with Host() as host:
            found = domains.present(host, instance)
            if not found.paused:
                host.pause(found.domid)

    def power_off(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
                  limit: float) -> None:
        self.go_on(store, instance)  # a paused guest cannot shut itself down
        with Host() as host:
            domid = domains.present(host, instance).domid  # xl may have saved and restored it
        if not toolstack.shut_down(domid, limit):
            raise Failed(f"the guest of '{machine.name}' did not power off within {limit:.0f} s; "
                         f"'epochs stop --kill {machine.name}' pulls the plug")

    @contextlib.contextmanager
    def live(self, store: StoreFiles, instance: InstanceRecord) -> Iterator[LiveBlocks]:
        with Host() as host:
            domains.present(host, instance)
        yield seal.NoBlocks()

    def require_sealable(self, store: StoreFiles, instance: InstanceRecord,
                         disks: list[DiskRecord]) -> None:
        with Host() as host:
            domid = domains.present(host, instance).domid
        domains.refuse_if_saved_by_another(domid)
        refuse_unsaved(toolstack.config_of(domid), {disk.name for disk in disks})

    def seal(self, work: Work) -> Sealed:
        return seal.seal(work)

    def after_create(self, store: StoreFiles, instance: InstanceRecord, record: JournalRecord) -> (
            AbstractContextManager[LiveBlocks | None]):
        return seal.after_create(store, instance, record)

    def console(self, store: StoreFiles, instance: InstanceRecord) -> int:
        with Host() as host:
            domid = domains.present(host, instance).domid
            tty = host.read(f"/local/domain/{domid}/console/tty")
        if not tty:
            raise Refused("the domain has no console (does xenconsoled run?)")
        return os.open(tty, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)

    def console_log(self, store: StoreFiles, machine: MachineRecord) -> Path:
        return CONSOLES / f"guest-{machine.name}.log"


def _refuse_name(host: Host, name: str) -> None:
    for one in host.domains():
        if not one.dying and host.name(one.domid) == name:
            raise Refused(f"there is a domain '{name}' already (number {one.domid}); shut it down "
                          "or choose another name")


def _make_way(store: StoreFiles, host: Host, launch: Launch) -> None:
    """The machine's present domain gives its name to the new one (:meth:`XenDriver.alone` gives it
    back if that is given up)."""
    machine = launch.machine
    old = store.catalog.instance_of(machine.id)
    found = host.find(domains.who(old.id)) if old is not None else None
    if old is not None and found is not None and host.name(found.domid) == machine.name:
        toolstack.rename(found.domid, f"{machine.name}.{old.id[:8]}",
                         store.instance_dir(launch.target.instance))
    _refuse_name(host, machine.name)


def _device(store: StoreFiles, backend: str, chain: list[blockcow.Layer]) -> Path:
    (options,) = store.backend(backend).blockdev(chain, "disk")
    return Path(options["file"]["filename"])


def _refuse_without_room(host: Host, config: DomainConfig, name: str, *,
                         by_xl: bool = True) -> None:
    """``by_xl``: xl will make the domain, which may take memory from dom0."""
    free = host.free_memory
    if free < config.footprint and not (by_xl and toolstack.makes_room()):
        raise Refused(f"the host has {free >> 20} MiB free, and a domain for '{name}' needs "
                      f"{config.footprint >> 20} MiB beside those that run; stop one of them")


def _boot(host: Host, directory: Path, launch: Launch, devices: dict[str, Path]) -> DomainConfig:
    text = launch.machine.spec.config
    if text is None:
        raise Refused(f"machine '{launch.machine.name}' has no configuration to boot it with; roll "
                      "it back to an epoch")
    who = domains.who(launch.target.instance)
    if text.startswith("{"):
        config = DomainConfig.parse(text).placed(launch.machine.name, who, devices)
        _refuse_without_room(host, config, launch.machine.name, by_xl=False)
        toolstack.boot(directory, config)
    else:
        text = overridden(text, launch.machine.name, who, devices)
        config = toolstack.understood(text)
        _refuse_without_room(host, config, launch.machine.name)
        toolstack.create(directory, text)
    points.hit("launch.spawned")
    return config


def _restore(store: StoreFiles, host: Host, directory: Path, launch: Launch, epoch: EpochRecord,
             devices: dict[str, Path]) -> DomainConfig:
    recorded = tuple(int(part) for part in epoch.compatibility["xen"].split("."))
    if recorded > host.version:
        raise Incompatible(f"epoch {epoch.id[:12]} was made on Xen {epoch.compatibility['xen']}, "
                           f"and this host has an older one; restore it on the same Xen or a later "
                           "one")
    with XenDomain(store.packs_dir) as domain:
        saved = images.load(store, epoch.id, domain)
        config = DomainConfig.parse(saved.config)
        refuse_kind(config)
        missing = config.disks.keys() - devices.keys()
        if missing:
            raise Refused(f"epoch {epoch.id[:12]} has no layer of disk '{min(missing)}', and its "
                          "memory must not run over another one; import it with --disk")
        config = config.placed(launch.machine.name, domains.who(launch.target.instance), devices)
        if epoch.machine != launch.machine.id:
            config = config.with_macs_of(launch.machine.id)  # the original may run beside it
        _refuse_without_room(host, config, launch.machine.name)
        launch.clock.lap("load")
        toolstack.restore(directory, lambda sink: xlfile.write(
            sink, domain, XlSave(config.to_json(), saved.libxl)))
    points.hit("launch.loaded")
    return config
