"""A process with guest-like memory that writes pages on command (victim.c)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType

from memsave import PAGE, Block, GuestMemory, Image, Layout, PackStore, preload_library


def build(directory: Path) -> Path:
    program = directory / "victim"
    subprocess.run(["gcc", "-O1", "-o", str(program), str(Path(__file__).with_name("victim.c"))],
                   check=True)
    return program


class Victim:
    """``main`` pages of a private file mapping, ``other`` pages of anonymous memory."""

    def __init__(self, program: Path, image: Path, main: int, other: int, *,
                 preload: bool = True) -> None:
        self.layout = Layout((Block("ram", main * PAGE), Block("vga.vram", other * PAGE)))
        environment = dict(os.environ)
        if preload:
            environment["LD_PRELOAD"] = str(preload_library())
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(main * PAGE)
        self._process = subprocess.Popen(
            [str(program), str(image), str(main), str(other)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        pid, ram, vram, self.environment = self._process.stdout.readline().split()
        self.pid = int(pid)
        self.addresses = {"ram": int(ram), "vga.vram": int(vram)}

    def do(self, *command: object) -> None:
        self.begin(*command)
        self.done()

    def begin(self, *command: object) -> None:
        """Send a command without waiting until it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(str(word) for word in command) + "\n")
        self._process.stdin.flush()

    def done(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ok\n"

    def write(self, page: int, seed: int, count: int = 1) -> None:
        self.do("w", page, count, seed)

    def memory(self) -> bytes:
        """All blocks, by another way than the one under test: /proc/PID/mem."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            parts = []
            for block in self.layout.blocks:
                memory.seek(self.addresses[block.name])
                parts.append(memory.read(block.size))
        return b"".join(parts)

    def guest(self, method: str = "auto") -> GuestMemory:
        return GuestMemory(self.pid, self.layout, self.addresses, method=method)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def contents(image: Image, packs: PackStore) -> bytes:
    """The memory an image describes, read from the pack files as any other program would."""
    memory = bytearray(image.layout.size)
    for page, slot, count, pack in image.runs:
        with packs.pack_path(image.pack_ids[pack]).open("rb") as file:
            file.seek(slot * PAGE)
            memory[page * PAGE:(page + count) * PAGE] = file.read(count * PAGE)
    return bytes(memory)
