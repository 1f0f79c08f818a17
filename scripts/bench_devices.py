"""What freezing disks on devices costs, measured in User-Mode Linux beside LVM's own snapshots, and
what 500 epochs in a pool cost. Run by `scripts/bench --devices`. Prints tables; fails if a bar is
missed or the pool holds anything else than what the catalog accounts for.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockcow.dmthin import number_of
from epochs import DiskSpec, Machine, MachineSpec, Store

POOL, GROUP = "/dev/ubdb", "/dev/ubdc"
DISKS = "abc"
MIB = 2**20
BAR = 10.0  # milliseconds that three disks may take in the pause
GROWTH = 1.3


def lvm(*arguments: str) -> None:
    subprocess.run(["lvm", *arguments], check=True, capture_output=True)


def volume(name: str, image: Path, *, thin: bool) -> str:
    size = f"{image.stat().st_size}b"
    kind = ["--virtualsize", size, "--thinpool", "vg/pool"] if thin else ["--size", size, "vg"]
    lvm("lvcreate", "--quiet", "--yes", "--name", name, *kind)
    subprocess.run(["dd", f"if={image}", f"of=/dev/vg/{name}", "bs=1M",
                    "conv=fsync,sparse" if thin else "conv=fsync",
                    "oflag=direct", "status=none"], check=True)
    return f"/dev/vg/{name}"


def images(guest: Path, place: Path) -> dict[str, Path]:
    """The tiny guest's two disks and a third one."""
    third = place / "c.img"
    with third.open("wb") as file:
        file.truncate(64 * MIB)
    return {"a": guest / "a.img", "b": guest / "b.img", "c": third}


@contextmanager
def machine(store: Store, guest: Path, backend: str, disks: dict[str, str]) -> Iterator[Machine]:
    """A guest whose witness writes to two of its three disks all the time."""
    made = store.add("web", MachineSpec(
        memory=128 * MIB, accel="tcg", net="none",
        disks=tuple(DiskSpec(name, file, "raw", backend) for name, file in disks.items()),
        kernel=str(guest / "vmlinuz"), initrd=str(guest / "initrd"),
        append=(guest / "append").read_text().strip()))
    try:
        made.start()
        made.wait_agent(180)
        yield made
    finally:
        made.remove(force=True, with_epochs=True)


def freezes(web: Machine, count: int) -> list[float]:
    """Milliseconds that freezing all disks took in the pause, of that many creates."""
    return [web.create().stats["pause_steps"]["freeze_disks"] * 1e3 for _ in range(count)]


def line(name: str, values: list[float], note: str = "") -> None:
    print(f"{name:<54} {statistics.median(values):9.2f} ms   worst {max(values):9.2f}   {note}",
          flush=True)


def compare(guest: Path, place: Path, count: int) -> list[str]:
    """Freezes on every backend beside LVM's own snapshots of the same three volumes."""
    missed = []
    given = images(guest, place)
    with Store(place / "store") as store:
        store.create_pool("fast", POOL, force=True)
        lvm("vgcreate", "--quiet", "--yes", "vg", GROUP)
        lvm("lvcreate", "--quiet", "--size", "700M", "--thinpool", "vg/pool")
        for backend in ("dmthin", "lvm-thin", "lvm-thick", "dmsnap"):
            on_lvm = backend.startswith("lvm")
            disks = {name: volume(f"{backend[4:]}{name}", image, thin=backend == "lvm-thin")
                     if on_lvm else str(image) for name, image in given.items()}
            with machine(store, guest, backend, disks) as web:
                values = freezes(web, count if backend != "lvm-thick" else min(count, 5))
            line(f"{backend}: three disks frozen in the pause", values,
                 f"of {len(values)}, bar {BAR:g}")
            if statistics.median(values) > BAR:
                missed.append(backend)
        for kind, options in (("thin", []), ("thick", ["--size", "16M"])):
            took = []
            for number in range(5):
                began = time.perf_counter()
                for name in DISKS:
                    lvm("lvcreate", "--quiet", "--snapshot", *options, "--name",
                        f"s{number}{name}", f"vg/{kind}{name}")
                took.append((time.perf_counter() - began) * 1e3)
                for name in DISKS:
                    lvm("lvremove", "--quiet", "--yes", f"vg/s{number}{name}")
            line(f"lvcreate --snapshot of three {kind} volumes", took, "of 5")
        store.remove_pool("fast")
    lvm("vgremove", "--quiet", "--yes", "vg")
    return missed


