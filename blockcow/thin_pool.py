"""The kernel's thin pools: messages and status (Documentation/admin-guide/device-mapper/
thin-provisioning.rst). Whose pool it is, ours or LVM's, makes no difference here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .devmapper import SECTOR, DeviceMapper, Target
from .interface import BlockDamaged, BlockError
from .tools import run

METADATA_BLOCK = 4096  # bytes
MAX_NUMBER = (1 << 24) - 1  # of a thin device in its pool
METADATA_MAX = 15 * 2**30 + 880 * 2**20  # bytes: THIN_METADATA_MAX_SECTORS, rounded down

_STATUS = re.compile(r"(?P<transaction>\d+) (?P<metadata_used>\d+)/(?P<metadata_total>\d+) "
                     r"(?P<data_used>\d+)/(?P<data_total>\d+) (?P<held>\d+|-) "
                     r"(?P<mode>rw|ro|out_of_data_space) (?P<rest>.*)")


class PoolFailed(BlockError):
    """The kernel has given a pool up, or wants it checked."""


class MetadataDamaged(PoolFailed, BlockDamaged):
    """thin_check does not like a pool's metadata."""


@dataclass(frozen=True)
class PoolStatus:
    """``transaction``: the number of whoever keeps the list of devices. Metadata in blocks of
    4 KiB, data in blocks of the pool. ``held``: the block of a metadata snapshot, if there is one.
    """

    transaction: int
    metadata_used: int
    metadata_total: int
    data_used: int
    data_total: int
    held: int | None
    mode: str
    needs_check: bool


class ThinPool:
    """A live pool, by the name of its device; ``metadata`` is the node of its metadata device and
    ``block`` the sectors of a block."""

    def __init__(self, dm: DeviceMapper, name: str, metadata: Path, block: int) -> None:
        self._dm, self.name, self.metadata, self.block = dm, name, metadata, block

    # -- devices in the pool -------------------------------------------------------------------
    def create(self, number: int) -> None:
        """A new, empty device. DmExists if the number is taken."""
        self._dm.message(self.name, f"create_thin {number}")

    def snapshot(self, number: int, origin: int) -> None:
        """A device that is what ``origin`` is now; if that is live it must be suspended. Durable
        when this returns, as every message is. DmExists, DmMissing."""
        self._dm.message(self.name, f"create_snap {number} {origin}")

    def delete(self, number: int) -> None:
        """Remove a device, which must not be live. DmMissing if there is none."""
        self._dm.message(self.name, f"delete {number}")

    def set_transaction(self, old: int, new: int) -> None:
        """Move the transaction number on; DmError if it was not ``old``."""
        self._dm.message(self.name, f"set_transaction_id {old} {new}")

    def activate(self, name: str, uuid: str, number: int, sectors: int, *,
                 read_only: bool = False) -> Path:
        """Make device ``number`` live; returns its node. DmMissing if there is none."""
        return self._dm.create(name, uuid, [Target(
            0, sectors, "thin", f"/dev/mapper/{self.name} {number}")], read_only=read_only)

    # -- asking ---------------------------------------------------------------------------------
    def status(self) -> PoolStatus:
        """PoolFailed if the kernel has given the pool up."""
        (line,) = self._dm.status(self.name)
        return parse_status(self.name, line.params)

    @contextmanager
    def metadata_snapshot(self) -> Iterator[None]:
        """Hold a picture of the metadata that tools may read while the pool is live. There is one
        at a time: callers exclude each other. One that a killed process left is let go first."""
        if self.status().held is not None:
            self._dm.message(self.name, "release_metadata_snap")
        self._dm.message(self.name, "reserve_metadata_snap")
        try:
            yield
        finally:
            self._dm.message(self.name, "release_metadata_snap")

    def numbers(self) -> dict[int, int]:
        """Every device of the pool, with the blocks that are mapped in it. Within a metadata
        snapshot."""
        done = run(["thin_ls", "--metadata-snap", "--no-headers", "--format", "DEV,MAPPED_BLOCKS",
                    str(self.metadata)])
        return {int(number): int(blocks) for number, blocks in
                (line.split() for line in done.stdout.splitlines())}

    def changed(self, number: int, other: int) -> list[tuple[int, int]]:
        """Byte ranges (offset, length) that two devices do not share, ascending. Within a metadata
        snapshot."""
        done = run(["thin_delta", "--metadata-snap", "--snap1", str(number), "--snap2", str(other),
                    str(self.metadata)])
        return self._ranges(
            (one.get("begin"), one.get("length", "1")) for one in _document(done).iter()
            if one.tag in ("different", "left_only", "right_only"))

    def mapped(self, number: int) -> list[tuple[int, int]]:
        """Byte ranges of a device that are mapped; the rest reads as zero. Within a metadata
        snapshot."""
        done = run(["thin_dump", "--metadata-snap", "--dev-id", str(number), str(self.metadata)])
        return self._ranges(
            (one.get("origin_begin") or one.get("origin_block"), one.get("length", "1"))
            for one in _document(done).iter() if one.tag in ("range_mapping", "single_mapping"))

    def _ranges(self, blocks: Iterable[tuple[str | None, str]]) -> list[tuple[int, int]]:
        """Blocks (first, count) as the tools print them, in bytes; neighbours made one."""
        size = self.block * SECTOR
        found: list[tuple[int, int]] = []
        for start, length in sorted((int(first or 0) * size, int(count) * size)
                                    for first, count in blocks):
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((start, length))
        return found


def parse_status(name: str, text: str) -> PoolStatus:
    """The kernel's status line of a pool. PoolFailed."""
    found = _STATUS.match(text)
    if not found:
        raise PoolFailed(f"the pool {name} has failed in the kernel ({text}); 'dmesg' says why. "
                         "Stop its machines, and check it with 'thin_check'")
    held = found["held"]
    return PoolStatus(int(found["transaction"]), int(found["metadata_used"]),
                      int(found["metadata_total"]), int(found["data_used"]),
                      int(found["data_total"]), None if held == "-" else int(held), found["mode"],
                      "needs_check" in found["rest"])


def check_metadata(device: Path) -> None:
    """Read the metadata of a pool that is not live and see that it is whole; changes nothing.
    MetadataDamaged with the tool's words."""
    try:
        run(["thin_check", str(device)])
    except BlockError as error:
        raise MetadataDamaged(f"the pool's metadata is damaged: {error}. Nothing was changed; "
                         "'thin_repair' can write a repaired copy") from error


def _document(done: subprocess.CompletedProcess[str]) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(done.stdout)  # noqa: S314 - a tool's own output
    except ElementTree.ParseError as error:
        raise BlockError(f"{done.args[0]} printed something that is not XML") from error
