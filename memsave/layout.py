"""The shape of guest memory: named blocks, one behind the other, in pages of 4 KiB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

PAGE = 4096  # bytes
MAX_NAME = 255  # bytes of UTF-8
MAX_BLOCKS = 1024
MAX_PAGES = 1 << 36  # 256 TiB


@dataclass(frozen=True)
class Block:
    """One RAM block. ``size`` is in bytes, a positive multiple of PAGE; ValueError otherwise."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % PAGE:
            raise ValueError(f"block {self.name!r} has {self.size} bytes, which is not a positive "
                             f"multiple of {PAGE}")
        if not 0 < len(self.name.encode()) <= MAX_NAME:
            raise ValueError(f"a block's name has 1 to {MAX_NAME} bytes, not "
                             f"{len(self.name.encode())}")

    @property
    def pages(self) -> int:
        return self.size // PAGE


@dataclass(frozen=True)
class Layout:
    """All blocks in order; block 0 is the main memory, which a hypervisor maps from a flat pack.

    A *global page number* counts pages through all blocks. ValueError for no block, more than
    MAX_BLOCKS or MAX_PAGES, or two of one name.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.blocks) <= MAX_BLOCKS:
            raise ValueError(f"a layout has 1 to {MAX_BLOCKS} blocks, not {len(self.blocks)}")
        if len({block.name for block in self.blocks}) != len(self.blocks):
            raise ValueError("two blocks of a layout have the same name")
        if self.pages > MAX_PAGES:
            raise ValueError(f"a layout has at most {MAX_PAGES} pages, not {self.pages}")

    @cached_property
    def pages(self) -> int:
        """Pages of all blocks."""
        return sum(block.pages for block in self.blocks)

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return self.pages * PAGE

    def first_page(self, name: str) -> int:
        """Global number of a block's first page; KeyError if there is no such block."""
        at = 0
        for block in self.blocks:
            if block.name == name:
                return at
            at += block.pages
        raise KeyError(name)

    def split(self, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
        """Turn runs of global page numbers (first, count) into (block, first in block, count)."""
        for first, count in runs:
            at = 0
            for block in self.blocks:
                low, high = max(first, at), min(first + count, at + block.pages)
                if low < high:
                    yield block.name, low - at, high - low
                at += block.pages
