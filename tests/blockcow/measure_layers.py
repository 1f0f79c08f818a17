"""Times of the disk backends: ``python tests/blockcow/measure_layers.py qcow2:DIR reflink:DIR``.

Each DIR gets a 2 GiB disk with 256 MiB of data; 1 MiB and 16 scattered pages are written before
each of 20 freezes in a running QEMU. Prints milliseconds (medians of repeated steps).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

from blockcow_qemu import MIB, Live

from blockcow import Freeze, Source, backend

T = TypeVar("T")
SIZE = 2048 * MIB


def timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = action()
    return (time.perf_counter() - start) * 1e3, result


def say(what: str, milliseconds: float) -> None:
    print(f"{what:12} {milliseconds:9.2f} ms")


def measure(kind: str, where: Path) -> None:
    directory, disk = where / "measure.layers", where / "measure.raw"
    directory.mkdir(mode=0o700)
    with disk.open("wb") as file:
        file.truncate(SIZE)
        for number in range(64):
            file.seek(number * 32 * MIB)
            file.write(os.urandom(4 * MIB))
    disks = backend(kind, directory)
    taken, base = timed(lambda: disks.adopt(Source(disk, "raw", SIZE), "base"))
    print(kind)
    say("adopt", taken)
    clones = [timed(lambda n=n: disks.clone([base], f"c{n}"))[0] for n in range(32)]  # type: ignore[misc]
    say("clone", statistics.median(clones))
    active = disks.clone([base], "a0")
    chain = [active, base] if kind == "qcow2" else [active]
    node, steps = "n0", []
    with Live(disks.blockdev(chain, node)) as live:
        for number in range(1, 21):
            live.write(node, number * 97 % 1900 * MIB, MIB, number)
            for page in range(16):
                live.write(node, (number * 97 + page * 13) % 2000 * MIB, 4096, number)
            part = Freeze("root", active, f"a{number}", node, f"n{number}")
            prepare, ticket = timed(lambda p=part, c=chain: disks.prepare_freeze(live, [(p, c)]))  # type: ignore[misc]
            freeze, _ = timed(ticket.freeze)
            seal, (done,) = timed(ticket.seal)
            steps.append((prepare, freeze, seal))
            active = done.active
            if kind == "qcow2":
                node, chain = f"n{number}", [active, done.frozen, *chain[1:]]
        for name, times in zip(
            ("prepare", "freeze", "seal"), zip(*steps, strict=True), strict=True
        ):
            say(name, statistics.median(times))
        if kind == "qcow2":
            taken, made = timed(lambda: disks.consolidate(chain[1:], 4))
            say("consolidate", taken)
            taken, merged = timed(lambda: disks.promote(made))
            say("promote", taken)
            rest = [merged, *chain[5:]]
            say("rebacking", timed(lambda: disks.rebacking(live, active, node, rest))[0])
            say("difference", timed(lambda: disks.difference(rest, rest[1:]))[0])
        else:
            say("difference", timed(lambda: disks.difference([done.frozen], [base]))[0])
    shutil.rmtree(directory)
    disk.unlink()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        measure(argument.split(":", 1)[0], Path(argument.split(":", 1)[1]))
