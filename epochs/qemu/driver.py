"""The QEMU driver: what :class:`epochs.hypervisor.Hypervisor` asks, over QMP."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import blockcow
from blockcow import Layer, LiveBlocks
from epochs.catalog import EpochRecord, InstanceRecord, JournalRecord, MachineRecord
from epochs.durable import write_file
from epochs.errors import EpochsError, Failed, HypervisorDied, Refused
from epochs.fixup import Fixup, Wishes
from epochs.hypervisor import Hypervisor, Launch, Sealed, State, Work
from epochs.network import isolated
from epochs.processes import boot_id, working_in
from epochs.qemu import agent, binary, connection, fixup, forwards, seal
from epochs.qemu.connection import HELD, open_monitor
from epochs.qemu.launch import ReadyQemu, launch
from epochs.qemu.monitor import connect_unix
from epochs.qemu.process import AGENT_SOCKET, CONSOLE_SOCKET
from epochs.spec import DiskSpec, MachineSpec, check
from epochs.store import StoreFiles

MACHINE_ALIAS = "q35"


class QemuDriver(Hypervisor):
    """See :class:`epochs.hypervisor.Hypervisor`."""

    def accept(self, store: StoreFiles, name: str, spec: MachineSpec) -> MachineSpec:
        check(spec)
        binary.find(spec.qemu)
        return replace(spec, kernel=_absolute(spec.kernel), initrd=_absolute(spec.initrd))

    def choose_backend(self, store: StoreFiles, disk: DiskSpec, source: blockcow.Source) -> str:
        return blockcow.choose(store.layers_dir)

    def platform(self, store: StoreFiles, spec: MachineSpec) -> tuple[str, str]:
        qemu = binary.find(spec.qemu)
        return _accelerator(store, spec, qemu), binary.machine_type(qemu, MACHINE_ALIAS)

    def state(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord) -> State:
        return connection.state(store, instance)

    def ended(self, instance: InstanceRecord) -> bool:
        return not instance.process.alive()

    def describe(self, store: StoreFiles, instance: InstanceRecord) -> dict[str, Any]:
        return {"pid": instance.process.pid,
                "address": isolated.address(store, instance.machine)}

    def forked(self, machine: MachineRecord, epoch: EpochRecord,
               source: MachineRecord | None) -> MachineRecord:
        return replace(machine, machine_type=epoch.compatibility["machine_type"],
                       accel=epoch.compatibility["accelerator"], mac=_mac(epoch, source))

    def launch(self, store: StoreFiles, launch_: Launch) -> ReadyQemu:
        return launch(store, launch_)

    has_standbys = True

    def held(self, store: StoreFiles, machine: MachineRecord, record: InstanceRecord,
             layers: dict[str, Layer], packs: frozenset[str]) -> ReadyQemu:
        monitor = open_monitor(store, record)
        try:
            if (word := monitor.status()) not in HELD:
                raise Failed(f"a standby instance is {word}, not held")
            if machine.spec.net == "isolated":
                if not isolated.plugged(machine.id, record.id):
                    raise HypervisorDied("the network that it was plugged into is gone")
                isolated.put_up(store, machine)
        except BaseException:
            monitor.close()
            raise
        return ReadyQemu(record, layers, packs, {}, monitor, machine, store.notice)

    def end(self, store: StoreFiles, instance_id: str) -> None:
        for process in working_in(store.instance_dir(instance_id)):
            try:
                process.kill()
            except TimeoutError as error:
                raise EpochsError(f"QEMU of instance {instance_id[:12]} cannot be ended: "
                                  f"{error}") from error

    def strike(self, store: StoreFiles, machine: MachineRecord,
               instance: InstanceRecord) -> None:
        if machine.spec.publish and machine.spec.net == "user":
            self.end(store, instance.id)  # it has the ports
        else:
            instance.process.strike()

    def released(self, store: StoreFiles, machine_id: str) -> None:
        isolated.take_down(store, machine_id)

    def fix_up(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
               event: str, epoch: str, wishes: Wishes) -> Fixup:
        return fixup.apply(store, machine, instance, event, epoch, wishes)

    def go_on(self, store: StoreFiles, instance: InstanceRecord, *,
              only_held: bool = False) -> None:
        with open_monitor(store, instance) as monitor:
            if not only_held or monitor.status() in HELD:
                machine = store.catalog.machine_by_id(instance.machine)
                if machine is not None:
                    forwards.publish(monitor, machine, store.notice)
                monitor.execute("cont")

    def hold(self, store: StoreFiles, instance: InstanceRecord) -> None:
        with open_monitor(store, instance) as monitor:
            monitor.execute("stop")

    def power_off(self, store: StoreFiles, machine: MachineRecord, instance: InstanceRecord,
                  limit: float) -> None:
        with open_monitor(store, instance) as monitor:
            events = monitor.listen("SHUTDOWN")
            try:
                if monitor.status() == "paused":
                    monitor.execute("cont")  # a paused guest cannot shut itself down
                try:
                    with agent.Agent(store.instance_dir(instance.id) / AGENT_SOCKET, 5.0) as guest:
                        guest.shutdown()
                except (agent.AgentSilent, OSError):
                    monitor.execute("system_powerdown")
                try:
                    monitor.wait_event(events, limit)
                    # The event comes before QEMU has flushed the disks; its next answer after that.
                    monitor.status()
                except TimeoutError:
                    raise Failed(
                        f"the guest of '{machine.name}' did not power off within {limit:.0f} s; "
                        f"'epochs stop --kill {machine.name}' pulls the plug") from None
            except HypervisorDied:
                if instance.process.alive():
                    raise
                # else gone is what was asked for
            finally:
                monitor.forget(events)

    def live(self, store: StoreFiles, instance: InstanceRecord) -> (
            AbstractContextManager[LiveBlocks]):
        return open_monitor(store, instance)

    def seal(self, work: Work) -> Sealed:
        return seal.seal(work)

    def after_create(self, store: StoreFiles, instance: InstanceRecord, record: JournalRecord) -> (
            AbstractContextManager[LiveBlocks | None]):
        return seal.after_create(store, instance, running=bool(record.plan.get("running")))

    def console(self, store: StoreFiles, instance: InstanceRecord) -> int:
        return connect_unix(store.instance_dir(instance.id) / CONSOLE_SOCKET).detach()

    def console_log(self, store: StoreFiles, machine: MachineRecord) -> Path:
        return store.console_log(machine.id)


def _absolute(text: str | None) -> str | None:
    return str(Path(text).resolve()) if text else None


def _mac(epoch: EpochRecord, source: MachineRecord | None) -> str:
    """The MAC that the epoch's memory remembers (the device list records it)."""
    for device in epoch.compatibility["devices"]:
        for option in device.split(","):
            if option.startswith("mac="):
                return str(option[4:])
    return source.mac if source else "52:54:00:00:00:00"  # a machine without network


def _accelerator(store: StoreFiles, spec: MachineSpec, qemu: binary.Qemu) -> str:
    if spec.accel == "tcg":
        return "tcg"
    refusal = _kvm_refusal(store, qemu)
    if refusal is None:
        return "kvm"
    if spec.accel == "kvm":
        raise Refused(f"KVM does not work here: {refusal}; use --accel tcg")
    return "tcg"


def _kvm_refusal(store: StoreFiles, qemu: binary.Qemu) -> str | None:
    """The probe's outcome, remembered until the host boots anew or QEMU changes: where KVM does
    not work it takes its full time limit to say so."""
    memory = store.path / "kvm-probe.json"
    key = [boot_id(), qemu.path, qemu.version, os.access("/dev/kvm", os.R_OK | os.W_OK)]
    try:
        known = json.loads(memory.read_text())
        if known["key"] == key:
            return None if known["refusal"] is None else str(known["refusal"])
    except (FileNotFoundError, ValueError, KeyError):
        pass  # not probed yet
    refusal = binary.kvm_refusal(qemu)
    write_file(memory, json.dumps({"key": key, "refusal": refusal}).encode())
    return refusal
