"""The fix-up of a QEMU guest through its agent."""

from __future__ import annotations

import hashlib
import os
import time

from epochs.catalog import InstanceRecord, MachineRecord
from epochs.errors import EpochsError, Failed
from epochs.fixup import DONE, HOOK, Fixup, Wishes
from epochs.qemu.agent import Agent
from epochs.qemu.connection import open_monitor
from epochs.qemu.process import AGENT_SOCKET
from epochs.store import StoreFiles

ANSWER_LIMIT, RUN_LIMIT = 10.0, 60.0  # seconds for the agent to answer, and for the script to run
SEED = 64  # bytes
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Bytes from the host are mixed into the kernel's pool; it uses them from its next reseeding on,
# for which there is an ioctl (RNDRESEEDCRNG, random(4)) but no command.
SCRIPT = f"""
if [ -n "$NOW" ]; then
    if date -s "@$NOW" >/dev/null
    then echo clock={DONE}
    else echo 'clock=it cannot be set'
    fi
fi
if cat >/dev/urandom; then
    if perl -e 'open(F, ">", "/dev/urandom") && ioctl(F, 0x5207, 0) or exit 1' 2>/dev/null ||
        python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' 2>/dev/null
    then echo random={DONE}
    else echo 'random=mixed in, but used only from the next reseeding on, within a minute: ' \
        'the guest has no perl and no python3'
    fi
else echo 'random=/dev/urandom cannot be written to'
fi
if [ -n "$NEW_HOSTNAME" ]; then
    if echo "$NEW_HOSTNAME" >/etc/hostname && hostname "$NEW_HOSTNAME"
    then echo hostname={DONE}
    else echo 'hostname=it cannot be set'
    fi
fi
if [ -n "$NEW_MACHINE_ID" ]; then
    if echo "$NEW_MACHINE_ID" >/etc/machine-id
    then echo machine_id={DONE}
    else echo 'machine_id=/etc/machine-id cannot be written to'
    fi
fi
if [ -x {HOOK} ]; then
    if {HOOK} </dev/null >/dev/null 2>&1
    then echo hook={DONE}
    else echo "hook={HOOK} ended with $?"
    fi
fi
"""


def machine_id(machine: str) -> str:
    """An /etc/machine-id (machine-id(5)) that stays with a machine."""
    return hashlib.sha256(f"machine-id {machine}".encode()).hexdigest()[:32]


def apply(store: StoreFiles, machine: MachineRecord, instance: InstanceRecord, event: str,
          epoch: str, wishes: Wishes) -> Fixup:
    """Tell a running guest about ``event`` ("rollback" or "fork"). Never raises for what the guest
    does or lacks: that is in the result."""
    try:
        with open_monitor(store, instance) as monitor:
            if not agent_there(monitor.execute("query-chardev")):
                return Fixup.nothing(machine.name, "the guest has no agent that runs", wishes)
        with Agent(store.instance_dir(instance.id) / AGENT_SOCKET, ANSWER_LIMIT) as agent:
            # Its way of setting the clock needs hwclock in the guest.
            clock_set = _set_clock(agent)
            return _run(agent, machine, clock_set, {
                "NOW": "" if clock_set else str(round(time.time())),
                "EPOCHS_EVENT": event, "EPOCHS_MACHINE": machine.name, "EPOCHS_EPOCH": epoch,
                "NEW_HOSTNAME": machine.name if wishes.hostname else "",
                "NEW_MACHINE_ID": machine_id(machine.id) if wishes.machine_id else "",
                "PATH": PATH}, wishes)
    except (EpochsError, OSError) as error:
        return Fixup.nothing(machine.name, str(error), wishes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Fixup.nothing(machine.name, f"the guest's agent answers with rubbish: {error}",
                             wishes)


def agent_there(chardevs: list[dict[str, object]]) -> bool:
    """Whether the guest has the agent's port open, by ``query-chardev``."""
    return any(one["label"] == "agent" and one["frontend-open"] for one in chardevs)


def _set_clock(agent: Agent) -> bool:
    try:
        agent.execute("guest-set-time", time=time.time_ns())
    except Failed:
        return False
    return True


def _run(agent: Agent, machine: MachineRecord, clock_set: bool, environment: dict[str, str],
         wishes: Wishes) -> Fixup:
    try:
        done = agent.run(["/bin/sh", "-c", SCRIPT], stdin=os.urandom(SEED), timeout=RUN_LIMIT,
                         environment=environment)
    except Failed as error:
        return Fixup(machine.name, DONE if clock_set else str(error), str(error),
                     str(error) if wishes.hostname else None,
                     str(error) if wishes.machine_id else None)
    told = dict(line.split("=", 1) for line in done.stdout.decode(errors="replace").splitlines()
                if "=" in line)
    silent = f"the guest's shell ended with {done.status}"
    return Fixup(machine.name, DONE if clock_set else told.get("clock", silent),
                 told.get("random", silent),
                 told.get("hostname", silent) if wishes.hostname else None,
                 told.get("machine_id", silent) if wishes.machine_id else None,
                 told.get("hook"))
