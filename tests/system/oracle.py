"""The strongest check of a capture: all RAM read in the pause by another way, compared later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memsave
from epochs import Epoch, Machine, Store
from epochs.qemu import seal
from epochs.qemu.command import RAM_BLOCK
from epochs.qemu.connection import open_monitor
from epochs.qemu.ramblocks import RamBlock, locate


@contextmanager
def memory_of_the_pause(store: Store, machine: Machine,
                        monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Read /proc/PID/mem at the end of every pause of a create within the block; the list gets one
    string of all RAM blocks for each."""
    found: list[bytes] = []
    record = store.files.catalog.instance_of(machine.record.id)
    assert record is not None
    with open_monitor(store.files, record) as monitor:
        blocks = locate(monitor, record.process.pid, RAM_BLOCK)
    original = seal._settle

    def settle(work: seal.QemuWork, capture: memsave.Capture) -> None:
        original(work, capture)
        found.append(read_memory(record.process.pid, blocks))

    with monkeypatch.context() as patch:
        patch.setattr(seal, "_settle", settle)
        yield found


def read_memory(pid: int, blocks: list[RamBlock]) -> bytes:
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for block in blocks:
            memory.seek(block.address)
            left = block.size
            while left:
                parts.append(memory.read(min(left, 2**24)))
                left -= len(parts[-1])
    return b"".join(parts)


def image_of(store: Store, epoch: Epoch) -> bytes:
    """An epoch's memory, read from its map and packs as any other program would."""
    image = memsave.Image.load(store.files.map_file(epoch.id))
    memory = bytearray(image.layout.size)
    page = memsave.PAGE
    for at, slot, count, pack in image.runs:
        with (store.files.packs_dir / f"{image.pack_ids[pack]}.pack").open("rb") as file:
            file.seek(slot * page)
            memory[at * page:(at + count) * page] = file.read(count * page)
    return bytes(memory)


def assert_same_memory(found: bytes, expected: bytes, what: str,
                       page: int = memsave.PAGE) -> None:
    """Not a bare ``==`` in an assert, which would explain itself for minutes."""
    assert len(found) == len(expected), what
    if found != expected:
        unlike = [at // page for at in range(0, len(found), page)
                  if found[at:at + page] != expected[at:at + page]]
        raise AssertionError(f"{what}: {len(unlike)} pages differ, first {unlike[:8]}")


