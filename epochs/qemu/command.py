"""The QEMU command line of an instance, and what of it decides restore compatibility.

Everything the guest can see is fixed here: an epoch loads only into the same machine type, CPU
model and devices, so :func:`compatibility` is recorded with every epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blockcow
from epochs.errors import Incompatible
from epochs.qemu.binary import Qemu
from epochs.qemu.monitor import to_json
from epochs.spec import MachineSpec

RAM_BLOCK = "ram"  # the memory backend's id is the name of its RAM block
PAGE = 4096
# Of the two, what a guest has negotiated differs: an epoch of one cannot be loaded over the other.
NETDEV = {"user": "net0", "isolated": "tap0"}


@dataclass(frozen=True)
class Sockets:
    """Descriptors of listening UNIX sockets that QEMU inherits."""

    qmp: int
    console: int
    agent: int


def disk_node(layer_id: str) -> str:
    """Node name of an active layer (QEMU allows 31 characters, beginning with a letter)."""
    return f"d{layer_id[:24]}"


def mac_address(machine_id: str) -> str:
    """A locally administered MAC that stays with the machine."""
    digest = hashlib.sha256(machine_id.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def cpu_model(accel: str) -> str:
    return "host" if accel == "kvm" else "max"


def devices(spec: MachineSpec, mac: str) -> list[str]:
    """The guest-visible devices besides disks, as -device arguments, in slot order."""
    found = ["virtio-serial-pci,id=serial", "virtserialport,chardev=agent,"
             "name=org.qemu.guest_agent.0", "virtio-rng-pci,id=rng"]
    if spec.net != "none":
        found.append(f"virtio-net-pci,netdev={NETDEV[spec.net]},id=net0,mac={mac},romfile=")
    if spec.vga:
        found.append("VGA,id=vga")
    found += [f"virtio-blk-pci,id=disk-{disk.name},drive=@{disk.name},serial={disk.name}"
              # Where space can run out under a guest, it stands still until there is some, and
              # then the write is done; an error would have it lose the file system.
              + (",werror=stop" if disk.backend in blockcow.DIRECT else "")
              for disk in spec.disks]
    return found


def arguments(
    spec: MachineSpec,
    *,
    name: str,
    accel: str,
    machine_type: str,
    mac: str,
    image: Path,
    nodes: Mapping[str, str],
    blockdevs: Sequence[Mapping[str, Any]],
    sockets: Sockets,
    console_log: Path,
    generation_id: str,
    incoming: bool,
    tap: int | None = None,
) -> list[str]:
    """The argument vector after the binary. ``nodes`` maps disk names to block nodes; ``tap`` is a
    descriptor, for an isolated network."""
    argv = ["-name", f"guest={name.replace(',', ',,')}",
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            "-machine", f"{machine_type},memory-backend={RAM_BLOCK}", "-accel", accel,
            "-cpu", cpu_model(accel), "-smp", str(spec.cpus), "-m", f"{spec.memory // 1024}K",
            "-object", to_json({"qom-type": "memory-backend-file", "id": RAM_BLOCK,
                                "mem-path": str(image), "size": spec.memory, "share": False}),
            "-chardev", f"socket,id=qmp,fd={sockets.qmp},server=on,wait=off",
            "-mon", "chardev=qmp,mode=control",
            "-chardev", to_option({"socket,id": "console", "fd": str(sockets.console),
                                   "server": "on", "wait": "off", "logappend": "on",
                                   "logfile": str(console_log)}),
            "-serial", "chardev:console",
            "-chardev", f"socket,id=agent,fd={sockets.agent},server=on,wait=off",
            "-device", f"vmgenid,guid={generation_id}"]
    if spec.net == "user":
        # Published ports come later: in a rollback the old QEMU still has them.
        argv += ["-netdev", f"user,id={NETDEV[spec.net]}"]
    elif tap is not None:
        argv += ["-netdev", f"tap,id={NETDEV[spec.net]},fd={tap}"]
    for blockdev in blockdevs:
        argv += ["-blockdev", to_json(blockdev)]
    for device in devices(spec, mac):
        head, at, rest = device.partition("drive=@")
        if at:
            disk, _, tail = rest.partition(",")
            device = f"{head}drive={nodes[disk]},{tail}"  # noqa: PLW2901
        argv += ["-device", device]
    if spec.kernel:
        argv += ["-kernel", spec.kernel]
        if spec.initrd:
            argv += ["-initrd", spec.initrd]
        if spec.append:
            argv += ["-append", spec.append]
    argv += list(spec.extra)
    # -no-shutdown: a guest that powers itself off stays to be seen as such (run state shutdown),
    # so that a process that is gone always means one that died.
    argv += ["-no-shutdown", "-S"]
    if incoming:
        argv += ["-incoming", "defer"]
    return argv


def to_option(pairs: Mapping[str, str]) -> str:
    """QemuOpts text; commas in values are written twice."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in pairs.items())


def compatibility(spec: MachineSpec, qemu: Qemu, accel: str, machine_type: str,
                  mac: str, generation_id: str) -> dict[str, Any]:
    """What must be equal for an epoch's device state to load, as recorded with the epoch, and the
    generation id, which need not."""
    return {
        "qemu": qemu.version,
        "machine_type": machine_type,
        "accelerator": accel,
        "cpu_model": cpu_model(accel),
        "cpus": spec.cpus,
        "memory": spec.memory,
        "devices": [*devices(spec, mac), *spec.extra],
        "page_size": PAGE,
        "generation_id": generation_id,
    }


_MAY_DIFFER = ("qemu", "generation_id")
_WORDS = {"machine_type": "machine type", "cpu_model": "CPU model", "page_size": "page size",
          "cpus": "number of CPUs"}


def check_compatible(epoch: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise Incompatible with the first difference that matters.

    Two QEMUs of one major.minor release load each other's device state; across releases the
    CPU model "max" and firmware differ, so that is refused.
    """
    release = [str(side["qemu"]).split(".")[:2] for side in (recorded, present)]
    if release[0] != release[1]:
        raise Incompatible(f"epoch {epoch} was made by QEMU {recorded['qemu']} and cannot be "
                           f"loaded by QEMU {present['qemu']}; use a QEMU {'.'.join(release[0])} "
                           "(set $EPOCHS_QEMU)")
    for key in sorted(set(recorded) | set(present)):
        if key not in _MAY_DIFFER and recorded.get(key) != present.get(key):
            raise Incompatible(f"epoch {epoch} needs {_WORDS.get(key, key)} {recorded.get(key)}, "
                               f"but this would be {present.get(key)}")
