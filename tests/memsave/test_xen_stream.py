"""Streams of Xen domains: to the canonical image and back, and everything malformed by name. What a
real Xen makes of them is tests/xen."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from memsave import Image, MemoryDamaged, PackStore, WriteResult
from memsave.errors import MemsaveError
from memsave.native import lib
from memsave.xen import State, XenDomain, XenStreamError, XlSave, xlfile
from tests.memsave import xen_writers as writers
from tests.memsave.xen_writers import (
    CONSOLE,
    INFO,
    PAGE,
    PAGES,
    STORE,
    PvDomain,
    hvm_records,
    record,
)


@pytest.fixture
def packs(tmp_path: Path) -> Iterator[PackStore]:
    (tmp_path / "packs").mkdir()
    with PackStore(tmp_path / "packs") as store:
        yield store


def read(stream: bytes, place: Path, max_pages: int = 1 << 20) -> XenDomain:
    """The domain in a stream; whoever calls closes it."""
    source = place / "stream"
    source.write_bytes(stream + b"behind")
    domain = XenDomain(place, max_pages=max_pages)
    try:
        with source.open("rb", buffering=0) as file:
            domain.read(file.fileno())
            assert file.read() == b"behind", "it reads to the end and no further"
    except BaseException:
        domain.close()
        raise
    return domain


def image_of(stream: bytes, place: Path, packs: PackStore, name: str,
             parent: Image | None = None) -> WriteResult:
    with read(stream, place) as domain:
        return domain.write_image(parent, packs, name)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def refuse(stream: bytes, place: Path) -> str:
    """Why a stream is refused."""
    before = open_files()
    with pytest.raises(XenStreamError) as caught:
        read(stream, place).close()
    assert open_files() == before
    return str(caught.value)


def joined(records: dict[str, bytes]) -> bytes:
    return b"".join(records.values())


# -- the way in and out --------------------------------------------------------------------------
def test_equal_guests_have_equal_memory(tmp_path: Path, packs: PackStore) -> None:
    """Whatever machine frames they have, and whether they ran since they were restored."""
    content = {7: b"seven", 640: b"much"}
    one = image_of(PvDomain(content=content).stream(), tmp_path, packs, "one")
    for name, other in (("two", PvDomain(shift=0x777, content=content)),
                        ("three", PvDomain(shift=0x123456, live=True, content=content))):
        again = image_of(other.stream(), tmp_path, packs, name, one.image)
        assert again.image.digest(packs) == one.image.digest(packs)
        assert again.new_pages == 0
    changed = image_of(PvDomain(content={**content, 7: b"eight"}).stream(), tmp_path, packs,
                       "four", one.image)
    assert changed.image.digest(packs) != one.image.digest(packs)
    assert changed.new_pages == 1


def test_there_and_back(tmp_path: Path, packs: PackStore) -> None:
    """The stream written holds what the one read held, but for what a restore sets anyway."""
    source = PvDomain(content={7: b"seven"})
    unknown = record(0x80000123, b"of the future")
    records = source.records()
    records["tsc"] += unknown
    with read(joined(records), tmp_path) as domain:
        assert domain.paravirtual
        assert domain.version == (4, 17)
        assert domain.frame(lib.MS_XEN_STORE) == (STORE, b"store ring".ljust(PAGE, b"\0"))
        image = domain.write_image(None, packs, "one").image
        state = State.of(domain, b"{}", ((3, b"device model"),))
    state.save(tmp_path / "state")
    assert State.load(tmp_path / "state") == state
    with XenDomain(tmp_path) as again:
        state.fill(again)
        again.load_image(image, packs)
        with (tmp_path / "out").open("wb", buffering=0) as file:
            again.write(file.fileno())
    written = (tmp_path / "out").read_bytes()
    assert unknown in written
    for name, one in records.items():
        if not name.startswith("pages"):
            assert one.removesuffix(unknown) in written, name
    with read(written, tmp_path) as domain:
        assert dict(enumerate(domain.records())) == dict(enumerate(
            (kind, body) for space, kind, body in state.blobs if space == 0))
        assert domain.frame(lib.MS_XEN_CONSOLE) == (
            CONSOLE, b"console ring".ljust(PAGE, b"\0"))
        second = domain.write_image(image, packs, "two")
        assert State.of(domain, b"{}", ((3, b"device model"),)) == state
    assert second.image.digest(packs) == image.digest(packs)
    assert second.new_pages == 0


def test_start_info_is_canonical(tmp_path: Path, packs: PackStore) -> None:
    """Read from the image: guest frame numbers for the rings, zeros for what a restore sets."""
    image = image_of(PvDomain(live=True).stream(), tmp_path, packs, "one").image
    (data,) = [bytes(view[(INFO - first) * PAGE:(INFO - first + 1) * PAGE])
               for first, view in image._read(packs)
               if first <= INFO < first + len(view) // PAGE]
    assert struct.unpack_from("<QQI", data, 32) == (PAGES, 0, 0)
    assert struct.unpack_from("<QIIQI", data, 56) == (STORE, 0, 0, CONSOLE, 0)


def test_hvm(tmp_path: Path, packs: PackStore) -> None:
    one = image_of(joined(hvm_records({7: b"x"})), tmp_path, packs, "one")
    assert one.image.resident == 1, "the rings are not part of the memory"
    ring = image_of(joined(hvm_records({7: b"x", STORE: b"other"})), tmp_path, packs, "two")
    assert ring.image.digest(packs) == one.image.digest(packs)


def test_a_file_of_xl(tmp_path: Path) -> None:
    file = tmp_path / "web.save"
    file.write_bytes(writers.xl_file(PvDomain().stream(), emulator=b"12345678state"))
    with XenDomain(tmp_path) as domain, file.open("rb", buffering=0) as source:
        saved = xlfile.read(source.fileno(), domain)
        assert saved == XlSave(b'{"c_info": {"name": "web"}}', ((3, b"12345678state"),))
        with (tmp_path / "again").open("wb", buffering=0) as target:
            xlfile.write(target.fileno(), domain, saved)
    with XenDomain(tmp_path) as domain, (tmp_path / "again").open("rb", buffering=0) as source:
        assert xlfile.read(source.fileno(), domain) == saved


# -- malformed ---------------------------------------------------------------------------------
def test_truncated_anywhere(tmp_path: Path) -> None:
    records = list(PvDomain().records().items())
    for number, (name, one) in enumerate(records):
        before = b"".join(part for _, part in records[:number])
        for cut in {0, 3, len(one) // 2, len(one) - 1}:
            if not before and cut == 0:
                continue
            assert "it ends within" in refuse_short(before + one[:cut], tmp_path), (name, cut)


def refuse_short(stream: bytes, place: Path) -> str:
    source = place / "short"
    source.write_bytes(stream)
    with XenDomain(place, max_pages=1 << 20) as domain, source.open("rb", buffering=0) as file, \
            pytest.raises(XenStreamError) as caught:
        domain.read(file.fileno())
    return str(caught.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"headers": writers.headers(1, marker=1)}, "does not begin"),
    ({"headers": writers.headers(1, ident=b"XENG")}, "does not begin"),
    ({"headers": writers.headers(1, version=9)}, "version 9"),
    ({"headers": writers.headers(1, options=1)}, "other byte order"),
    ({"headers": writers.headers(1, shift=13)}, r"2\^13"),
    ({"headers": writers.headers(7)}, "unknown type 7"),
    ({"info": b""}, "without X86_PV_INFO"),
    ({"info": record(writers.PV_INFO, bytes((4, 3, 0, 0, 0, 0, 0, 0)))}, "32-bit words"),
    ({"info": record(writers.PV_INFO, bytes(16))}, "16 bytes instead of 8"),
    ({"static end": b""}, "before the end of the static data"),
    ({"static end": record(writers.STATIC_DATA_END, b"x")}, "has content"),
    ({"frames": b""}, "before the P2M frames"),
    ({"frames": record(writers.P2M_FRAMES, struct.pack("<IIQ", 0, 1023, 200))}, "do not describe"),
    ({"frames": record(writers.P2M_FRAMES, struct.pack("<II", 5, 1))}, "do not describe"),
    ({"frames": record(writers.P2M_FRAMES, struct.pack("<II", 0, 2**32 - 1))}, "do not describe"),
    ({"frames": record(writers.P2M_FRAMES, struct.pack("<IIQQ", 0, 1023, 200, 5000))},
     "P2M is in page 0x1388"),
    ({"frames": record(writers.P2M_FRAMES, struct.pack("<IIQQ", 0, 1023, 200, 300))},
     "P2M is in page 0x12c"),
    ({"tsc": record(writers.TSC_INFO, bytes(8))}, "8 bytes instead of 24"),
    ({"tsc": record(writers.TSC_INFO, bytes(24)) * 2}, "comes twice"),
    ({"tsc": record(0x99, b"")}, "mandatory record of unknown type 0x99"),
    ({"tsc": record(writers.VERIFY)}, "debugging"),
    ({"tsc": record(writers.CHECKPOINT)}, "several checkpoints"),
    ({"tsc": record(writers.HVM_CONTEXT, b"12345678")}, "another kind of guest"),
    ({"tsc": record(writers.CPUID_POLICY, b"12345678")}, "comes too late"),
    ({"tsc": record(0x80000001, length=2**32 - 1)}, "too many"),
    ({"shared": record(writers.SHARED_INFO, bytes(8))}, "instead of 4096"),
    ({"shared": b""}, "no record of type 0x7"),
    ({"vcpu": b""}, "no record of type 0x4"),
    ({"vcpu": record(writers.VCPU_BASIC, PvDomain().vcpu()) * 2}, "comes twice"),
    ({"vcpu": record(writers.VCPU_BASIC, PvDomain().vcpu(1))}, "no state of virtual processor 0"),
    ({"vcpu": record(writers.VCPU_BASIC, bytes(5176 - 8))}, "instead of 5176"),
    ({"vcpu": record(writers.VCPU_BASIC, struct.pack("<II", 0, 0) + b"\xff" * 5168)},
     "start info is in page 0xf"),
    ({"end": record(writers.END, b"x")}, "END record has content"),
    ({"pages 0": writers.pages([])}, "has 0 pages"),
    ({"pages 0": writers.pages([], count=5000)}, "has 5000 pages"),
    ({"pages 0": writers.pages([(7, 0, None)])}, "with 1 pages of content has 0 bytes"),
    ({"pages 0": writers.pages([(7, 0xF, bytes(PAGE))])}, "with 0 pages of content has 4096"),
    ({"pages 0": writers.pages([(7, 0, bytes(100))])}, "has 100 bytes"),
    ({"pages 0": writers.pages([(7, 0, bytes(PAGE))], count=2)}, "bytes"),
    ({"pages 0": writers.pages([(7, 5, bytes(PAGE))])}, "unknown type"),
    ({"pages 0": writers.pages([(7, 0xD, None)])}, "broken memory"),
    ({"pages 0": writers.pages([(1024, 0, bytes(PAGE))])}, "outside the domain"),
    ({"pages 0": writers.pages([(2**52 - 1, 0, bytes(PAGE))])}, "outside the domain"),
    ({"pages 0": record(writers.PAGE_DATA, b"1234")}, "too few"),
    ({"pages 0": record(writers.PAGE_DATA, struct.pack("<II", 4, 0))}, "too few"),
])
def test_malformed(change: dict[str, bytes], said: str, tmp_path: Path) -> None:
    import re

    records = PvDomain().records()
    assert set(change) <= set(records)
    assert re.search(said, refuse(joined({**records, **change}), tmp_path))


def test_wrong_order(tmp_path: Path) -> None:
    records = PvDomain().records()
    late = records.pop("pages 0")
    end = records.pop("end")
    assert "comes too late" in refuse(joined(records) + late + end, tmp_path)


@pytest.mark.parametrize("entry", [PAGES, 2**39, 900])
def test_a_page_table_that_points_outside(entry: int, tmp_path: Path) -> None:
    assert "outside the domain" in refuse(PvDomain(entry=entry).stream(), tmp_path)


def test_more_pages_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(XenStreamError, match="do not describe"):
        read(PvDomain().stream(), tmp_path, max_pages=512)


@pytest.mark.parametrize(("stream", "said"), [
    ({"params": record(writers.HVM_PARAMS, struct.pack("<IIQQ", 9, 0, 1, 101))},
     "9 HVM parameters"),
    ({"params": record(writers.HVM_PARAMS, struct.pack("<IIQQ", 1, 0, 1, 2**40))}, "store ring"),
    ({"context": b""}, "no record of type 0x9"),
    ({"pages": writers.pages([(1, 1, bytes(PAGE))])}, "page table"),
    ({"pages": writers.pages([(2**30, 0, bytes(PAGE))])}, "outside the domain"),
])
def test_malformed_hvm(stream: dict[str, bytes], said: str, tmp_path: Path) -> None:
    assert said in refuse(joined({**hvm_records(), **stream}), tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda data: b"?" + data[1:], "does not begin as a file of 'xl save'"),
    (lambda data: data[:32] + b"\1\2\3\4" + data[36:], "other byte order"),
    (lambda data: data[:36] + struct.pack("<I", 9) + data[40:], "flags 0x9"),
    (lambda data: data[:36] + struct.pack("<I", 1) + data[40:], "flags 0x1"),
    (lambda data: data[:44] + struct.pack("<I", 2**31) + data[48:], "no configuration"),
    (lambda data: data.replace(b"LibxlFmt", b"LibxlFnt"), "libxl's version 2"),
    (lambda data: data[:-8] + record(0x77), "unknown type 0x77"),
    (lambda data: data[:-8] + record(3, length=2**31), "bytes, or too many"),
    (lambda data: data[:-8] + record(1) + PvDomain().stream() + record(0), "two streams"),
    (lambda data: data[:-8], "ends within a record's header of libxl"),
    (lambda data: writers.xl_file(b"", config=b"[1]"), "no JSON"),
    (lambda data: writers.xl_file(b"", config=b"{"), "no JSON"),
])
def test_malformed_files(change: object, said: str, tmp_path: Path) -> None:
    assert callable(change)
    file = tmp_path / "bad.save"
    file.write_bytes(change(writers.xl_file(PvDomain().stream())))
    with XenDomain(tmp_path) as domain, file.open("rb", buffering=0) as source, \
            pytest.raises(XenStreamError, match=said):
        xlfile.read(source.fileno(), domain)


def test_damaged_state(tmp_path: Path, packs: PackStore) -> None:
    """A state file with any octet changed is refused, and one that does not fit its memory."""
    with read(PvDomain(content={7: b"x"}).stream(), tmp_path) as domain:
        image = domain.write_image(None, packs, "one").image
        state = State.of(domain, b"{}", ())
    path = tmp_path / "state"
    state.save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(MemoryDamaged):
            State.load(path)
    types = next(body for space, kind, body in state.blobs if (space, kind) == (2, 1))
    for body in (types[:-1], struct.pack("<QII", 0, 4096, 1), struct.pack("<QII", 0, 4, 9)):
        bad = State(state.guest, state.version, state.pages, tuple(
            (space, kind, body if (space, kind) == (2, 1) else old)
            for space, kind, old in state.blobs))
        with XenDomain(tmp_path) as domain, pytest.raises(MemsaveError):
            bad.fill(domain)
    fewer = State(state.guest, state.version, state.pages, tuple(
        (space, kind, struct.pack("<QII", 0, 5, 1) if (space, kind) == (2, 1) else old)
        for space, kind, old in state.blobs))
    with XenDomain(tmp_path) as domain:
        fewer.fill(domain)
        with pytest.raises(XenStreamError, match="no such page"):
            domain.load_image(image, packs)
