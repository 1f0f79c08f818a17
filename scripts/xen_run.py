"""Runs a command in dom0 of a Xen host; scripts/xen sets up what it needs.

Xen, and Debian with its tools as dom0, boot in QEMU without hardware virtualisation. dom0's disk
goes back to what it was; further disks are /dev/vdb and so on, and their images may outlive the
run: killing this process is a power cut.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import laboratory

SCRIPTS = Path(__file__).resolve().parent
QEMU = "qemu-system-x86_64"
PROCESSORS = 5  # of dom0 and four domains
PROGRAM, MACHINE = "scripts/xen", "Xen"
# Without these Xen or its guests do not get far under emulation.
CPU = "max,-smap,-rdtscp,-avx,-avx2"
# Eager: it seems that QEMU's XSAVE does not fault while CR0.TS is set, by which Xen notices on an
# AMD processor that a domain uses the registers of another one; programs crash then, now and then.
# Null: each virtual processor has one of the machine's to itself; with two PVH domains taking turns
# on one, one of them ended in a triple fault within minutes.
XEN = ("com1=115200,8n1 console=com1 dom0_mem={dom0},max:{dom0} dom0_max_vcpus=1 noreboot=1 "
       "spec-ctrl=eager-fpu sched=null")
DOM0 = "console=hvc0 root=/dev/ram0 rdinit=/init quiet mitigations=off nosoftlockup"


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = laboratory.parser(PROGRAM, __doc__, memory="3G", disk="/dev/vdb, /dev/vdc")
    parser.add_argument("--dom0-memory", default="1024M", help="dom0's part (default: 1024M)")
    parser.add_argument("--hypervisor", default="xen", choices=["xen", "xen-debian"],
                        help="with shadow page tables, or as Debian builds it, without them")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY",
                        help="where what the command leaves in $OUTPUT goes")
    return parser.parse_args(arguments)


def prepared(options: argparse.Namespace, place: Path) -> list[str]:
    """Fill the exchange folder and make the disks; returns QEMU's command line."""
    xen, wheel = (Path(os.environ[name]) for name in ("EPOCHS_XEN", "EPOCHS_XEN_WHEEL"))
    exchange = place / "exchange"
    (exchange / "output").mkdir(parents=True)
    laboratory.put_command(exchange, options.command)
    shutil.copy(SCRIPTS / "lib" / "xen-init", exchange)
    (built,) = wheel.glob("*.whl")
    shutil.copy(built, exchange)
    checkout = exchange / "checkout"
    for name in ("tests", "scripts", "docs"):
        shutil.copytree(SCRIPTS.parent / name, checkout / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SCRIPTS.parent / "setup.cfg", checkout)
    arguments = [
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", CPU, "-m", options.memory,
        "-smp", str(PROCESSORS),
        "-kernel", str(xen / options.hypervisor), "-append", XEN.format(dom0=options.dom0_memory),
        "-initrd", f"{xen / 'vmlinuz'} {DOM0},{xen / 'initrd'}",
        "-serial", f"file:{place / 'serial.log'}",
        "-fsdev", f"local,id=exchange,path={exchange},security_model=none",
        "-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange",
        "-device", "virtio-serial-pci",
    ]
    disks = [(xen / "root.img", ",snapshot=on")] + [
        (laboratory.image(text, place, number), "")
        for number, text in enumerate(options.disk, start=1)]
    for number, (disk, more) in enumerate(disks):
        arguments += ["-drive", f"file={disk},if=none,id=disk{number},format=raw,cache=unsafe,"
                                f"discard=unmap{more}",
                      "-device", f"virtio-blk-pci,drive=disk{number}"]
    return arguments


def run(options: argparse.Namespace, place: Path) -> int:
    arguments = prepared(options, place)
    output = [os.dup(1), os.dup(2)]
    for number, descriptor in enumerate(output, start=1):
        # Ports of a virtio console, written to what our own output is.
        arguments += ["-add-fd", f"fd={descriptor},set={number}",
                      "-chardev", f"file,id=port{number},path=/dev/fdset/{number},append=on",
                      "-device", f"virtserialport,chardev=port{number},name=output{number}"]
    log = place / "serial.log"
    log.touch()
    child = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *arguments], stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(), stderr=sys.stderr.fileno(), pass_fds=output,
        env={**os.environ, "TMPDIR": str(place)})
    for descriptor in output:
        os.close(descriptor)
    try:
        child.wait(options.timeout)
    except subprocess.TimeoutExpired:
        return laboratory.failed(PROGRAM, f"{MACHINE} did not end within {options.timeout:.0f} s",
                                 laboratory.TIMED_OUT, log)
    finally:
        child.kill()
        child.wait()
        if options.kernel_log:
            shutil.copy(log, options.kernel_log)
        if options.output:
            shutil.copytree(place / "exchange" / "output", options.output, dirs_exist_ok=True)
    return laboratory.outcome(PROGRAM, MACHINE, place / "exchange", log)


def main() -> int:
    options = parsed(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="epochs-xen-") as place:
        try:
            return run(options, Path(place))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
