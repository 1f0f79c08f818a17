"""The hypervisor of a machine as it is now: alive, dead, paused, powered off."""

from __future__ import annotations

from dataclasses import dataclass

from epochs.catalog import InstanceRecord, MachineRecord
from epochs.errors import Failed, HypervisorDied, Refused
from epochs.qemu.monitor import Monitor
from epochs.qemu.process import QMP_SOCKET, last_words
from epochs.store import StoreFiles

# QEMU run states in which vCPUs execute; everything else that is alive counts as paused.
RUNNING = "running"
GUEST_OFF = "shutdown"  # -no-shutdown: the guest powered itself off
# Neither running nor held by us: "suspended" is the guest's own sleep, the others are QEMU's.
STUCK = ("io-error", "internal-error", "guest-panicked", "watchdog", "suspended")
ENDING = 2.0  # seconds that a process may take from hanging up to its end


@dataclass(frozen=True)
class State:
    """``word`` is one of off, running, paused, died, or QEMU's own word for a stuck guest."""

    word: str
    instance: InstanceRecord | None = None
    detail: str | None = None

    @property
    def alive(self) -> bool:
        return self.word not in ("off", "died")


def open_monitor(store: StoreFiles, instance: InstanceRecord) -> Monitor:
    """Connect to an instance's monitor. HypervisorDied if its process is gone; Failed if it lives
    and cannot be reached, which must never be taken for the former."""
    if instance.process.alive():
        try:
            return Monitor.open(store.instance_dir(instance.id) / QMP_SOCKET)
        except HypervisorDied as error:
            _require_ended(instance, error)
    words = last_words(store.instance_dir(instance.id))
    raise HypervisorDied(f"QEMU (pid {instance.process.pid}) has ended"
                         + (f": {words}" if words else ""))


def _require_ended(instance: InstanceRecord, error: HypervisorDied) -> None:
    """A monitor that hung up proves nothing: Failed if the process lives on."""
    if not instance.process.wait(ENDING):
        raise Failed(f"QEMU (pid {instance.process.pid}) runs but cannot be reached: "
                     f"{error}") from error


def state(store: StoreFiles, machine: MachineRecord) -> State:
    """What the machine's hypervisor says now."""
    instance = store.catalog.instance_of(machine.id)
    if instance is None:
        return State("off")
    try:
        with open_monitor(store, instance) as monitor:
            word = monitor.status()
    except HypervisorDied as error:
        _require_ended(instance, error)
        return State("died", instance, str(error))
    if word == GUEST_OFF:
        return State("off", instance, "the guest powered itself off")
    if word in (RUNNING, *STUCK):
        return State(word, instance)
    return State("paused", instance)


def require_live(store: StoreFiles, machine: MachineRecord) -> InstanceRecord:
    """The instance of a machine that runs or is paused; Refused with the reason otherwise."""
    found = state(store, machine)
    if found.instance is not None and found.word in (RUNNING, "paused"):
        return found.instance
    if found.word == "died":
        raise Refused(f"machine '{machine.name}' has died ({found.detail}); "
                      f"start it with 'epochs start {machine.name}' or roll it back")
    if found.word == "off":
        raise Refused(f"machine '{machine.name}' is off; start it with "
                      f"'epochs start {machine.name}'")
    if found.word == "suspended":
        raise Refused(f"machine '{machine.name}' is suspended to RAM by its guest; wake it first")
    raise Refused(f"machine '{machine.name}' is stopped by QEMU ({found.word}); mend the cause "
                  f"(a full disk?), then 'epochs start {machine.name}' lets it go on")
