"""What an epoch of a running domain costs, measured in dom0 of the Xen laboratory beside
`xl save -c` of the same domain. Run by `scripts/bench --xen`. Prints a table; fails if a bar is
missed.

The pause is measured twice: from dom0, and from inside the guest by a program that looks at the
clock all the time (tests/guests/gap.c) while it writes 1 MiB a second.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epochs import Machine, MachineSpec, Store
from epochs.spec import XEN, DiskSpec
from tests.xen.lab.domu import DOMU, DomU, config, xl

POOL = "/dev/vdb"
RATE = 1024  # KiB that the guest writes a second
SHORTER, ALIKE, SHARE = 10.0, 1.3, 0.05  # the bars


@dataclass(frozen=True)
class Measured:
    """Medians, in milliseconds: pauses of `create` and of `xl save -c`; share of what a second
    epoch of an idle domain stores."""

    create: float
    create_inside: float
    save: float
    save_inside: float
    share: float


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def inside(guest: DomU, seconds: int, during: Callable[[], None]) -> float:
    """Milliseconds of the longest gap that the guest sees while ``during`` is called."""
    since = len(guest.said())
    guest.run(f"(gap {seconds} {RATE} >/dev/hvc0) & true")
    time.sleep(2)  # it calibrates its clock
    during()
    guest.wait("GAP ", since=since)
    guest.run("true")
    found = re.findall(rb"GAP ([\d.]+)", guest.said()[since:])
    return float(found[-1])


def measure(store: Store, kind: str, memory: int, samples: int, place: Path) -> Measured:
    """One machine of ``memory`` MiB, made and removed."""
    file = config("web", kind, place, memory=memory, disks=[("xvda", str(DOMU / "a.img"))])
    web = store.add("web", MachineSpec(
        memory=0, hypervisor=XEN, config=file.read_text(),
        disks=(DiskSpec("xvda", str(DOMU / "a.img"), None, "dmthin"),)))
    guest = DomU("web")
    since = len(guest.said())  # its console's log outlives the machine before it
    web.start()
    try:
        guest.wait("DOMU READY", since=since)
        return measured(web, guest, samples, place)
    finally:
        web.remove(with_epochs=True, force=True)


def measured(web: Machine, guest: DomU, samples: int, place: Path) -> Measured:
    pauses: list[float] = []
    saves: list[float] = []
    seen: dict[str, list[float]] = {"create": [], "save": []}

    def create() -> None:
        made = web.create()
        pauses.append(made.stats["pause_seconds"] * 1e3)
        print(f"    create: {made.stats}", file=sys.stderr, flush=True)

    def save() -> None:
        target = place / "web.save"
        began = time.perf_counter()
        xl("save", "-c", "web", str(target))
        saves.append((time.perf_counter() - began) * 1e3)
        target.unlink()

    first = web.create().stats["pack_bytes"]
    took = web.create().stats["total_seconds"]
    for _ in range(samples):
        seen["create"].append(inside(guest, int(took * 1.5) + 6, create))
        seen["save"].append(inside(guest, int(took * 1.5) + 6, save))
    guest.ctl("pause")
    web.create()
    idle = web.create().stats
    share = (idle["pack_bytes"] + idle["map_bytes"] + idle["state_bytes"]) / first
    return Measured(statistics.median(pauses), statistics.median(seen["create"]),
                    statistics.median(saves), statistics.median(seen["save"]), share)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--kind", choices=["pv", "pvh"], default="pvh")
    options = parser.parse_args()
    samples = 2 if options.quick else 5
    found: dict[int, Measured] = {}
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch) / "store") as store:
        store.create_pool("bench", Path(POOL))
        try:
            for memory in (256, 512):
                found[memory] = measure(store, options.kind, memory, samples, Path(scratch))
        finally:
            store.remove_pool("bench")
    print(f"{options.kind} domain that writes {RATE // 1024} MiB/s, medians of {samples}, ms"
          f"{'':>14}256 MiB   512 MiB")
    for name, key in (("pause of create, from dom0", "create"),
                      ("pause of create, from inside the guest", "create_inside"),
                      ("xl save -c, from dom0 (whole)", "save"),
                      ("pause of xl save -c, from inside", "save_inside")):
        print(f"{name:<58}{getattr(found[256], key):10.1f}{getattr(found[512], key):10.1f}")
    ratio = found[512].save_inside / found[512].create_inside
    alike = found[512].create_inside / found[256].create_inside
    share = found[512].share
    missed = []
    for name, value, good, bar in (
            ("xl save -c, as a multiple of create, from inside, 512 MiB", ratio, ratio >= SHORTER,
             f"at least x{SHORTER:.0f}"),
            ("pause at 512 MiB, as a multiple of that at 256 MiB", alike, alike <= ALIKE,
             f"at most x{ALIKE}"),
            ("a second epoch of an idle domain, as a share of the first", share, share < SHARE,
             f"less than {SHARE}")):
        print(f"{name:<58}{value:10.3f}   bar {bar}   {'met' if good else 'MISSED'}")
        if not good:
            missed.append(name)
    print("every bar is met" if not missed else "missed: " + "; ".join(missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
