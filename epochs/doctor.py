"""``doctor``: what this host can do for Epochs, and what is missing with its mend."""

from __future__ import annotations

import ctypes
import os
import shutil
import sqlite3
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import blockcow
import memsave
import memsave.errors
from epochs.errors import EpochsError
from epochs.hypervisor import hypervisor
from epochs.processes import ProcessId
from epochs.qemu import binary, yama
from epochs.store import StoreFiles, default_path

GOOD, LACKING, MISSING = "good", "lacking", "missing"
SPACE_WARNING = 2 * 2**30  # bytes


@dataclass(frozen=True)
class Check:
    """One finding. ``state``: good, lacking (slower or less) or missing (does not work)."""

    name: str
    state: str
    detail: str
    mend: str | None = None

    @property
    def mark(self) -> str:
        return {GOOD: "ok     ", LACKING: "lacking", MISSING: "MISSING"}[self.state]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(store: str | None) -> list[Check]:
    """All checks, in the order of what depends on what."""
    return [*_qemu(), _tool("qemu-img", "qemu-utils"), _memory(), _tracking(), *_device_mapper(),
            *_xen(), _networks(), _showing(), *_store(store)]


def _qemu() -> list[Check]:
    try:
        qemu = binary.find(None)
    except EpochsError as error:
        return [Check("QEMU", MISSING, str(error), "apt-get install qemu-system-x86")]
    refusal = binary.kvm_refusal(qemu)
    return [Check("QEMU", GOOD, f"{qemu.version} at {qemu.path}"),
            Check("KVM", LACKING, f"{refusal}; guests run by emulation (TCG)",
                  "use a host with hardware virtualisation, and let your user into group kvm")
            if refusal else Check("KVM", GOOD, "a vCPU really ran")]


def _tool(name: str, package: str) -> Check:
    found = shutil.which(name)
    return Check(name, GOOD, found) if found else Check(name, MISSING, "not there",
                                                        f"apt-get install {package}")


def _device_mapper() -> list[Check]:
    """What disks on devices need. Without it those on files work as ever."""
    from blockcow.devmapper import DmUnavailable, open_driver

    try:
        open_driver()
    except DmUnavailable as error:
        detail, _, mend = str(error).partition("; ")
        return [Check("device-mapper", LACKING, f"{detail}: no pools, no disks on LVM and no "
                      "dmsnap; disks on files (qcow2, reflink) work",
                      mend or "use a host that has it")]
    checks = [Check("device-mapper", GOOD, "there")]
    for name, tool, package, what in (
            ("thin tools", "thin_check", "thin-provisioning-tools", "pools and thin volumes"),
            ("LVM", "lvm", "lvm2", "disks on logical volumes")):
        found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        checks.append(Check(name, GOOD, found) if found else
                      Check(name, LACKING, f"{tool} is not there: no {what}",
                            f"apt-get install {package}"))
    return checks


def _networks() -> Check:
    """What `--net isolated` needs."""
    from epochs.network import isolated

    reason = isolated.lacking()
    if reason is not None:
        return Check("isolated networks", LACKING, reason.partition(": ")[0],
                     reason.partition(": ")[2] or "run as root, on a kernel with tun")
    return Check("isolated networks", GOOD, "there")


def _xen() -> list[Check]:
    """What domains of Xen need."""
    from epochs.xen import domains
    from memsave.errors import XenMissing

    if not domains.is_dom0():
        return [Check("Xen", LACKING, "this is no dom0 of Xen; machines of QEMU work",
                      "boot Xen and use its dom0")]
    from memsave.xen.live import Host

    try:
        with Host() as host:
            version = "{}.{}".format(*host.version)
            free = host.free_memory
    except XenMissing as error:
        return [Check("Xen", LACKING, str(error), "apt-get install libxen-dev, and install epochs "
                      "anew, as root")]
    if shutil.which("xl") is None:
        return [Check("Xen", LACKING, f"{version}, but xl is not there",
                      "apt-get install xen-utils")]
    return [Check("Xen", GOOD, f"{version}, {free / 2**20:.0f} MiB free for domains")]


def _showing() -> Check:
    if os.geteuid() != 0:
        return Check("mount", LACKING, "only root may mount an epoch's disk, or compare its files",
                     "run 'epochs mount' and 'epochs diff --files' as root")
    from blockcow import fuse

    refusal = fuse.refusal()
    if refusal:
        return Check("mount", LACKING, refusal, "modprobe fuse")
    return Check("mount", GOOD, "epochs' disks can be mounted (FUSE)")


