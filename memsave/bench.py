"""How fast one core canonicalises captured pages: ``python -m memsave.bench``.

Prints one JSON object, in 10^9 bytes of captured pages a second, best of several runs:

``unchanged_or_zero_gb_s``  three of four pages equal to the base's, which are read from a pack,
                            one of four zero
``new_gb_s``                pages found to be new, hashed and written to a pack's file
``memcmp_gb_s``             as many bytes compared with equal ones by the C library: what the memory
                            lets through at that moment

Files are in /dev/shm where there is one, so that no disk is measured.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from memsave.buffers import Buffer
from memsave.capture import Copies
from memsave.image import Image
from memsave.layout import PAGE, Block, Layout
from memsave.native import Runs
from memsave.packs import PackStore
from memsave.tracking import Ranges
from memsave.writing import Classified, write_image

PAGES = 32768  # 128 MiB
ROUNDS = 5


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return PAGES * PAGE / min(seconds) / 1e9


def measure(directory: Path) -> dict[str, float]:
    """Run both measurements with packs in ``directory``."""
    layout = Layout((Block("ram", PAGES * PAGE),))
    buffer = Buffer(PAGES * PAGE)
    try:
        return _measure(directory, layout, buffer)
    finally:
        buffer.close()


def _measure(directory: Path, layout: Layout, buffer: Buffer) -> dict[str, float]:
    view = buffer.data_bytes()
    for at in range(0, len(view), PAGE * 64):
        view[at:at + PAGE * 48] = os.urandom(PAGE * 48)  # 16 of 64 pages stay zero
    ranges = Ranges()
    ranges.push(0, PAGES)
    copies = Copies().updated(ranges, buffer.data)
    with PackStore(directory) as packs:
        image = write_image(layout, copies.c, Image.zero(layout), None, packs, "base", None,
                            None).image
        table = image.table(packs)
        unchanged = _best(lambda: Classified(copies.c, image.runs, None, table, None))
        for at in range(0, len(view), PAGE * 64):
            view[at + PAGE * 48:at + PAGE * 64] = os.urandom(PAGE * 16)
        with tempfile.TemporaryFile(dir=directory) as file:
            empty = packs.table([])

            def store() -> None:
                Classified(copies.c, Runs(), None, empty, None).store(file.fileno(), flat=False)

            new = _best(store)
    here, there = bytes(view), bytes(view)
    memory = _best(lambda: here == there)
    return {"unchanged_or_zero_gb_s": round(unchanged, 2), "new_gb_s": round(new, 2),
            "memcmp_gb_s": round(memory, 2)}


def main() -> None:
    shared = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        print(json.dumps(measure(Path(directory))))


if __name__ == "__main__":
    main()
