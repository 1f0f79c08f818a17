"""Capture of a real process: what is captured is its memory, and only what was written costs."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from victim import Victim, contents

from memsave import (
    PAGE,
    Block,
    Capture,
    GuestMemory,
    Image,
    Layout,
    MemsaveError,
    PackStore,
    WriteResult,
    diff,
)

Start = Callable[..., Victim]
METHODS = ("userfaultfd", "anonymous", "pagemap")


def take(guest: GuestMemory, packs: PackStore, pack_id: str, base: Image, *,
         parent: Image | None = None, trusted: bool = False, flat: bool | None = None,
         precopy: bool = True) -> tuple[WriteResult, Capture]:
    with guest.capture(trusted) as capture:
        if precopy:
            capture.precopy(enough=0)
        capture.reserve()
        capture.seal()
        return capture.write(base, parent, packs, pack_id, flat=flat), capture


@pytest.mark.parametrize("method", METHODS)
def test_captured_restored_and_equal(start: Start, packs: PackStore, method: str) -> None:
    with start() as victim, victim.guest(method) as guest:
        victim.write(3, 7, 100)
        victim.write(520, 8, 4)
        victim.do("k", 300)
        first, _ = take(guest, packs, "first", Image.zero(victim.layout))
        assert first.flat and first.image.flat == "first"
        assert (first.new_pages, first.changed_pages, first.zero_pages) == (105, 105, 0)
        assert contents(first.image, packs) == victim.memory()
        victim.write(5, 99)
        victim.do("z", 6, 2)
        victim.write(530, 9)
        second, capture = take(guest, packs, "second", first.image, parent=first.image,
                               trusted=True)
        assert not second.flat and second.pack_id == "second"
        assert (second.new_pages, second.changed_pages, second.zero_pages) == (2, 4, 2)
        if method == "userfaultfd":
            assert capture.precopied_pages + capture.sealed_pages == 4
        memory = victim.memory()
        assert contents(second.image, packs) == memory
        second.image.verify(packs)
    with start(packs.pack_path("first")) as fresh, fresh.guest(method) as guest:
        fresh.write(515, 1)  # contents of its own, as a hypervisor's ROM
        assert guest.patch(second.image, packs, second.image.flat_view()) == 3 + 5 + 1
        assert fresh.memory() == memory


def test_a_clone_that_was_patched_is_captured_right(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 50)
        first, _ = take(guest, packs, "first", Image.zero(victim.layout))
        victim.write(10, 2, 5)
        second, _ = take(guest, packs, "second", first.image, trusted=True)
    with start(packs.pack_path("first")) as fresh, fresh.guest() as guest:
        guest.patch(second.image, packs, second.image.flat_view())
        fresh.write(12, 1)  # back to what the first image had
        fresh.write(40, 3)
        third, _ = take(guest, packs, "third", second.image, parent=first.image)
        assert contents(third.image, packs) == fresh.memory()
        assert third.new_pages == 1  # page 12 is the parent's
        assert third.changed_pages == 2


IS_WRITTEN, IS_FILE, IS_PRESENT = 1 << 1, 1 << 2, 1 << 3  # linux/fs.h
SCAN = 0xC0606610  # PAGEMAP_SCAN


def unprotected_of_the_file(victim: Victim) -> int:
    """Pages of block 0 that are the file's and that a look for written pages comes upon, asked of
    the kernel by another way than the one under test."""
    regions = (ctypes.c_uint64 * (3 * 1024))()
    start = victim.addresses["ram"]
    mask = IS_WRITTEN | IS_FILE | IS_PRESENT
    question = bytearray(struct.pack("=12Q", 96, 0, start, start + victim.layout.blocks[0].size, 0,
                                     ctypes.addressof(regions), 1024, 0, 0, mask, 0, mask))
    with Path(f"/proc/{victim.pid}/pagemap").open("rb") as pagemap:
        found = fcntl.ioctl(pagemap, SCAN, question)
    return sum(regions[3 * n + 1] - regions[3 * n] for n in range(found)) // PAGE


def test_pages_that_were_only_read_are_passed_by(start: Start, packs: PackStore) -> None:
    """They are protected before the pause, and whatever was written is found nevertheless."""
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 300)
        first, _ = take(guest, packs, "first", Image.zero(victim.layout))
    with start(packs.pack_path("first")) as clone, clone.guest("userfaultfd") as guest:
        clone.memory()  # reads all of it
        assert unprotected_of_the_file(clone) == 512, "the control"
        clone.write(7, 5, 20)
        second, capture = take(guest, packs, "second", first.image)
        assert unprotected_of_the_file(clone) == 0
        assert capture.precopied_pages + capture.sealed_pages == 20
        clone.write(20, 6, 20)  # pages written before, and pages that are protected and the file's
        third, capture = take(guest, packs, "third", second.image, trusted=True)
        assert capture.precopied_pages + capture.sealed_pages == 20
        assert contents(third.image, packs) == clone.memory()


def test_only_written_pages_are_collected_again(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 200)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        quiet, capture = take(guest, packs, "quiet", image, trusted=True)
        assert (capture.precopied_pages, capture.sealed_pages, quiet.pack_id) == (0, 0, None)
        assert not packs.pack_path("quiet").exists()
        victim.do("t", 0, 576)  # reading is not writing
        victim.do("k", 17)  # the kernel writes for it
        victim.write(450, 5)  # never touched before
        again, capture = take(guest, packs, "again", image, trusted=True, precopy=False)
        assert capture.sealed_pages == again.new_pages == 2
        assert contents(again.image, packs) == victim.memory()


@pytest.mark.parametrize("regions", [1, 511, 512, 513, 2047, 2048, 2049, 3000])
def test_every_page_is_found_once(start: Start, packs: PackStore, regions: int) -> None:
    """Where there are more regions than fit into one piece of the kernel's walk, its walk_end is
    that of an earlier piece: going on from there found the tail a second time, and an older copy of
    a page could win over a newer one."""
    with start(main=8192) as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 6100)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.do("e", 0, regions, 3)  # every other page
        with guest.capture(trusted=True) as capture:
            assert capture._dirty().pages == regions
            capture.precopy(enough=0, rounds=1)
            assert capture.precopied_pages == regions
            capture.seal()
            assert capture.sealed_pages == 0 and capture.untouched()
            done = capture.write(image, image, packs, "second")
        assert done.new_pages == regions
        assert contents(done.image, packs) == victim.memory()


def test_pages_written_during_a_precopy_win(start: Start, packs: PackStore) -> None:
    """With a guest that never rests: what is stored is what its memory holds in the pause."""
    with start(main=8192) as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 6100)
        image = Image.zero(victim.layout)
        for number in range(8):
            victim.begin("e", 0, 3000, 100 + number, 3)  # three times over, each with other bytes
            with guest.capture(trusted=number > 0) as capture:
                capture.precopy(enough=0)
                victim.done()
                capture.seal()
                image = capture.write(image, None, packs, f"p{number}").image
            assert contents(image, packs) == victim.memory(), number
            image.verify(packs)


def test_an_untrusted_capture_sees_every_anonymous_page(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 200)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.write(5, 2)
        with guest.capture(trusted=True) as lost:
            lost.seal()  # collected, protected, and never written: as killed in between
        # The control: who trusts the tracking now misses page 5.
        wrong, _ = take(guest, packs, "wrong", image, trusted=True)
        assert contents(wrong.image, packs) != victim.memory()
        right, capture = take(guest, packs, "right", image, trusted=False, precopy=False)
        assert capture.sealed_pages == 200
        assert right.new_pages == 1
        assert contents(right.image, packs) == victim.memory()


def test_tracking_survives_the_capturing_process(start: Start, packs: PackStore) -> None:
    with start() as victim:
        with victim.guest("userfaultfd") as guest:
            victim.write(0, 1, 20)
            image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.write(3, 2)
        with victim.guest("userfaultfd") as guest:
            _, capture = take(guest, packs, "second", image, trusted=True, precopy=False)
            assert capture.sealed_pages == 1


def test_precopied_pages_that_are_written_again_are_taken_again(start: Start,
                                                                packs: PackStore) -> None:
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 50)
        with guest.capture(trusted=False, spool=packs.directory) as capture:
            capture.precopy(enough=0)
            assert capture.precopied_pages == 50
            victim.write(7, 2)
            victim.write(60, 2)
            capture.reserve()
            victim.write(100, 3, 300)  # more than reserve could foresee is right, too
            capture.seal()
            assert capture.sealed_pages == 302
            result = capture.write(Image.zero(victim.layout), None, packs, "first")
        assert result.new_pages == 351
        assert contents(result.image, packs) == victim.memory()


def test_without_the_library_the_superset_is_taken(start: Start, packs: PackStore) -> None:
    with start(preload=False) as victim, victim.guest() as guest:
        assert guest.method == "anonymous"
        with pytest.raises(MemsaveError, match="no usable userfaultfd"):
            victim.guest("userfaultfd")
        victim.write(0, 1, 9)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.write(1, 2)
        second, capture = take(guest, packs, "second", image, trusted=True)
        assert (capture.sealed_pages, second.new_pages) == (9, 1)
        assert contents(second.image, packs) == victim.memory()


def test_a_kernel_without_pagemap_scan(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as victim:
        with victim.guest() as guest:
            assert guest.method == "userfaultfd"
        monkeypatch.setenv("MEMSAVE_NO_PAGEMAP_SCAN", "1")
        with victim.guest() as guest:
            assert guest.method == "anonymous"


def test_a_closed_tracker_descriptor_means_superset(start: Start) -> None:
    with start() as victim:
        victim.do("x", 1000)
        with victim.guest() as guest:
            assert guest.method == "anonymous"


def test_the_library_hides_itself_from_children(start: Start) -> None:
    with start() as victim:
        assert victim.environment == "clean"


def test_pages_only_read_cost_nothing(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.do("t", 0, 576)
        result, capture = take(guest, packs, "first", Image.zero(victim.layout), flat=False,
                               precopy=False)
        assert (capture.sealed_pages, result.changed_pages) == (0, 0)
        assert result.pack_id is None and result.image.resident == 0


def test_zero_pages_are_not_stored(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 20)
        victim.do("z", 5, 10)
        first, _ = take(guest, packs, "first", Image.zero(victim.layout))
        assert (first.new_pages, first.image.resident) == (10, 10)
        assert contents(first.image, packs) == victim.memory()


def test_paged_out_pages_are_captured(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 20)
        victim.do("o", 4)
        first, _ = take(guest, packs, "first", Image.zero(victim.layout))
        assert contents(first.image, packs) == victim.memory()


def test_far_from_the_flat_pack_a_new_one_is_made(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 100)
        victim.write(512, 1, 8)
        first = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.write(0, 2, 20)
        near = take(guest, packs, "near", first, trusted=True)[0]
        assert not near.flat and near.image.flat == "first"
        victim.write(20, 2, 20)
        far = take(guest, packs, "far", near.image, trusted=True)[0]
        assert far.flat and far.image.packs == {"far"}
        assert contents(far.image, packs) == victim.memory()
        assert far.new_pages == 20
        assert packs.pack_path("far").stat().st_size == victim.layout.size
        assert packs.usage("far") < victim.layout.size
        packs.drop("first")
        packs.drop("near")
        far.image.verify(packs)


def test_forced_and_forbidden_flat_packs(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 10)
        zero = Image.zero(victim.layout)
        delta = take(guest, packs, "delta", zero, flat=False)[0]
        assert delta.image.flat is None
        with pytest.raises(MemsaveError, match="no flat pack"):
            delta.image.flat_view()
        flat = take(guest, packs, "flat", zero, flat=True)[0]
        assert flat.image.digest(packs) == delta.image.digest(packs)
        assert diff(flat.image, delta.image, packs) == []
        victim.write(0, 2, 2)
        victim.write(513, 2)
        other = take(guest, packs, "other", flat.image, flat=False)[0].image
        assert diff(flat.image, other, packs) == [("ram", 0, 2), ("vga.vram", 1, 1)]
        assert other.digest(packs) != flat.image.digest(packs)


def test_a_blank_guest_gets_a_flat_pack_to_map(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        result, _ = take(guest, packs, "blank", Image.zero(victim.layout))
        assert result.flat and result.image.resident == 0
        assert packs.pack_path("blank").stat().st_size == victim.layout.size
        result.image.verify(packs)


def test_a_killed_process_is_an_error(start: Start) -> None:
    victim = start()
    with victim.guest() as guest, guest.capture(trusted=False) as capture:
        victim.write(0, 1, 10)
        capture.reserve()
        victim.kill()
        with pytest.raises(MemsaveError, match=rf"process {victim.pid}"):
            capture.seal()
    with pytest.raises(MemsaveError, match="cannot be inspected"):
        victim.guest()


def test_steps_out_of_order_are_refused(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        capture = guest.capture(trusted=False)
        with pytest.raises(MemsaveError, match="not sealed yet"):
            capture.write(Image.zero(victim.layout), None, packs, "x")
        capture.seal()
        for step in (capture.precopy, capture.reserve):
            with pytest.raises(MemsaveError, match="sealed already"):
                step()
        capture.close()
        capture.close()
        with pytest.raises(MemsaveError, match="closed"):
            capture.seal()
        with pytest.raises(ValueError, match="tracking method"):
            victim.guest("soft-dirty")


@pytest.mark.parametrize("trusted", [True, False])
def test_sealing_again_adds_what_was_written_since(start: Start, packs: PackStore,
                                                   trusted: bool) -> None:
    with start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 20)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        victim.write(3, 2)
        with guest.capture(trusted) as capture:
            capture.reserve()
            capture.seal()
            assert capture.exact and capture.untouched()
            victim.write(3, 3)
            victim.write(7, 3)
            victim.do("z", 8)
            victim.write(515, 4)
            assert not capture.untouched()
            capture.seal()
            assert capture.untouched()
            again = capture.write(image, None, packs, "again")
        assert contents(again.image, packs) == victim.memory()
        assert again.changed_pages == 4


def test_sealing_again_without_exact_tracking(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest("pagemap") as guest:
        victim.write(0, 1, 20)
        with guest.capture(False) as capture:
            capture.seal()
            victim.write(3, 3)
            with pytest.raises(MemsaveError, match="nobody knows"):
                capture.untouched()
            capture.seal()
            done = capture.write(Image.zero(victim.layout), None, packs, "p")
        assert contents(done.image, packs) == victim.memory()


@pytest.mark.parametrize("block", [0, 1])
def test_shared_memory_is_refused(tmp_path: Path, block: int) -> None:
    """A scan would find nothing in it, and restoring would write into what others use."""
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(PAGE)
        private = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        odd = (mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE) if block else
               mmap.mmap(-1, PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
        areas = [private, odd] if block else [odd, private]
        held = [(ctypes.c_char * PAGE).from_buffer(area) for area in areas]
        layout = Layout((Block("ram", PAGE), Block("other", PAGE)))
        addresses = {"ram": ctypes.addressof(held[0]), "other": ctypes.addressof(held[1])}
        with pytest.raises(MemsaveError, match=f"'{layout.blocks[block].name}' of process"):
            GuestMemory(os.getpid(), layout, addresses)
        if block:  # a private file is what block 0 is made of: the control
            swapped = {"ram": addresses["other"], "other": addresses["ram"]}
            GuestMemory(os.getpid(), layout, swapped).close()
        del held
        private.close()
        odd.close()


def test_a_pack_is_never_written_twice(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1)
        image = take(guest, packs, "first", Image.zero(victim.layout))[0].image
        before = packs.signature("first")
        for base in (image, Image.zero(victim.layout)):
            with pytest.raises(MemsaveError, match="never changed"):
                take(guest, packs, "first", base)
        assert packs.signature("first") == before


def test_another_layout_is_refused(start: Start, packs: PackStore, tmp_path: Path) -> None:
    with start() as victim, start(tmp_path / "small", main=16) as small:
        other = Image.zero(small.layout)
        with victim.guest() as guest:
            with pytest.raises(MemsaveError, match="base image has another memory layout"):
                take(guest, packs, "x", other)
            with pytest.raises(MemsaveError, match="parent image has another memory layout"):
                take(guest, packs, "x", Image.zero(victim.layout), parent=other)
            with pytest.raises(MemsaveError, match="image has another memory layout"):
                guest.patch(other, packs, other)
        with pytest.raises(MemsaveError, match="different layouts"):
            diff(other, Image.zero(victim.layout), packs)
    assert list(packs.directory.iterdir()) == []


def test_progress_is_told(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest, guest.capture(trusted=False) as capture:
        victim.write(0, 1, 10)
        capture.seal()
        seen: list[tuple[int, int]] = []
        capture.write(Image.zero(victim.layout), None, packs, "p",
                      progress=lambda done, total: seen.append((done, total)))
        assert seen == [(10, 10)]


STEPS = st.lists(st.tuples(st.sampled_from("wzkt"), st.integers(0, 90), st.integers(1, 6),
                           st.integers(0, 2)), max_size=8)


@settings(max_examples=15, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.tuples(STEPS, st.booleans(), st.sampled_from([None, True, False])),
                       min_size=1, max_size=5), method=st.sampled_from(METHODS))
def test_after_random_writes_the_image_is_the_memory(
        program: Path, tmp_path_factory: pytest.TempPathFactory,
        rounds: list[tuple[list[tuple[str, int, int, int]], bool, bool | None]],
        method: str) -> None:
    directory = tmp_path_factory.mktemp("random")
    with Victim(program, directory / "blank", 64, 32) as victim, PackStore(directory) as packs, \
            victim.guest(method) as guest:
        image, parent, trusted = Image.zero(victim.layout), None, False
        for number, (steps, precopy, flat) in enumerate(rounds):
            for what, page, count, seed in steps:
                victim.do(what, page, 1 if what == "k" else min(count, 96 - page), seed)
            result, _ = take(guest, packs, f"p{number}", image, parent=parent, trusted=trusted,
                             flat=flat, precopy=precopy)
            parent, image, trusted = image, result.image, True
            assert contents(image, packs) == victim.memory()
            image.verify(packs)
            image.save(directory / "map")
            assert Image.load(directory / "map").to_bytes() == image.to_bytes()
        if image.flat is None:
            return
        memory = victim.memory()
        with Victim(program, packs.pack_path(image.flat), 64, 32) as fresh, \
                fresh.guest() as target:
            target.patch(image, packs, image.flat_view())
            assert fresh.memory() == memory
