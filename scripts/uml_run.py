"""Runs a command in User-Mode Linux; scripts/uml sets up what it needs.

The kernel boots on the host's own root, read-only, so the command finds the checkout and the
virtual environment where they are. What it writes goes to a scratch disk, mounted at /mnt (its tmp
is $TMPDIR, and /tmp unless the checkout is there), or to further disks, /dev/ubdb and so on, whose
images may outlive the run: killing this process is a power cut.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import laboratory

SCRIPTS = Path(__file__).resolve().parent
KERNEL = "linux.uml"
INSTALLED = Path("/usr/lib/uml/modules")  # of Debian's package
PROGRAM, MACHINE = "scripts/uml", "User-Mode Linux"
HALTED, GRACE = b"reboot: System halted", 10.0  # what it says last; seconds to exit after it


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = laboratory.parser(PROGRAM, __doc__, memory="1500M", disk="/dev/ubdb, /dev/ubdc")
    parser.add_argument("--scratch", default="4G", metavar="SIZE|FILE",
                        help="disk at /mnt; a new one gets an ext4 file system (default: 4G)")
    parser.add_argument("--directory", type=Path, default=Path.cwd(),
                        help="where the command runs (default: here)")
    parser.add_argument("--installed", action="store_true",
                        help="the kernel that is installed instead of the newer one in $EPOCHS_UML")
    return parser.parse_args(arguments)


def kernel_of(options: argparse.Namespace) -> tuple[str, Path]:
    """The kernel's program and the folder of its modules."""
    newer = os.environ.get("EPOCHS_UML")
    if newer and not options.installed:
        return str(Path(newer) / KERNEL), Path(newer) / "modules"
    return KERNEL, INSTALLED


def prepared(options: argparse.Namespace, place: Path) -> list[str]:
    """Fill the exchange folder and make the disks; returns the kernel's command line."""
    exchange = place / "exchange"
    exchange.mkdir()
    laboratory.put_command(exchange, options.command)
    (exchange / "directory").write_text(str(options.directory.resolve()))
    needed = [str(options.directory.resolve()), sys.prefix, *(
        value for key, value in os.environ.items() if key.startswith("EPOCHS_"))]
    if any(text.startswith(("/tmp/", "/var/tmp/")) for text in needed):
        # What the command needs would be hidden by a /tmp of its own.
        (exchange / "keep-tmp").touch()
    scratch = laboratory.image(options.scratch, place, 0)
    if laboratory.size(options.scratch) is not None:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0", str(scratch)],
                       check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    disks = [scratch, *(laboratory.image(text, place, number)
                        for number, text in enumerate(options.disk, start=1))]
    kernel, modules = kernel_of(options)
    # seccomp: where the kernel has that way, and the host lets it.
    return [kernel, "seccomp=auto", f"modules={modules}",
            "rootfstype=hostfs", "rootflags=/", "ro", f"init={SCRIPTS}/lib/uml-init",
            f"exchange={exchange}", f"mem={options.memory}", f"uml_dir={place}/", "umid=uml",
            "hostname=uml", "quiet", "con=null",
            *(f"ubd{number}={disk}" for number, disk in enumerate(disks))]


def run(options: argparse.Namespace, place: Path, memory: Path) -> int:
    kernel = prepared(options, place)
    output = [os.dup(1), os.dup(2)]
    log = options.kernel_log or place / "kernel.log"
    messages, console = os.pipe()
    kernel += [f"con0=null,fd:{console}", f"con1=null,fd:{output[0]}", f"con2=null,fd:{output[1]}"]
    # A namespace of its own, so that no process of it outlives its first one, nor that one us.
    child = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork",
         "--kill-child", "--mount-proc", *kernel],
        stdin=subprocess.DEVNULL, stdout=console, stderr=console,
        pass_fds=(console, *output), env={**os.environ, "TMPDIR": str(memory)})
    for descriptor in (console, *output):
        os.close(descriptor)
    try:
        with os.fdopen(messages, "rb", buffering=0) as said, log.open("wb", buffering=0) as kept:
            if not ended(said, kept, options.timeout):
                return laboratory.failed(
                    PROGRAM, f"{MACHINE} did not end within {options.timeout:.0f} s",
                    laboratory.TIMED_OUT, log)
    finally:
        child.kill()
        child.wait()
    return laboratory.outcome(PROGRAM, MACHINE, place / "exchange", log)


def ended(said: io.FileIO, kept: io.FileIO, timeout: float) -> bool:
    """Copy what the kernel says to its log until it has ended, which must be within ``timeout``
    seconds. One that says it has halted has ended even if its process now waits for ever for
    another one of it, which some of them do."""
    deadline, tail = time.monotonic() + timeout, b""
    halted = False
    while select.select([said], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = said.read(65536)
        if not part:
            return True
        kept.write(part)
        tail = (tail + part)[-4096:]
        if not halted and HALTED in tail:
            halted, deadline = True, min(deadline, time.monotonic() + GRACE)
    return halted


def main() -> int:
    options = parsed(sys.argv[1:])
    if shutil.which(kernel := kernel_of(options)[0]) is None:
        print(f"{PROGRAM}: {kernel} is not installed (Debian: user-mode-linux)", file=sys.stderr)
        return laboratory.STALLED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (tempfile.TemporaryDirectory(prefix="epochs-uml-") as place,
          # The machine's memory is a file without a name, which must not be written back to a disk.
          tempfile.TemporaryDirectory(
              prefix="epochs-uml-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
          ) as memory):
        try:
            return run(options, Path(place), Path(memory))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
