"""Pictures of a machine's display: PNG through QEMU, thumbnails by taking every Nth pixel."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from epochs.errors import Failed
from epochs.qemu.monitor import Monitor

THUMBNAIL_WIDTH = 320  # pixels at most


def capture(monitor: Monitor, directory: Path) -> bytes:
    """The display as PPM (P6, 8 bits), via a temporary file in ``directory``."""
    file = directory / "screen.ppm"
    try:
        monitor.execute("screendump", filename=str(file))
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


def parse_ppm(ppm: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a P6 file; Failed if it is none."""
    parts = ppm.split(maxsplit=4) if ppm.startswith(b"P6") else []
    header = ppm.split(b"\n", 3)
    if len(parts) < 4 or len(header) < 4 or header[2] != b"255":
        raise Failed("QEMU's screen dump is no 8-bit P6 picture")
    width, height = (int(number) for number in header[1].split())
    pixels = header[3]
    if len(pixels) != width * height * 3:
        raise Failed("QEMU's screen dump has the wrong size")
    return width, height, pixels


def png(ppm: bytes, step: int = 1) -> bytes:
    """The picture as PNG (RFC 2083), keeping every ``step``-th pixel and line."""
    width, height, pixels = parse_ppm(ppm)
    small_width = -(-width // step)
    rows = bytearray()
    for y in range(0, height, step):
        row = pixels[y * width * 3:(y + 1) * width * 3]
        line = bytearray(small_width * 3)
        for channel in range(3):
            line[channel::3] = row[channel::3 * step]
        rows += b"\0" + line
    small_height = -(-height // step)
    header = struct.pack(">IIBBBBB", small_width, small_height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
            + _chunk(b"IDAT", zlib.compress(bytes(rows), 6)) + _chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return (struct.pack(">I", len(data)) + kind + data
            + struct.pack(">I", zlib.crc32(kind + data)))


def thumbnail(ppm: bytes) -> bytes:
    """A small PNG, at most THUMBNAIL_WIDTH pixels wide."""
    width, _, _ = parse_ppm(ppm)
    return png(ppm, max(1, -(-width // THUMBNAIL_WIDTH)))
