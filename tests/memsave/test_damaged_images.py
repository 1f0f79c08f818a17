"""Whatever is wrong with stored memory is found, by the loader and by the independent verifier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import PAGE, Sample, page, sums

from memsave import Image, MemoryDamaged, MemsaveError, PackStore, verifier

S = Sample()
HUGE = 2**62


def load_and_verify(page_map: Path) -> None:
    with PackStore(page_map.parent) as packs:
        Image.load(page_map).verify(packs)


# (sample, which file is named, what the loader says, what the verifier says)
MALFORMED: dict[str, tuple[Sample, str, str, str]] = {
    "map magic": (S.with_map(magic=b"EPOCHMAX"), "map", "begins with other bytes", "begin with"),
    "map cut": (S.with_map(cut=8), "map", "1 runs, which do not fit",
                "cannot hold 1 runs"),
    "map longer": (S.with_map(extra=bytes(8)), "map", "8 bytes too many", "cannot hold"),
    "map length": (S.with_map(length=77), "map", "says that it has 77 bytes", "says 77 bytes"),
    "map checksum": (S.with_map(checksum=1), "map", "another checksum", "wrong checksum"),
    "map reserved": (S.with_map(reserved=1), "map", "impossible header", "reserved field"),
    "no block": (S.with_map(blocks=()), "map", "impossible header: 0 blocks", "has 0 blocks"),
    "many blocks": (S.with_map(block_count=2**32 - 1), "map", "impossible header", "blocks"),
    "too many blocks for the file": (S.with_map(block_count=9), "map", "impossible|ends within",
                                     "early|block|reserved"),
    "many packs": (S.with_map(pack_count=2**32 - 1), "map", "impossible header", "pack|early"),
    "packs that do not fit": (S.with_map(pack_count=1000), "map", "pack", "pack|early"),
    "many runs": (S.with_map(run_count=HUGE), "map", "do not fit", "cannot hold"),
    "block size": (S.with_map(blocks=((b"ram", 100),)), "map", "positive multiple", "100 bytes"),
    "block of nothing": (S.with_map(blocks=((b"ram", 0),)), "map", "positive multiple", "0 bytes"),
    "blocks beyond 2^36 pages": (S.with_map(blocks=((b"ram", 2**63),)), "map",
                                 "at most", "more than 2"),
    "block name": (S.with_map(blocks=((b"", PAGE),)), "map", "1 to 255 bytes", "0 bytes"),
    "long block name": (S.with_map(blocks=((b"r" * 256, PAGE),)), "map", "impossible entry",
                        "256 bytes"),
    "block name not UTF-8": (S.with_map(blocks=((b"\xff", PAGE),)), "map", "impossible block",
                             "not UTF-8"),
    "two blocks of a name": (S.with_map(blocks=((b"r", PAGE), (b"r", PAGE))), "map",
                             "same name", "two blocks"),
    "padding": (S.with_map(name_padding=b"12345"), "map", "padding", "padding"),
    "pack id": (S.with_map(packs=(b"../x",)), "map", "impossible pack id", "impossible pack id"),
    "pack order": (S.with_map(packs=(b"one", b"aaa"), runs=((0, 0, 1, 0), (1, 0, 1, 1))), "map",
                   "not in order", "not in order"),
    "pack not used": (S.with_map(packs=(b"one", b"two")), "map", "does not use", "not use"),
    "flat pack number": (S.with_map(flat=1), "map", "flat pack 1", "no pack number 1"),
    "flat is a delta": (S.with_map(flat=0), "one.pack", "cannot be mapped", "cannot be mapped"),
    "empty run": (S.with_map(runs=((0, 0, 0, 0),)), "map", "run 0 has no pages", "empty run"),
    "overlapping runs": (S.with_map(runs=((0, 0, 2, 0), (1, 0, 1, 0))), "map", "run 1 overlaps",
                         "overlap"),
    "run outside": (S.with_map(runs=((7, 0, 2, 0),)), "map", "run 0 lies outside", "outside"),
    "run far outside": (S.with_map(runs=((2**64 - 1, 0, 2, 0),)), "map", "run 0 lies outside",
                        "outside"),
    "run in no pack": (S.with_map(runs=((0, 0, 2, 7),)), "map", "names pack 7", "pack 7"),
    "runs that are one": (S.with_map(runs=((0, 0, 1, 0), (1, 1, 1, 0))), "map", "should be one",
                          "should be one"),
    "slot beyond the pack": (S.with_map(runs=((0, 1, 2, 0),)), "one.pack", "not in use",
                             "not in use"),
    "slot far beyond": (S.with_map(runs=((0, 2**63, 2, 0),)), "map", "outside", "not in use"),
    "slot whose offset overflows": (S.with_map(runs=((0, 2**50, 2, 0),)), "one.pack",
                                    "not in use", "not in use"),
    "index magic": (S.with_index(magic=b"EPOCHMAP"), "one.idx", "begins with other", "begin"),
    "index cut": (S.with_index(cut=8), "one.idx", "2 checksums, which do not fit", "cannot hold"),
    "index longer": (S.with_index(extra=bytes(8)), "one.idx", "too many", "cannot hold"),
    "index checksum": (S.with_index(checksum=1), "one.idx", "another checksum", "wrong checksum"),
    "index kind": (S.with_index(kind=2), "one.idx", "impossible header", "unknown kind 2"),
    "index of another pack": (S.with_index(id=b"two"), "one.idx", "another pack", "another pack"),
    "long id": (S.with_index(id_length=2**32 - 1), "one.idx", "ends within its id", "early"),
    "many slots": (S.with_index(slots=HUGE), "one.idx", "impossible header", "slots"),
    "more used than slots": (S.with_index(slots=1), "one.idx", "impossible header", "in use"),
    "many spans": (S.with_index(span_count=HUGE), "one.idx", "do not fit", "cannot hold"),
    "many checksums": (S.with_index(used=2**36, slots=2**36), "one.idx", "do not fit",
                       "cannot hold"),
    "empty span": (S.with_index(spans=((0, 0), (0, 2))), "one.idx", "no pages", "empty span"),
    "overlapping spans": (S.with_index(slots=4, spans=((0, 1), (0, 1))), "one.idx", "overlaps",
                          "overlap"),
    "spans that are one": (S.with_index(spans=((0, 1), (1, 1))), "one.idx", "should be one",
                           "touch"),
    "span outside": (S.with_index(spans=((1, 2),)), "one.idx", "outside", "outside"),
    "span count": (S.with_index(slots=3, spans=((0, 1),)), "one.idx", "hold 1 slots", "1 slots"),
    "pack cut": (Sample(pages=page(0)), "one.pack", "has 4096 bytes instead of 8192", "4096"),
    "pack longer": (Sample(pages=page(0) * 3), "one.pack", "has 12288 bytes", "12288"),
    "page checksum": (Sample(pages=page(0) + page(2)), "one.pack", "slot 1 .* another checksum",
                      "slot 1"),
    "zero page stored": (Sample(pages=page(0) + bytes(PAGE)).with_index(
        checksums=sums(page(0), bytes(PAGE))), "one.pack", "holds a zero page", "zero page"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_image_is_refused(tmp_path: Path, name: str) -> None:
    sample, file, loader_says, verifier_says = MALFORMED[name]
    page_map = sample.write(tmp_path)
    with pytest.raises(MemoryDamaged, match=loader_says) as caught:
        load_and_verify(page_map)
    assert caught.value.path == tmp_path / file
    with pytest.raises(verifier.NotWhole, match=verifier_says):
        verifier.verify(page_map, tmp_path)


def test_the_sample_is_whole(tmp_path: Path) -> None:
    """The control of everything here: what the writers write is right."""
    page_map = S.write(tmp_path)
    load_and_verify(page_map)
    assert verifier.verify(page_map, tmp_path) == 2
    assert Image.load(page_map).to_bytes() == page_map.read_bytes()


def test_an_unknown_compatible_feature_is_no_obstacle(tmp_path: Path) -> None:
    page_map = S.with_map(compatible=1 << 63).with_index(compatible=1).write(tmp_path)
    load_and_verify(page_map)
    assert verifier.verify(page_map, tmp_path) == 2


@pytest.mark.parametrize(("sample", "says"), [
    (S.with_map(incompatible=4), "page map map needs feature bits 0x4"),
    (S.with_index(incompatible=1), "pack index one.idx needs feature bits 0x1"),
    (S.with_map(version=2), "page map map has version 2"),
    (S.with_index(version=9), "pack index one.idx has version 9"),
    (S.with_map(page_size=16384), "pages of 16384 bytes"),
])
def test_what_a_newer_program_wrote_is_refused_but_not_called_damaged(
        tmp_path: Path, sample: Sample, says: str) -> None:
    page_map = sample.write(tmp_path)
    with pytest.raises(MemsaveError, match=says) as caught:
        load_and_verify(page_map)
    assert not isinstance(caught.value, MemoryDamaged)
    with pytest.raises(verifier.NotWhole):
        verifier.verify(page_map, tmp_path)


@pytest.mark.parametrize("name", ["map", "one.idx", "one.pack"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    page_map = S.write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MemoryDamaged, match="is missing") as caught:
        load_and_verify(page_map)
    assert caught.value.path == tmp_path / name
    with pytest.raises(verifier.NotWhole, match="No such file"):
        verifier.verify(page_map, tmp_path)


@pytest.mark.parametrize("name", ["map", "one.idx", "one.pack"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_or_truncation_is_found(tmp_path_factory: pytest.TempPathFactory,
                                                name: str, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("flip")
    page_map = S.write(directory)
    content = bytearray((directory / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    (directory / name).write_bytes(content)
    with pytest.raises(MemoryDamaged) as caught:
        load_and_verify(page_map)
    assert caught.value.path == directory / name
    with pytest.raises(verifier.NotWhole):
        verifier.verify(page_map, directory)


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=300))
def test_garbage_behind_a_right_checksum_never_crashes(tmp_path_factory: pytest.TempPathFactory,
                                                       body: bytes) -> None:
    directory = tmp_path_factory.getbasetemp()
    for sample in (S.with_map(replaced=body), S.with_map(extra=body), S.with_index(extra=body),
                   S.with_index(replaced=body)):
        page_map = sample.write(directory)
        try:
            load_and_verify(page_map)
            loaded = True
        except MemsaveError:
            loaded = False
        try:
            verifier.verify(page_map, directory)
        except verifier.NotWhole:
            assert not loaded
        else:
            assert loaded


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "memsave.verifier", *map(str, arguments)],
                          capture_output=True, text=True, check=False)


def test_the_verifier_is_a_command(tmp_path: Path) -> None:
    page_map = S.write(tmp_path)
    whole = command(page_map, tmp_path)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, "whole: 2 pages\n", "")
    Sample(pages=page(0) + page(2)).write(tmp_path)
    damaged = command(page_map, tmp_path)
    assert (damaged.returncode, damaged.stdout) == (6, "")
    assert damaged.stderr.startswith(f"damaged: {tmp_path}/one.pack: slot 1")
    assert command().returncode == 2
    alone = subprocess.run([sys.executable, verifier.__file__, page_map, tmp_path], check=False)
    assert alone.returncode == 6


def test_a_pack_alone_is_verified_whole(tmp_path: Path) -> None:
    """Also slots that this image does not use: they vouch for other images."""
    page_map = S.with_map(runs=((0, 0, 1, 0),)).write(tmp_path)
    (tmp_path / "one.pack").write_bytes(page(0) + page(9))
    load_and_verify(page_map)  # the control: this image's page is right
    with PackStore(tmp_path) as packs, pytest.raises(MemoryDamaged, match="slot 1"):
        packs.verify("one")


def test_verify_can_leave_out_reading_pages(tmp_path: Path) -> None:
    page_map = Sample(pages=page(0) + page(2)).write(tmp_path)
    with PackStore(tmp_path) as packs:
        Image.load(page_map).verify(packs, pages="none")
        with pytest.raises(ValueError, match="'used' or 'none'"):
            Image.load(page_map).verify(packs, pages="some")