@contextmanager
def still(store: Store, place: Path, pool: str) -> Iterator[Machine]:
    """A machine with three disks in a pool of its own that stands still: without a kernel the
    firmware spins, and takes more or less of the one CPU there is."""
    store.create_pool("fast", pool, force=True)
    disks = tuple(DiskSpec(name, str(place / f"disk{name}.img"), "raw", "dmthin") for name in DISKS)
    booted = store.add("boot", MachineSpec(memory=16 * MIB, accel="tcg", net="none", disks=disks))
    booted.start()
    first = booted.create()
    made = store.fork(first, "bare", paused=True)
    booted.remove(force=True)
    yield made
    made.remove(force=True, with_epochs=True)
    store.delete(store.epochs())
    store.remove_pool("fast")


def many(place: Path, count: int) -> list[str]:
    """So many epochs in a pool, half of them deleted at random on the way. What a create costs
    then is compared with one of a young store, in turns: this machine's speed changes by a factor
    of two within minutes."""
    rng = random.Random(20261125)
    missed = []
    for name in DISKS:
        (place / f"disk{name}.img").write_bytes(rng.randbytes(4 * MIB))
    with Store(place / "many") as store, Store(place / "young") as other, \
            still(store, place, POOL) as bare:
        for _ in range(count):
            bare.create()
        with still(other, place, GROUP) as young:
            figures: dict[str, list[dict[str, float]]] = {"young": [], "old": []}
            for _ in range(20):
                for name, one in (("young", young), ("old", bare)):
                    stats = one.create().stats
                    figures[name].append({
                        "create, whole": stats["total_seconds"] * 1e3,
                        "its disks frozen": stats["pause_steps"]["freeze_disks"] * 1e3})
        for what in figures["old"][0]:
            first, last = (statistics.median(one[what] for one in figures[name])
                           for name in ("young", "old"))
            print(f"{what:<20} the first 20 {first:8.2f} ms, behind {count} epochs {last:8.2f} ms, "
                  f"x{last / first:.2f}, bar {GROWTH}", flush=True)
            if last > first * GROWTH:
                missed.append(what)
        store.delete(rng.sample([epoch.id for epoch in store.epochs()], count // 2))
        bare.stop(kill=True)
        missed += accounts(store)
    return missed


def accounts(store: Store) -> list[str]:
    """Whether the pool holds what the catalog names and nothing else, and its metadata is whole."""
    (pool,) = store.files.catalog.pools()
    layers = store.files.catalog.layers_in_pool(pool.id)
    thin = store.files.thin()
    with thin.live(pool.id) as live, live.metadata_snapshot():
        numbers = live.numbers()
        dump = subprocess.run(["thin_dump", "--metadata-snap", str(live.metadata)],
                              capture_output=True, text=True, check=True).stdout
        used = live.status().data_used
    wrong = []
    if set(numbers) != {number_of(layer) for layer in layers}:
        wrong.append("the pool has other devices than the catalog has layers")
    from xml.etree import ElementTree

    blocks: set[int] = set()
    for one in ElementTree.fromstring(dump).iter():
        if one.tag == "range_mapping":
            begin = int(one.get("data_begin", "0"))
            blocks.update(range(begin, begin + int(one.get("length", "0"))))
        elif one.tag == "single_mapping":
            blocks.add(int(one.get("data_block", "0")))
    if len(blocks) != used:
        wrong.append(f"the pool uses {used} blocks, its layers {len(blocks)}")
    store.files.rest()
    held = thin.device_of(pool.id)
    with held.locked(), tempfile.NamedTemporaryFile() as copy:
        (segment,) = held.label().metadata
        subprocess.run(["dd", f"if={pool.path}", f"of={copy.name}", "bs=512", "status=none",
                        f"skip={segment.start}", f"count={segment.length}"], check=True)
        if subprocess.run(["thin_check", copy.name], capture_output=True, check=False).returncode:
            wrong.append("thin_check finds errors")
    print(f"{len(layers)} layers, {used} blocks mapped, as the catalog accounts for: "
          + ("yes" if not wrong else "; ".join(wrong)))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["freezes", "epochs"])
    options = parser.parse_args()
    guest = Path(os.environ["EPOCHS_TINY"])
    with tempfile.TemporaryDirectory() as place:
        missed = []
        if options.only != "epochs":
            missed += compare(guest, Path(place), 5 if options.quick else 20)
        if options.only != "freezes":
            missed += many(Path(place), 60 if options.quick else 500)
    print("every bar is met" if not missed else f"MISSED: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
