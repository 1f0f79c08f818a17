"""Builds libxc streams and files of `xl save` octet by octet, good ones and bad ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

PAGE = 4096
NORMAL, L1, L4, PIN, XALLOC, XTAB = 0, 1, 4, 8, 0xE, 0xF
(END, PAGE_DATA, PV_INFO, P2M_FRAMES, VCPU_BASIC, VCPU_EXTENDED, VCPU_XSAVE, SHARED_INFO, TSC_INFO,
 HVM_CONTEXT, HVM_PARAMS) = range(11)
VCPU_MSRS, VERIFY, CHECKPOINT, STATIC_DATA_END, CPUID_POLICY, MSR_POLICY = 12, 13, 14, 16, 17, 18

PAGES = 1024  # of the domains made here
INFO, STORE, CONSOLE, P2M, TABLE, ROOT = 100, 101, 102, 200, 300, 310
FRAMES = 2  # of the P2M: 1024 entries of 8 bytes


def record(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    """A record; ``length`` lies about it."""
    size = len(body) if length is None else length
    return struct.pack("<II", kind, size) + body + bytes(-len(body) % 8)


def headers(guest: int, *, marker: int = 2**64 - 1, ident: bytes = b"XENF", version: int = 3,
            options: int = 0, shift: int = 12) -> bytes:
    return (struct.pack(">Q4sIHHI", marker, ident, version, options, 0, 0)
            + struct.pack("<IHHII", guest, shift, 0, 4, 17))


def pages(content: Iterable[tuple[int, int, bytes | None]], *, count: int | None = None) -> bytes:
    """A PAGE_DATA record of (page, type, content)."""
    entries = list(content)
    return record(PAGE_DATA, struct.pack("<II", len(entries) if count is None else count, 0)
                  + b"".join(struct.pack("<Q", kind << 60 | page) for page, kind, _ in entries)
                  + b"".join(data for _, _, data in entries if data is not None))


def table(entries: dict[int, int]) -> bytes:
    """A page table: index to page, present and writable."""
    words = [0] * 512
    for index, page in entries.items():
        words[index] = page << 12 | 3
    return struct.pack("<512Q", *words)


@dataclass
class PvDomain:
    """A 64-bit PV domain. ``frame``: page to the machine frame it happens to have."""

    shift: int = 0x5000
    live: bool = False  # restored and not run since: start info holds machine frames
    entry: int = 7  # the page that the page table points to
    missing: int = 900  # a page that the domain does not have
    sparse: bool = False  # pages without content are only allocated: a small stream
    content: dict[int, bytes] = field(default_factory=dict)

    def frame(self, page: int) -> int:
        return page + self.shift

    def start_info(self) -> bytes:
        def shared(page: int) -> int:
            return self.frame(page) if self.live else page

        return (b"xen-3.0-x86_64".ljust(32, b"\0")
                + struct.pack("<QQIIQIIQII", PAGES, self.shift << 12, 0, 0, shared(STORE),
                              self.shift % 7, 0, shared(CONSOLE), self.shift % 5, 0)
                ).ljust(PAGE, b"\0")

    def memory(self) -> list[tuple[int, int, bytes | None]]:
        p2m = [self.frame(page) if page != self.missing else 2**64 - 1 for page in range(PAGES)]
        special = {
            INFO: (NORMAL, self.start_info()),
            STORE: (NORMAL, b"store ring".ljust(PAGE, b"\0")),
            CONSOLE: (NORMAL, b"console ring".ljust(PAGE, b"\0")),
            P2M: (NORMAL, struct.pack("<512Q", *p2m[:512])),
            P2M + 1: (NORMAL, struct.pack("<512Q", *p2m[512:])),
            TABLE: (L1, table({5: self.entry})),
            ROOT: (L4 | PIN, table({0: TABLE})),
        }
        found: list[tuple[int, int, bytes | None]] = []
        for page in range(PAGES):
            if page == self.missing:
                found.append((page, XTAB, None))
            elif page in special:
                found.append((page, *special[page]))
            elif self.sparse and page not in self.content:
                found.append((page, XALLOC, None))
            else:
                data = self.content.get(page, b"").ljust(PAGE, b"\0")
                found.append((page, NORMAL, data))
        return found

    def vcpu(self, number: int = 0) -> bytes:
        context = bytearray(5168)
        struct.pack_into("<Q", context, 616, INFO)
        return struct.pack("<II", number, 0) + bytes(context)

    def records(self) -> dict[str, bytes]:
        """By name, in their order; tests leave out, repeat and change what they like."""
        found = {
            "headers": headers(1),
            "info": record(PV_INFO, struct.pack("<BBHI", 8, 4, 0, 0)),
            "cpuid": record(CPUID_POLICY, bytes(range(24))),
            "static end": record(STATIC_DATA_END),
            "frames": record(P2M_FRAMES, struct.pack("<IIQQ", 0, PAGES - 1, P2M, P2M + 1)),
        }
        memory = self.memory()
        for at in range(0, PAGES, 256):
            found[f"pages {at}"] = pages(memory[at:at + 256])
        found |= {
            "tsc": record(TSC_INFO, bytes(24)),
            "shared": record(SHARED_INFO, b"shared info".ljust(PAGE, b"\0")),
            "vcpu": record(VCPU_BASIC, self.vcpu()),
            "end": record(END),
        }
        return found

    def stream(self) -> bytes:
        return b"".join(self.records().values())


def hvm_records(content: dict[int, bytes] | None = None) -> dict[str, bytes]:
    """A PVH domain with the rings in pages 101 and 102."""
    filled = {STORE: b"store ring", CONSOLE: b"console ring", **(content or {})}
    memory = [(page, NORMAL, filled.get(page, b"").ljust(PAGE, b"\0")) for page in range(256)]
    return {
        "headers": headers(2),
        "static end": record(STATIC_DATA_END),
        "pages": pages(memory),
        "tsc": record(TSC_INFO, bytes(24)),
        "context": record(HVM_CONTEXT, b"context" * 9),
        "params": record(HVM_PARAMS, struct.pack("<IIQQQQ", 2, 0, 1, STORE, 17, CONSOLE)),
        "end": record(END),
    }


def xl_file(stream: bytes, *, config: bytes | None = None, emulator: bytes | None = None,
            mandatory: int = 3) -> bytes:
    """What `xl save` writes around a stream."""
    text = (json.dumps({"c_info": {"name": "web"}}).encode() if config is None else config) + b"\0"
    return (struct.pack("<32sIIII", b"Xen saved domain, xl format\n \0 \r", 0x01020304, mandatory,
                        0, 4 + len(text)) + struct.pack("<I", len(text)) + text
            + struct.pack(">8sII", b"LibxlFmt", 2, 0) + record(1) + stream
            + (record(3, emulator) if emulator is not None else b"") + record(0))
