"""The shape of guest memory: blocks, one behind the other, in pages of 4 KiB."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 4096
MAX_NAME = 255  # bytes
MAX_BLOCKS = 1024
MAX_PAGES = 1 << 36  # 256 TiB; bounds what a damaged file can make us allocate


@dataclass(frozen=True)
class Block:
    """One RAM block: ``size`` in bytes, a multiple of PAGE."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % PAGE:
            raise ValueError(f"block {self.name!r} has {self.size} bytes, not whole pages")
        if not 0 < len(self.name.encode()) <= MAX_NAME:
            raise ValueError(f"a block's name has 1 to {MAX_NAME} bytes")

    @property
    def pages(self) -> int:
        return self.size // PAGE


@dataclass(frozen=True)
class Layout:
    """All blocks in order. Block 0 is main memory: a hypervisor maps it from a flat pack."""

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.blocks) <= MAX_BLOCKS:
            raise ValueError(f"a layout has 1 to {MAX_BLOCKS} blocks")
        if self.pages > MAX_PAGES:
            raise ValueError("a layout has at most 256 TiB")

    @property
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

    def runs(self, numbers: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
        """Split runs of global page numbers (first, count) by block: (block, first, count)."""
        found = []
        for first, count in numbers:
            at = 0
            for block in self.blocks:
                low, high = max(first, at), min(first + count, at + block.pages)
                if low < high:
                    found.append((block.name, low - at, high - low))
                at += block.pages
        return found
