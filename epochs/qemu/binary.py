"""Which QEMU, what it can do, and whether KVM really works with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from epochs.errors import Failed, NotFound

NAME = "qemu-system-x86_64"
OLDEST = (7, 2)
PROBE_LIMIT = 5.0  # seconds; a vCPU that works ends the probe within 0.1

# Reset vector of a 64 KiB firmware image: the 16 bytes below 4 GiB. It enters no mode of its own;
# it writes 0x2a to the isa-debug-exit port, upon which QEMU ends with status (0x2a << 1) | 1.
_PROBE_CODE = bytes([0xB0, 0x2A, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD])  # mov al,42; out 0xf4,al; 1: hlt; jmp 1b
_PROBE_STATUS = (0x2A << 1) | 1


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary. ``version`` is its own, e.g. "7.2.22"."""

    path: str
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number, which decide about compatibility of device state."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def find(path: str | None) -> Qemu:
    """The QEMU at ``path``, or of $EPOCHS_QEMU, or of $PATH; NotFound if there is none."""
    wanted = path or os.environ.get("EPOCHS_QEMU") or NAME
    found = shutil.which(wanted)
    if found is None:
        raise NotFound(f"QEMU is not there ({wanted}); install it with "
                       "'apt-get install qemu-system-x86' or name it in $EPOCHS_QEMU")
    stat = Path(found).stat()
    return _identify(found, stat.st_mtime_ns, stat.st_size)


@cache
def _identify(path: str, _mtime: int, _size: int) -> Qemu:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30,
                                check=False)
    except OSError as error:
        raise Failed(f"{path} does not run: {error.strerror}") from error
    match = re.search(r"version (\d+\.\d+(?:\.\d+)*)", answer.stdout)
    if not match:
        raise Failed(f"{path} does not say that it is QEMU: {(answer.stderr or answer.stdout)[:200]}")
    qemu = Qemu(path, match[1])
    if qemu.release < OLDEST:
        raise Failed(f"{path} is QEMU {qemu.version}; Epochs needs {OLDEST[0]}.{OLDEST[1]} or later")
    return qemu


def kvm_refusal(qemu: Qemu) -> str | None:
    """None if a vCPU really ran under KVM, else why not (the node alone proves nothing)."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing or not permitted"
    with tempfile.TemporaryDirectory(prefix="epochs-probe-") as directory:
        firmware = Path(directory, "probe.bin")
        image = bytearray(b"\xf4" * 65536)
        image[-16:-16 + len(_PROBE_CODE)] = _PROBE_CODE
        firmware.write_bytes(image)
        command = [qemu.path, "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-nodefaults",
                   "-no-user-config", "-display", "none", "-m", "16", "-bios", str(firmware),
                   "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                                   timeout=PROBE_LIMIT, check=False)
        except subprocess.TimeoutExpired:
            return "a vCPU started under KVM did not execute its first instructions"
    if ended.returncode == _PROBE_STATUS:
        return None
    words = ended.stderr.strip().splitlines()
    return f"QEMU ended with {ended.returncode} under KVM" + (f": {words[-1]}" if words else "")


@cache
def machine_type(qemu: Qemu, alias: str) -> str:
    """The versioned name behind a machine type's alias, e.g. "pc-q35-7.2" for "q35"."""
    answer = subprocess.run([qemu.path, "-machine", "help"], capture_output=True, text=True,
                            timeout=30, check=True).stdout
    match = re.search(rf"^{re.escape(alias)}\s.*\(alias of ([^)]+)\)", answer, re.MULTILINE)
    if not match:
        raise Failed(f"{qemu.path} has no machine type {alias}")
    return match[1]
