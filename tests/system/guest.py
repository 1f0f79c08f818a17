"""A real guest under test: waiting for its console, talking to its witness, checking its disks."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockcow.tools import json_name
from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store
from epochs.processes import ProcessId
from epochs.spec import XEN

CTL = "/bin/witness-ctl"
BOOT_LIMIT = 60.0  # seconds; a loaded machine boots the tiny guest in well under 20


@dataclass(frozen=True)
class Artefacts:
    """What scripts/guests built: kernel, initramfs, command line, disk images."""

    directory: Path

    def spec(self, *, memory: int = 128 * 2**20, vga: bool = False, cpus: int = 1,
             disks: tuple[str, ...] = ("a", "b"), backend: str | None = None) -> MachineSpec:
        return MachineSpec(
            memory=memory, cpus=cpus, vga=vga, accel="tcg",
            disks=tuple(DiskSpec(name, str(self.directory / f"{name}.img"), "raw", backend)
                        for name in disks),
            kernel=str(self.directory / "vmlinuz"), initrd=str(self.directory / "initrd"),
            append=(self.directory / "append").read_text().strip())


def debian_spec(directory: Path, cpus: int = 2) -> MachineSpec:
    """The Debian guest that scripts/guests/build-debian made there."""
    return MachineSpec(
        memory=2**30, cpus=cpus, accel="tcg",
        disks=(DiskSpec("root", str(directory / "root.img"), "raw"),),
        kernel=str(directory / "vmlinuz"), initrd=str(directory / "initrd"),
        append=(directory / "append").read_text().strip())


class WitnessFailed(AssertionError):
    """The witness inside the guest saw memory and disk disagree, or does not answer."""


def wait_console(machine: Machine, text: str, since: int = 0, limit: float = BOOT_LIMIT) -> None:
    """Wait until the console log holds ``text`` after byte ``since``.

    The log is a plain file that QEMU appends to; inotify through a poll of its size would tell no
    more than reading it does, so this reads in short steps and fails with what was said."""
    deadline = time.monotonic() + limit
    while text.encode() not in (said := machine.console_log.read_bytes()[since:]):
        if time.monotonic() > deadline:
            raise AssertionError(f"{machine.name} did not say {text!r} within {limit:.0f} s; it "
                                 f"said …{said[-400:]!r}")
        select.select([], [], [], 0.02)


def ctl(machine: Machine, *words: str) -> str:
    """Ask the witness something; returns its answer."""
    if machine.record.spec.hypervisor == XEN:  # which has no guest agent
        from tests.xen.lab.domu import DomU

        return DomU(machine.name).ctl(*words)
    done = machine.exec([CTL, *words], timeout=60)
    answer = (done.stdout + done.stderr).decode().strip()
    if done.status != 0:
        raise WitnessFailed(f"{machine.name}: witness-ctl {' '.join(words)}: {answer}")
    return answer


def witness_count(machine: Machine) -> int:
    """The witness' sequence number; WitnessFailed if it reports a mismatch."""
    answer = ctl(machine, "status")
    match = re.match(r"OK (\d+)", answer)
    if not match:
        raise WitnessFailed(f"{machine.name}: {answer}")
    return int(match[1])


def wait_witness(machine: Machine, beyond: int, limit: float = 30.0) -> int:
    """Wait until the witness got beyond a number with everything compared well."""
    deadline = time.monotonic() + limit
    while (count := witness_count(machine)) <= beyond:
        if time.monotonic() > deadline:
            raise WitnessFailed(f"{machine.name}: the witness stands still at {count}")
    return count


def check_disks(store: Store, epoch: Epoch, scratch: Path) -> None:
    """e2fsck -fn on every disk of an epoch, after journal replay, on throw-away copies."""
    for disk, layer in epoch.disks.items():
        chain = store.files.catalog.chain(layer)
        copy = scratch / f"{epoch.id[:12]}-{disk}.raw"
        with store.files.backend(chain[0].backend).exposed(chain) as image:
            subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", json_name(image), str(copy)],
                           check=True, capture_output=True)
        replay = subprocess.run(["e2fsck", "-E", "journal_only", "-y", str(copy)],
                                capture_output=True, text=True, check=False)
        assert replay.returncode in (0, 1), replay.stdout + replay.stderr
        checked = subprocess.run(["e2fsck", "-fn", str(copy)], capture_output=True, text=True,
                                 check=False)
        copy.unlink()
        assert checked.returncode == 0, (
            f"epoch {epoch.id[:12]} disk {disk}: {checked.stdout}{checked.stderr}")


@contextmanager
def mounted(directory: Path, kind: str, mib: int = 512) -> Iterator[Path]:
    """A file system of its own on a loop device below ``directory``. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, mount = directory / f"{kind}.img", directory / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(mib * 2**20)
    options = {"ext4": ["-q", "-m", "0"], "xfs": ["-q", "-m", "reflink=1"], "btrfs": ["-q"]}[kind]
    subprocess.run([f"mkfs.{kind}", *options, str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def processes_in(directory: Path) -> list[int]:
    """Pids of processes whose working directory lies below ``directory``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink().is_relative_to(directory):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_fillers(store: Store) -> None:
    """Wait until nobody makes standby instances in the background any more."""
    for pid in processes_in(store.files.path):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            process = ProcessId.of(pid)
            if Path(f"/proc/{pid}/cwd").readlink() == store.files.path:
                assert process.wait(120), Path(f"/proc/{pid}/cmdline").read_text()


def assert_tidy(store: Store) -> None:
    """Invariant 1: nothing in the store that the catalog does not name, no process astray, no
    journal row left."""
    from epochs.protocol import upkeep

    wait_fillers(store)
    assert store.files.catalog.journal() == []
    assert upkeep.orphans(store.files) == []
    known = {i.process.pid for i in store.files.catalog.instances() if i.process.alive()}
    assert set(processes_in(store.files.path / "instances")) == known
    assert upkeep.strays(store.files) == []
    blocks = {layer.id for layer in store.files.catalog.layers()}
    for epoch in store.epochs():
        assert set(epoch.disks.values()) <= blocks


def assert_no_lock_astray(store: Store) -> None:
    """No lock file of a machine that is gone. After a power cut there may be one, empty: its
    removal is not waited for."""
    for lock in (store.files.path / "locks").glob("machine-*"):
        assert store.files.catalog.machine_by_id(lock.name.removeprefix("machine-")), lock


__all__ = ["Artefacts", "WitnessFailed", "assert_no_lock_astray", "assert_tidy", "check_disks",
           "ctl", "processes_in", "wait_console", "wait_fillers",
           "wait_witness", "witness_count"]
