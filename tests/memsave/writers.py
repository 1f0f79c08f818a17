"""Small writers of page maps and pack indexes, from docs/memory-image.md: a malformed file is one
argument away. They share no code with memsave."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

PAGE = 4096


def page(seed: int) -> bytes:
    """A page that is not zero."""
    return struct.pack("<Q", seed + 1) * (PAGE // 8)


def sums(*pages: bytes) -> list[int]:
    return [xxhash.xxh3_64_intdigest(one) for one in pages]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


@dataclass
class File:
    """Prefix and checksum, which both files have; None means the right value."""

    magic: bytes = b""
    version: int = 1
    page_size: int = PAGE
    incompatible: int = 0
    compatible: int = 0
    length: int | None = None
    checksum: int | None = None
    extra: bytes = b""
    cut: int = 0
    replaced: bytes | None = None  # the whole body

    def body(self) -> bytes:
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        body = (self.body() if self.replaced is None else self.replaced) + self.extra
        body = body[:len(body) - self.cut]
        length = 40 + len(body) + 8 if self.length is None else self.length
        data = struct.pack("<8sIIQQQ", self.magic, self.version, self.page_size,
                           self.incompatible, self.compatible, length) + body
        checksum = xxhash.xxh3_64_intdigest(data) if self.checksum is None else self.checksum
        return data + struct.pack("<Q", checksum)


@dataclass
class MapFile(File):
    magic: bytes = b"EPOCHMAP"
    blocks: Sequence[tuple[bytes, int]] = ((b"ram", 8 * PAGE),)
    packs: Sequence[bytes] = (b"one",)
    flat: int = 2**32 - 1
    reserved: int = 0
    runs: Sequence[tuple[int, int, int, int]] = ((0, 0, 2, 0),)  # page, slot, count, pack
    block_count: int | None = None
    pack_count: int | None = None
    run_count: int | None = None
    name_padding: bytes | None = None

    def body(self) -> bytes:
        data = struct.pack(
            "<IIIIQ", len(self.blocks) if self.block_count is None else self.block_count,
            len(self.packs) if self.pack_count is None else self.pack_count, self.flat,
            self.reserved, len(self.runs) if self.run_count is None else self.run_count)
        for name, size in self.blocks:
            text = padded(name) if self.name_padding is None else name + self.name_padding
            data += struct.pack("<QHHI", size, len(name), 0, 0) + text
        for name in self.packs:
            data += struct.pack("<II", len(name), 0) + padded(name)
        return data + b"".join(struct.pack("<QQII", *run) for run in self.runs)


@dataclass
class IndexFile(File):
    magic: bytes = b"EPOCHIDX"
    id: bytes = b"one"
    slots: int = 2
    used: int | None = None
    kind: int = 0
    spans: Sequence[tuple[int, int]] = ((0, 2),)
    checksums: Sequence[int] = field(default_factory=lambda: sums(page(0), page(1)))
    span_count: int | None = None
    id_length: int | None = None

    def body(self) -> bytes:
        used = len(self.checksums) if self.used is None else self.used
        span_count = len(self.spans) if self.span_count is None else self.span_count
        id_length = len(self.id) if self.id_length is None else self.id_length
        return (struct.pack("<QQQII", self.slots, used, span_count, self.kind, id_length)
                + padded(self.id) + b"".join(struct.pack("<QQ", *span) for span in self.spans)
                + b"".join(struct.pack("<Q", one) for one in self.checksums))


@dataclass
class Sample:
    """An image of two pages in one pack; every part can be another one."""

    map: MapFile = field(default_factory=MapFile)
    index: IndexFile = field(default_factory=IndexFile)
    pages: bytes = page(0) + page(1)

    def write(self, directory: Path) -> Path:
        """Write all three files; returns the page map."""
        (directory / "one.pack").write_bytes(self.pages)
        (directory / "one.idx").write_bytes(self.index.to_bytes())
        (directory / "map").write_bytes(self.map.to_bytes())
        return directory / "map"

    def with_map(self, **fields: object) -> Sample:
        return replace(self, map=replace(self.map, **fields))  # type: ignore[arg-type]

    def with_index(self, **fields: object) -> Sample:
        return replace(self, index=replace(self.index, **fields))  # type: ignore[arg-type]
