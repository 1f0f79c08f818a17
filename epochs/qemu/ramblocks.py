"""Where every writable RAM block of a QEMU lives in its process.

``info ramblock`` lists the blocks. Newer versions print each one's host address and whether it is
writable (since 8.1 or so); 7.2 prints neither, so addresses are found from the mappings: QEMU
maps each block on its own and puts an inaccessible guard page behind it (util/mmap-alloc.c), so a
block of N bytes is a private writable mapping of exactly N bytes followed by a guard. The block
that has a file behind it is found by that; the others by the guest-physical mapping
(``info mtree -f``, ``gpa2hva``), and what that does not show by its size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from epochs.errors import Failed
from epochs.qemu.monitor import Monitor

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PAGE = 4096
GUARD = 4096


@dataclass(frozen=True)
class RamBlock:
    """One writable block: bytes and its address in QEMU's process.

    A resizable block (ACPI tables) counts with the size that it can grow to, which is also what is
    mapped, so that a machine's memory layout never changes while it lives."""

    name: str
    size: int
    address: int


@dataclass(frozen=True)
class _Listed:
    name: str
    used: int
    total: int
    address: int | None
    writable: bool | None


_LINE = re.compile(
    r"^\s*(?P<name>\S+)\s+(?P<psize>\d+ (?:[KMG]i)?B)\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+"
    r"0x(?P<total>[0-9a-f]+)(?:\s+0x(?P<hva>[0-9a-f]+)\s+(?P<mode>rw|ro))?\s*$")


def parse_listing(text: str) -> list[_Listed]:
    """Parse ``info ramblock``; Failed if a line makes no sense (never skipped silently)."""
    found = []
    for line in text.splitlines()[1:]:
        if not line.strip():
            continue
        match = _LINE.match(line)
        if not match:
            raise Failed(f"QEMU's list of RAM blocks has a line Epochs cannot read: {line.strip()}")
        found.append(_Listed(match["name"], int(match["used"], 16), int(match["total"], 16),
                             int(match["hva"], 16) if match["hva"] else None,
                             match["mode"] == "rw" if match["mode"] else None))
    if not found:
        raise Failed("QEMU lists no RAM blocks")
    return found


def locate(monitor: Monitor, pid: int, main: str) -> list[RamBlock]:
    """All writable RAM blocks, the block ``main`` first, the others by name."""
    listed = parse_listing(monitor.human("info ramblock"))
    if all(block.address is not None for block in listed):
        blocks = [RamBlock(b.name, _whole_total(b), b.address or 0)
                  for b in listed if b.writable]
    else:
        blocks = _from_mappings(monitor, pid, listed, main)
    blocks.sort(key=lambda block: (block.name != main, block.name))
    if blocks[0].name != main:
        raise Failed(f"QEMU has no writable RAM block '{main}'")
    return blocks


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    mode: str
    path: str


def _mappings(pid: int) -> list[_Mapping]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        found.append(_Mapping(start, end, fields[1], fields[5] if len(fields) > 5 else ""))
    return found


def _from_mappings(monitor: Monitor, pid: int, listed: list[_Listed],
                   main: str) -> list[RamBlock]:
    maps = _mappings(pid)
    guarded = [m for m, after in pairwise(maps)
               if m.mode == "rw-p" and after.start == m.end and after.mode == "---p"
               and after.end - after.start >= GUARD]
    with_file = [m for m in guarded if m.path]
    taken: dict[str, int] = {}
    if len(with_file) == 1:
        taken = {b.name: with_file[0].start for b in listed
                 if b.name == main and _whole_total(b) == with_file[0].end - with_file[0].start}
    taken |= _guest_mapped(monitor, {block.name for block in listed} - taken.keys())
    for size in {_whole_total(block) for block in listed if block.name not in taken}:
        wanted = [b for b in listed if b.name not in taken and _whole_total(b) == size]
        free = [m for m in guarded if m.end - m.start == size and m.start not in taken.values()]
        taken.update(_assign(pid, wanted, free, main))
    return [RamBlock(b.name, _whole_total(b), taken[b.name]) for b in listed
            if not _OPTION_ROM.match(b.name)]


# A PCI expansion ROM: never written after it was loaded, so it needs no saving; its first two bytes
# are the signature of the PCI Firmware Specification.
_OPTION_ROM = re.compile(r"^[0-9a-f:.]+/.*\.rom$")
_ROM_SIGNATURE = b"\x55\xaa"


def _whole_total(block: _Listed) -> int:
    return -(-block.total // PAGE) * PAGE


def _assign(pid: int, wanted: list[_Listed], free: list[_Mapping],
            main: str) -> dict[str, int]:
    """Match blocks of one size with mappings of that size; Failed if that is a guess."""
    taken: dict[str, int] = {}
    kinds: list[tuple[list[_Listed], list[_Mapping]]] = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        def is_rom(mapping: _Mapping) -> bool:
            memory.seek(mapping.start)
            return memory.read(len(_ROM_SIGNATURE)) == _ROM_SIGNATURE

        for backed in (True, False):  # only the main block has a file behind it
            blocks = [b for b in wanted if (b.name == main) == backed]
            mappings = [m for m in free if bool(m.path) == backed]
            if len(blocks) == len(mappings) == 1:
                kinds.append((blocks, mappings))
                continue
            for rom in (True, False):
                kinds.append(([b for b in blocks if bool(_OPTION_ROM.match(b.name)) == rom],
                              [m for m in mappings if is_rom(m) == rom]))
    for blocks, mappings in kinds:
        if not blocks or all(_OPTION_ROM.match(b.name) for b in blocks):
            taken.update({b.name: 0 for b in blocks})  # left out by the caller
        elif len(blocks) == len(mappings) == 1:
            taken[blocks[0].name] = mappings[0].start
        else:
            raise Failed(f"RAM block '{blocks[0].name}' of QEMU cannot be found in its process "
                         f"({len(mappings)} mappings for {len(blocks)} blocks of its size); use "
                         "QEMU 8.1 or later, which says where its blocks are")
    return taken


_FLAT = re.compile(r"^\s+(?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, "
                   r"(?P<kind>ram|rom|romd)\): (?P<name>\S+)(?: @(?P<offset>[0-9a-f]{16}))?"
                   r"(?P<rest>.*)$")


def _guest_mapped(monitor: Monitor, names: set[str]) -> dict[str, int]:
    """Host addresses of the blocks that guest-physical memory shows, by block name.

    Memory regions and RAM blocks have the same name except that devices prefix the block's with
    their path ("0000:00:02.0/vga.vram"), so region names are matched against the last part, and
    used only where that is unambiguous."""
    starts: dict[str, tuple[str, int]] = {}  # of a region: its block, its offset in that
    for line in monitor.human("info mtree -f").splitlines():
        match = _FLAT.match(line)
        if not match or match["rest"].strip().startswith("KVM"):
            continue
        blocks = [name for name in names
                  if name == match["name"] or name.rsplit("/", 1)[-1] == match["name"]]
        if len(blocks) == 1:  # the same regions come once for each address space
            starts[match["start"]] = (blocks[0], int(match["offset"] or "0", 16))
    found: dict[str, set[int]] = {}
    answers = monitor.humans([f"gpa2hva 0x{start}" for start in starts])
    for (block, offset), text in zip(starts.values(), answers, strict=True):
        if answer := re.search(r"is 0x([0-9a-f]+)", text):
            found.setdefault(block, set()).add(int(answer[1], 16) - offset)
    return {name: addresses.pop() for name, addresses in found.items() if len(addresses) == 1}
