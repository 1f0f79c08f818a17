"""Checks a memory image by its specification: ``python -m memsave.verifier MAP PACKDIR``.

Written from docs/memory-image.md alone, in plain Python with the ``xxhash`` package; it shares no
code with what writes and reads images otherwise (running this file by its path does not even
import the package). Exit status: 0 the image is whole; 2 usage; 6 it is not, and why is on
standard error.
"""

from __future__ import annotations

import bisect
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

PAGE = 4096
ZERO_PAGE = bytes(PAGE)


class NotWhole(Exception):
    """What is wrong, with the name of the file."""


class Octets:
    """The body of a file whose prefix and checksum were right."""

    def __init__(self, path: Path, magic: bytes) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                data = file.read(2**32 + 1)
        except OSError as error:
            raise NotWhole(f"{path}: {error.strerror}") from error
        self.require(len(data) <= 2**32, "is longer than 4 GiB")
        self.require(len(data) >= 48, "is shorter than a prefix and a checksum")
        self.require(data[:8] == magic, f"does not begin with {magic!r}")
        self.require(struct.unpack("<Q", data[-8:])[0] == xxhash.xxh3_64_intdigest(data[:-8]),
                     "has a wrong checksum")
        version, page, incompatible, _, length = struct.unpack("<IIQQQ", data[8:40])
        self.require(version == 1, f"has unknown version {version}")
        self.require(incompatible == 0, f"has unknown incompatible features {incompatible:#x}")
        self.require(page == PAGE, f"has a page size of {page}")
        self.require(length == len(data), f"says {length} bytes and has {len(data)}")
        self.rest = data[40:-8]

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise NotWhole(f"{self.path}: {otherwise}")

    def take(self, count: int) -> bytes:
        self.require(count <= len(self.rest), f"ends {count - len(self.rest)} bytes too early")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self, length: int) -> bytes:
        padded = self.take((length + 7) // 8 * 8)
        self.require(not any(padded[length:]), "has padding that is not zero")
        return padded[:length]


@dataclass
class Pack:
    """An index that was right, and the file of its pages."""

    path: Path
    slots: int
    flat: bool
    starts: list[int]
    spans: list[tuple[int, int, int]]  # first slot, count, number of the first checksum
    sums: bytes

    def sum_of(self, slot: int) -> int:
        at = bisect.bisect_right(self.starts, slot) - 1
        if at >= 0:
            first, count, number = self.spans[at]
            if slot < first + count:
                found: int = struct.unpack_from("<Q", self.sums, (number + slot - first) * 8)[0]
                return found
        raise NotWhole(f"{self.path}: slot {slot} is referred to, but not in use")


def read_index(directory: Path, name: str) -> Pack:
    octets = Octets(directory / f"{name}.idx", b"EPOCHIDX")
    slots, used, span_count, kind, id_length = octets.numbers("<QQQII")
    octets.require(kind in (0, 1), f"has unknown kind {kind}")
    octets.require(used <= slots <= 2**36, f"has {used} of {slots} slots in use")
    octets.require(octets.text(id_length) == name.encode(), "has the id of another pack")
    octets.require(span_count * 16 + used * 8 == len(octets.rest),
                   f"cannot hold {span_count} spans and {used} checksums in what follows")
    spans, end, number = [], -1, 0
    for _ in range(span_count):
        first, count = octets.numbers("<QQ")
        octets.require(count > 0, "has an empty span")
        octets.require(first > end, "has spans that overlap, touch or are out of order")
        octets.require(first + count <= slots, "has a span outside the pack")
        spans.append((first, count, number))
        end, number = first + count, number + count
    octets.require(number == used, f"has spans of {number} slots and {used} checksums")
    path = directory / f"{name}.pack"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise NotWhole(f"{path}: {error.strerror}") from error
    if size != slots * PAGE:
        raise NotWhole(f"{path}: has {size} bytes, not {slots * PAGE}")
    return Pack(path, slots, kind == 1, [span[0] for span in spans], spans, octets.rest)


@dataclass
class Map:
    """A page map that was right."""

    pages: int
    main: int  # pages of block 0
    names: list[str]
    flat: int | None
    runs: list[tuple[int, int, int, int]]  # page, slot, count, pack


def read_map(path: Path) -> Map:
    octets = Octets(path, b"EPOCHMAP")
    block_count, pack_count, flat, zero, run_count = octets.numbers("<IIIIQ")
    octets.require(zero == 0, "has a reserved field that is not zero")
    octets.require(1 <= block_count <= 1024, f"has {block_count} blocks")
    sizes, block_names = [], set()
    for _ in range(block_count):
        size, length, *zeros = octets.numbers("<QHHI")
        octets.require(not any(zeros), "has a reserved field that is not zero")
        octets.require(size > 0 and size % PAGE == 0, f"has a block of {size} bytes")
        octets.require(1 <= length <= 255, f"has a block's name of {length} bytes")
        name = octets.text(length)
        try:
            name.decode()
        except UnicodeDecodeError:
            octets.require(False, f"has a block's name that is not UTF-8: {name!r}")
        octets.require(name not in block_names, f"has two blocks {name!r}")
        block_names.add(name)
        sizes.append(size // PAGE)
    octets.require(sum(sizes) <= 2**36, "has more than 2^36 pages")
    names: list[str] = []
    for _ in range(pack_count):
        length, zero = octets.numbers("<II")
        found = octets.text(length)
        octets.require(zero == 0 and re.fullmatch(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found)
                       is not None, f"has an impossible pack id {found!r}")
        names.append(found.decode())
    octets.require(names == sorted(set(names)), "has a pack table that is not in order")
    octets.require(flat == 2**32 - 1 or flat < pack_count, f"has no pack number {flat}")
    octets.require(run_count * 24 == len(octets.rest), f"cannot hold {run_count} runs")
    main = Map(sum(sizes), sizes[0], names, None if flat == 2**32 - 1 else flat, [])
    main.runs = list(_runs(octets, main, run_count))
    used = {run[3] for run in main.runs} | ({main.flat} if main.flat is not None else set())
    octets.require(used == set(range(pack_count)), "lists packs that it does not use")
    return main


def _runs(octets: Octets, image: Map, count: int) -> Iterator[tuple[int, int, int, int]]:
    end, before = 0, (0, 0, 0, -1)
    for _ in range(count):
        page, slot, length, pack = octets.numbers("<QQII")
        octets.require(length > 0, "has an empty run")
        octets.require(page >= end, "has runs that overlap or are out of order")
        octets.require(page + length <= image.pages, "has a run outside the layout")
        octets.require(pack < len(image.names), f"has a run in pack {pack}, which it has not")
        octets.require(not (before[3] == pack and before[0] + before[2] == page
                            and before[1] + before[2] == slot and before[2] + length < 2**32),
                       "has two runs that should be one")
        end = page + length
        before = (page, slot, length, pack)
        yield before


def verify(page_map: Path, directory: Path) -> int:
    """Check everything; returns the pages that were read. Raises NotWhole."""
    image = read_map(page_map)
    packs = [read_index(directory, name) for name in image.names]
    if image.flat is not None:
        flat = packs[image.flat]
        if not flat.flat or flat.slots < image.main:
            raise NotWhole(f"{flat.path}: cannot be mapped as a flat pack")
    pages = 0
    for page, slot, length, number in image.runs:
        pack = packs[number]
        pack.sum_of(slot)  # before seeking: a slot in use is one that the file has
        with pack.path.open("rb") as file:
            file.seek(slot * PAGE)
            for at in range(length):
                wanted = pack.sum_of(slot + at)
                data = file.read(PAGE)
                if len(data) != PAGE or xxhash.xxh3_64_intdigest(data) != wanted:
                    raise NotWhole(f"{pack.path}: slot {slot + at} (page {page + at}) has a wrong "
                                   "checksum")
                if data == ZERO_PAGE:
                    raise NotWhole(f"{pack.path}: slot {slot + at} holds a zero page")
                pages += 1
    return pages


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 2:
        print("usage: python -m memsave.verifier MAP PACKDIR", file=sys.stderr)
        return 2
    try:
        pages = verify(Path(arguments[0]), Path(arguments[1]))
    except NotWhole as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 6
    print(f"whole: {pages} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
