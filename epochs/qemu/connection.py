"""Reaching the QEMU of an instance, and what it says of itself."""

from __future__ import annotations

from epochs.catalog import InstanceRecord
from epochs.errors import Failed, HypervisorDied
from epochs.hypervisor import DIED, OFF, PAUSED, RUNNING, SUSPENDED, State
from epochs.qemu.monitor import Monitor
from epochs.qemu.process import QMP_SOCKET, last_words
from epochs.store import StoreFiles

GUEST_OFF = "shutdown"  # -no-shutdown: the guest powered itself off
STUCK = ("io-error", "internal-error", "guest-panicked", "watchdog")  # neither running nor held
# Run states in which nothing but we lets the guest go on. Not: suspended to RAM, whence its own
# alarm clock wakes it; powered off; stopped by QEMU for an error.
HELD = ("paused", "prelaunch", "postmigrate")
ENDING = 2.0  # seconds that a process may take from hanging up to its end


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


def state(store: StoreFiles, instance: InstanceRecord) -> State:
    """What an instance's QEMU says now."""
    try:
        with open_monitor(store, instance) as monitor:
            word = monitor.status()
    except HypervisorDied as error:
        _require_ended(instance, error)
        return State(DIED, instance, str(error))
    if word == GUEST_OFF:
        return State(OFF, instance, "the guest powered itself off")
    if word == SUSPENDED:
        return State(SUSPENDED, instance, "its guest sleeps in RAM; wake it first")
    if word in (RUNNING, *STUCK):
        return State(word, instance)
    return State(PAUSED, instance)
