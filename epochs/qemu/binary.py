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
PROBE_LIMIT = 3.0  # seconds; a vCPU that works ends the probe within 0.1

# The last 256 bytes of a 64 KiB firmware image. From the reset vector it builds page tables, enters
# long mode, counts 100 million down to 0, and writes 0x2a to the isa-debug-exit port, upon which
# QEMU ends with status (0x2a << 1) | 1. A KVM that only emulates (nested without hardware support)
# gets through the mode switches but not through the loop in time. Source, for "as --64":
#
#   .code16                              ljmpl $8, $(0xf0000 + code64)
#   .org 0xff00                          .code64
#   start: cli                           code64: movl $100000000, %ecx
#   xorw %ax, %ax                        2: decl %ecx
#   movw %ax, %ds                        jnz 2b
#   movl $0x2003, 0x1000                 movb $42, %al
#   movl $0x3003, 0x2000                 outb %al, $0xf4
#   movl $0x83, 0x3000                   1: hlt
#   lgdtl %cs:gdtr                       jmp 1b
#   movl $0x20, %eax                     .align 8
#   movl %eax, %cr4                      gdt: .quad 0
#   movl $0x1000, %eax                   .quad 0x00209b0000000000
#   movl %eax, %cr3                      gdtr: .word 15
#   movl $0xC0000080, %ecx               .long 0xf0000 + gdt
#   rdmsr                                .code16
#   orl $0x100, %eax                     .org 0xfff0
#   wrmsr                                ljmpw $0xf000, $start
#   movl $0x80000011, %eax
#   movl %eax, %cr0
_PROBE_CODE = bytes.fromhex(
    "fa31c08ed866c70600100320000066c7"
    "0600200330000066c706003083000000"
    "2e660f011680ff66b8200000000f22e0"
    "66b8001000000f22d866b9800000c00f"
    "32660d000100000f3066b8110000800f"
    "22c066ea5aff0f000800b900e1f505ff"
    "c975fcb02ae6f4f4ebfd8db400006690"
    "000000000000000000000000009b2000"
    "0f0070ff0f000000")
_PROBE_JUMP = bytes.fromhex("ea00ff00f0")
_PROBE_SIZE, _PROBE_START, _PROBE_RESET = 0x10000, 0xFF00, 0xFFF0
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
        raise Failed(f"{path} does not say that it is QEMU: "
                     f"{(answer.stderr or answer.stdout)[:200]}")
    qemu = Qemu(path, match[1])
    if qemu.release < OLDEST:
        raise Failed(f"{path} is QEMU {qemu.version}; Epochs needs "
                     f"{OLDEST[0]}.{OLDEST[1]} or later")
    return qemu


def kvm_refusal(qemu: Qemu) -> str | None:
    """None if a vCPU really ran under KVM, else why not (the node alone proves nothing)."""
    return probe(qemu, "kvm", "host")


@cache
def probe(qemu: Qemu, accel: str, cpu: str) -> str | None:
    """Run the probe program on a vCPU of an accelerator; None if it ended as it should."""
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing or not permitted"
    with tempfile.TemporaryDirectory(prefix="epochs-probe-") as directory:
        firmware = Path(directory, "probe.bin")
        image = bytearray(_PROBE_SIZE)
        image[_PROBE_START:_PROBE_START + len(_PROBE_CODE)] = _PROBE_CODE
        image[_PROBE_RESET:_PROBE_RESET + len(_PROBE_JUMP)] = _PROBE_JUMP
        firmware.write_bytes(image)
        command = [qemu.path, "-accel", accel, "-cpu", cpu, "-machine", "q35", "-nodefaults",
                   "-no-user-config", "-display", "none", "-m", "16", "-bios", str(firmware),
                   "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False,
                                   stdin=subprocess.DEVNULL, timeout=PROBE_LIMIT)
        except subprocess.TimeoutExpired:
            return (f"a vCPU under {accel} did not get through its first instructions within "
                    f"{PROBE_LIMIT:.0f} s")
    if ended.returncode == _PROBE_STATUS:
        return None
    words = ended.stderr.strip().splitlines()
    return f"QEMU ended with {ended.returncode} under {accel}" + (f": {words[-1]}" if words else "")


@cache
def machine_type(qemu: Qemu, alias: str) -> str:
    """The versioned name behind a machine type's alias, e.g. "pc-q35-7.2" for "q35"."""
    answer = subprocess.run([qemu.path, "-machine", "help"], capture_output=True, text=True,
                            timeout=30, check=True).stdout
    match = re.search(rf"^{re.escape(alias)}\s.*\(alias of ([^)]+)\)", answer, re.MULTILINE)
    if not match:
        raise Failed(f"{qemu.path} has no machine type {alias}")
    return match[1]
