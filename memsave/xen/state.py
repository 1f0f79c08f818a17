"""What of a domain is not memory, as a file: typed blobs, each with its checksum."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memsave import files, native
from memsave.errors import MemsaveError
from memsave.native import lib
from memsave.xen.domain import XenDomain

MAGIC = b"EPOCHXEN"
HEADER = struct.Struct("<IIIIQQ")  # guest, Xen's version, zero, pages, blobs
BLOB = struct.Struct("<IIQQ")  # space, type, bytes, XXH3-64 of the content
RANGE = struct.Struct("<QII")  # first page, count, type
MAX_BLOBS = 1 << 16
assert (HEADER.size, BLOB.size, RANGE.size) == (32, 24, 16)

LIBXC, LIBXL, OURS = 0, 1, 2  # spaces: whose type numbers
PAGE_TYPES, STORE_RING, CONSOLE_RING, CONFIG = 1, 2, 3, 4
_RINGS = {STORE_RING: lib.MS_XEN_STORE, CONSOLE_RING: lib.MS_XEN_CONSOLE}


@dataclass(frozen=True)
class State:
    """``blobs``: (space, type, content) in order; ``guest``: MS_XEN_PV or MS_XEN_HVM."""

    guest: int
    version: tuple[int, int]
    pages: int
    blobs: tuple[tuple[int, int, bytes], ...]

    @classmethod
    def of(cls, domain: XenDomain, config: bytes, libxl: tuple[tuple[int, bytes], ...]) -> State:
        """Of a canonical domain, with its configuration (JSON of libxl's) and further records of
        libxl's stream."""
        blobs = [(OURS, CONFIG, config), (OURS, PAGE_TYPES, b"".join(
            RANGE.pack(*found) for found in _ranges(domain)))]
        for kind, role in _RINGS.items():
            frame = domain.frame(role)
            if frame is not None:
                blobs.append((OURS, kind, struct.pack("<Q", frame[0]) + frame[1]))
        blobs += [(LIBXC, kind, body) for kind, body in domain.records()]
        blobs += [(LIBXL, kind, body) for kind, body in libxl]
        return cls(int(domain.c.guest), domain.version, domain.pages, tuple(blobs))

    @property
    def config(self) -> bytes:
        """The domain's configuration, as libxl writes it (JSON)."""
        return next(body for space, kind, body in self.blobs if (space, kind) == (OURS, CONFIG))

    @property
    def libxl(self) -> tuple[tuple[int, bytes], ...]:
        """Records of libxl's stream beside libxc's: a device model's state."""
        return tuple((kind, body) for space, kind, body in self.blobs if space == LIBXL)

    def to_bytes(self) -> bytes:
        parts = [HEADER.pack(self.guest, *self.version, 0, self.pages, len(self.blobs))]
        for space, kind, body in self.blobs:
            parts += [BLOB.pack(space, kind, len(body), native.hash_bytes(body)),
                      files.padded(body)]
        return files.sealed(MAGIC, parts)

    def save(self, path: Path) -> None:
        """Replace ``path``, durably (mode 0600). Raises OSError."""
        files.write_temporary(path, self.to_bytes())
        files.temporary(path).rename(path)
        files.sync_directory(path.parent)

    @classmethod
    def load(cls, path: Path) -> State:
        """MemoryDamaged if the file is missing or not whole; MemsaveError if it is too new."""
        reader = files.Reader(path, "domain state", MAGIC)
        guest, major, minor, zero, pages, count = reader.unpack(HEADER, "its header")
        if zero or guest not in (lib.MS_XEN_PV, lib.MS_XEN_HVM) or count > MAX_BLOBS or not pages:
            raise reader.damaged(f"has an impossible header: guest {guest}, {count} blobs")
        blobs = []
        for _ in range(count):
            space, kind, length, checksum = reader.unpack(BLOB, "a blob's header")
            body = reader.take(length, "a blob")
            if native.hash_bytes(body) != checksum:
                raise reader.damaged(f"has a blob of type {kind} with another checksum than when "
                                     "it was written")
            blobs.append((space, kind, body))
        reader.end()
        if not any((space, kind) == (OURS, CONFIG) for space, kind, _ in blobs):
            raise reader.damaged("has no configuration")
        return cls(guest, (major, minor), pages, tuple(blobs))

    def fill(self, domain: XenDomain) -> None:
        """Make an empty domain this one, but for its memory. MemsaveError if it cannot be."""
        domain.set(paravirtual=self.guest == lib.MS_XEN_PV, version=self.version,
                   pages=self.pages)
        for space, kind, body in self.blobs:
            if space == LIBXC:
                domain.add_record(kind, body)
            elif space == OURS and kind == PAGE_TYPES:
                if len(body) % RANGE.size:
                    raise MemsaveError("the page types of a domain's state are cut off")
                for first, pages, page_type in RANGE.iter_unpack(body):
                    domain.set_types(first, pages, page_type)
            elif space == OURS and kind in _RINGS:
                (page,) = struct.unpack_from("<Q", body)
                domain.set_frame(_RINGS[kind], page, body[8:])
            elif space == OURS and kind != CONFIG:
                raise MemsaveError(f"a domain's state has a blob of unknown type {kind}; use a "
                                   "newer memsave")


def _ranges(domain: XenDomain) -> Iterator[tuple[int, int, int]]:
    for first, count, kind in domain.page_types():
        for at in range(0, count, 0xFFFFFFFF):
            yield first + at, min(count - at, 0xFFFFFFFF), kind