def _memory() -> Check:
    refusal = yama.refusal()
    if refusal:
        return Check("guest memory", MISSING, refusal, "sysctl kernel.yama.ptrace_scope=1")
    return Check("guest memory", GOOD, f"readable (ptrace scope {yama.scope()})")


def _tracking() -> Check:
    """Track a page of this very process: the same calls as a capture makes."""
    import mmap

    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    holder = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
    layout = memsave.Layout((memsave.Block("probe", mmap.PAGESIZE),))
    try:
        with memsave.GuestMemory(os.getpid(), layout,
                                 {"probe": ctypes.addressof(holder)}) as guest:
            method = guest.method
    except memsave.errors.MemsaveError as error:
        return Check("written pages", MISSING, str(error),
                     "run on a kernel that lets you read your own /proc/PID/pagemap")
    finally:
        del holder
        page.close()
    if _userfaultfd():
        return Check("written pages", GOOD, "found exactly, by userfaultfd write-protection")
    return Check("written pages", LACKING, f"only a superset is found ({method}): each pause reads "
                 "every page written since the machine's start", "use Linux 6.7 or later")


def _userfaultfd() -> bool:
    """Whether a process with the preloaded library gets its userfaultfd."""
    shown = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True,
                           env={**os.environ, "LD_PRELOAD": str(memsave.preload_library())},
                           check=False)
    return "anon_inode:[userfaultfd]" in shown.stdout


def _store(path: str | None) -> list[Check]:
    place = path or str(default_path())
    try:
        files = StoreFiles(path)
    except EpochsError as error:
        detail, _, mend = str(error).partition("; ")  # sentences end in their mend
        return [Check("store", MISSING, detail, mend or "name another with --store")]
    try:
        stat = os.statvfs(files.path)
        free = stat.f_bavail * stat.f_frsize
        space = f"{free / 2**30:.1f} GiB free"
        checks = [Check("store", GOOD, f"{place}, {space}") if free > SPACE_WARNING
                  else Check("store", LACKING, f"{place}, only {space}",
                             "epochs delete, epochs gc"),
                  Check("disk backend", GOOD, blockcow.choose(files.layers_dir))]
        try:
            checks += _machines(files)
            checks += _pools(files)
        except sqlite3.DatabaseError as error:
            checks.append(Check("catalog", MISSING, f"{files.catalog.path} cannot be read: {error}",
                                "bring the store back from a backup, or name another with --store"))
        return checks
    finally:
        files.close()


def _pools(files: StoreFiles) -> list[Check]:
    from epochs.protocol import pools

    checks = []
    for record in files.catalog.pools():
        found = pools.state(files, record)
        name, room = f"pool {record.name}", found.room
        if room is None:
            checks.append(Check(name, MISSING, found.trouble or "it cannot be asked",
                                f"epochs pool status {record.name}"))
            continue
        detail = (f"{room.data / 2**20:.0f} of {room.data_total / 2**20:.0f} MiB free, metadata "
                  f"{room.metadata / 2**20:.1f} of {room.metadata_total / 2**20:.1f} MiB")
        low = room.data * 10 < room.data_total or room.metadata * 10 < room.metadata_total
        checks.append(Check(name, LACKING, f"only {detail}", f"epochs pool extend {record.name}")
                      if low else Check(name, GOOD, detail))
    return checks


def _machines(files: StoreFiles) -> list[Check]:
    checks = []
    for machine in files.catalog.machines():
        instance = files.catalog.instance_of(machine.id)
        try:
            if instance is not None and hypervisor(machine.spec).ended(instance):
                checks.append(Check(f"machine {machine.name}", LACKING, "its hypervisor has died",
                                    f"epochs start {machine.name}, or roll it back"))
        except (EpochsError, memsave.errors.MemsaveError) as error:
            checks.append(Check(f"machine {machine.name}", LACKING, str(error),
                                f"epochs status {machine.name}"))
    own = ProcessId.own()
    waiting = [record for record in files.catalog.journal()
               if not record.operator.alive() and record.operator != own]
    checks.append(Check("interrupted commands", LACKING, f"{len(waiting)} to settle",
                        "epochs recover") if waiting
                  else Check("interrupted commands", GOOD, "none"))
    return checks
