"""The domain of an instance: who it is, what it is doing, and who else works on it."""

from __future__ import annotations

import uuid
from pathlib import Path

from epochs.catalog import InstanceRecord
from epochs.errors import HypervisorDied, Refused
from epochs.hypervisor import DIED, OFF, PAUSED, RUNNING, SUSPENDED, State
from epochs.processes import ProcessId, boot_id
from memsave.xen.live import Host, Running

POWEROFF, REBOOT, SUSPEND, CRASH = range(4)  # SHUTDOWN_* of xen/include/public/sched.h
SAVER = "libxl-save-help"  # the name of libxl's helper, as far as the kernel keeps it


def who(instance_id: str) -> uuid.UUID:
    """The UUID of an instance's domain is the instance's id."""
    return uuid.UUID(hex=instance_id)


def process_of(domid: int) -> ProcessId:
    """What the catalog holds of a domain in place of a process: its number, and the host's boot."""
    return ProcessId(domid, 0, boot_id())


def is_dom0() -> bool:
    """Whether domains can be here at all."""
    try:
        return "control_d" in Path("/proc/xen/capabilities").read_text()
    except OSError:
        return False


def present(host: Host, instance: InstanceRecord) -> Running:
    """The domain of an instance. HypervisorDied if it is gone."""
    found = host.find(who(instance.id))
    if found is None:
        raise HypervisorDied(f"the domain (number {instance.process.pid}) is gone")
    return found


def state(instance: InstanceRecord) -> State:
    """What Xen says of an instance's domain now."""
    with Host() as host:
        found = host.find(who(instance.id))
    if found is None:
        return State(DIED, instance, "the domain is gone" if instance.process.boot == boot_id()
                     else "the host was booted anew")
    if found.reason is None:
        return State(PAUSED if found.paused else RUNNING, instance)
    if found.reason == POWEROFF:
        return State(OFF, instance, "the guest powered itself off")
    if found.reason == REBOOT:
        return State(OFF, instance, "the guest wants to be booted anew")
    if found.reason == SUSPEND:
        return State(SUSPENDED, instance, "'xl save' or another program has it; wait for that, or "
                     "let it go on with 'epochs start' if that was killed")
    return State(DIED, instance, "the guest has crashed")


class SavedByAnother(Refused):
    """xl saves or migrates a domain, and it must be left as it is, suspended or not."""


def refuse_if_saved_by_another(domid: int) -> None:
    """libxl's helper saves or migrates one domain, whose number is among its arguments; tracking of
    ours would take the domain's pages from under it. SavedByAnother."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "comm").read_text().strip() != SAVER:
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if b"--save-domain" in words and str(domid).encode() in words:
            raise SavedByAnother(f"the domain (number {domid}) is being saved or migrated by xl "
                                 f"(process {entry.name}); wait for it")
