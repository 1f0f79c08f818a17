"""Files of `xl save`: a header with the configuration, libxl's stream, in it libxc's.

Sources: Xen docs/specs/libxl-migration-stream.pandoc; tools/xl/xl.h (struct save_file_header).
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass

from memsave.errors import XenStreamError
from memsave.xen.domain import XenDomain

MAGIC = b"Xen saved domain, xl format\n \0 \r"
HEADER = struct.Struct("<32sIIII")  # magic, byte order, mandatory, optional flags, bytes of data
BYTE_ORDER = 0x01020304
JSON_CONFIG, STREAM_V2 = 1, 2  # mandatory flags
LIBXL = struct.Struct(">8sII")  # big endian: ident, version, options
LIBXL_IDENT, LIBXL_VERSION = b"LibxlFmt", 2
RECORD = struct.Struct("<II")
END, LIBXC_CONTEXT, EMULATOR_XENSTORE, EMULATOR_CONTEXT = range(4)
OPTIONAL = 0x80000000
MAX_CONFIG = 4 << 20
MAX_RECORD = 64 << 20  # bytes: a device model's state
MAX_RECORDS = 64
assert len(MAGIC) == 32


@dataclass(frozen=True)
class XlSave:
    """``config``: libxl's JSON, without the zero behind it; ``libxl``: (type, body) of records
    beside libxc's stream."""

    config: bytes
    libxl: tuple[tuple[int, bytes], ...]


def read(fd: int, domain: XenDomain) -> XlSave:
    """Read a whole file into an empty domain. XenStreamError if it is malformed."""
    config = _config(fd)
    ident, version, options = LIBXL.unpack(_take(fd, LIBXL.size, "libxl's header"))
    if ident != LIBXL_IDENT or version != LIBXL_VERSION or options:
        raise XenStreamError("it does not hold a stream of libxl's version 2")
    kept: list[tuple[int, bytes]] = []
    seen = False
    while True:
        kind, length = RECORD.unpack(_take(fd, RECORD.size, "a record's header of libxl"))
        if kind in (END, LIBXC_CONTEXT) and length:
            raise XenStreamError(f"a record of libxl's type {kind} has content")
        if kind == END:
            break
        if kind == LIBXC_CONTEXT:
            if seen:
                raise XenStreamError("it holds two streams of libxc")
            domain.read(fd)
            seen = True
            continue
        if kind not in (EMULATOR_XENSTORE, EMULATOR_CONTEXT) and not kind & OPTIONAL:
            raise XenStreamError(f"it has a mandatory record of libxl's unknown type {kind:#x}")
        if length > MAX_RECORD or len(kept) == MAX_RECORDS:
            raise XenStreamError(f"it has a record of libxl with {length} bytes, or too many")
        body = _take(fd, length + -length % 8, "a record of libxl")[:length]
        kept.append((kind, body))
    if not seen:
        raise XenStreamError("it holds no stream of libxc")
    return XlSave(config, tuple(kept))


def write(fd: int, domain: XenDomain, save: XlSave) -> None:
    """Write a file that `xl restore` takes. OSError or MemsaveError if that fails."""
    config = save.config + b"\0"
    _put(fd, HEADER.pack(MAGIC, BYTE_ORDER, JSON_CONFIG | STREAM_V2, 0, 4 + len(config))
         + struct.pack("<I", len(config)) + config
         + LIBXL.pack(LIBXL_IDENT, LIBXL_VERSION, 0) + RECORD.pack(LIBXC_CONTEXT, 0))
    domain.write(fd)
    for kind, body in save.libxl:
        _put(fd, RECORD.pack(kind, len(body)) + body + bytes(-len(body) % 8))
    _put(fd, RECORD.pack(END, 0))


def _config(fd: int) -> bytes:
    magic, order, mandatory, _, length = HEADER.unpack(_take(fd, HEADER.size, "its header"))
    if magic != MAGIC:
        raise XenStreamError("it does not begin as a file of 'xl save' does")
    if order != BYTE_ORDER:
        raise XenStreamError("it is of a machine with the other byte order")
    if mandatory & ~(JSON_CONFIG | STREAM_V2) or not mandatory & STREAM_V2:
        raise XenStreamError(f"it has flags {mandatory:#x}, which are not known; files of Xen "
                             "before 4.6 cannot be taken")
    if not 4 < length <= MAX_CONFIG or not mandatory & JSON_CONFIG:
        raise XenStreamError("it has no configuration as JSON")
    data = _take(fd, length, "its configuration")
    (size,) = struct.unpack_from("<I", data)
    if size > length - 4:
        raise XenStreamError(f"its configuration has {size} bytes, but only {length - 4} follow")
    config = data[4:4 + size].rstrip(b"\0")
    try:
        if not isinstance(json.loads(config), dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise XenStreamError(f"its configuration is no JSON: {error}") from error
    return config


def _take(fd: int, length: int, what: str) -> bytes:
    """Exactly so many bytes, so that the next reader of the descriptor finds what follows."""
    parts = []
    while length:
        part = os.read(fd, min(length, 1 << 20))
        if not part:
            raise XenStreamError(f"it ends within {what}")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _put(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]
