"""Folding: an image never needs many packs, whatever came before it, and old images stay whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from victim import Victim, contents

from memsave import Image, MemoryDamaged, PackStore, WriteResult, diff, folding
from memsave.verifier import verify
from memsave.writing import SPARE

Start = Callable[..., Victim]


def after(live: dict[int, int], new: int) -> tuple[dict[int, int], int]:
    """Packs and the size of the new one once a plan was carried out."""
    folded = folding.plan(live, new)
    return ({pack: pages for pack, pages in live.items() if pack not in folded},
            new + sum(live[pack] for pack in folded))


@given(st.lists(st.integers(1, 5000), max_size=400))
def test_the_number_of_packs_is_bounded(creates: list[int]) -> None:
    live: dict[int, int] = {}
    copied = total = 0
    for number, new in enumerate(creates):
        live, size = after(live, new)
        live[number] = size
        copied += size - new
        total += new
        assert sum(live.values()) == total, "no page is lost"
        assert len(live) <= folding.most(total)
    tiers = len(oct(max(total, 1))) - 2
    assert copied <= total * tiers, "a page is copied at most once a tier"


def test_a_plan_leaves_alone_what_is_few_or_nothing() -> None:
    assert folding.plan({}, 0) == frozenset()
    assert folding.plan({n: 1 for n in range(6)}, 1) == frozenset()
    assert folding.plan({n: 1 for n in range(7)}, 1) == frozenset(range(7))
    assert folding.plan({n: 8 ** n for n in range(9)}, 1) == frozenset()
    assert folding.plan({n: 1 for n in range(8)}, 0) == frozenset(range(8)), "also without a page"
    full_above = {**{n: 1 for n in range(7)}, **{10 + n: 8 for n in range(7)}}
    assert folding.plan(full_above, 1) == frozenset(full_above), "what is folded fills a tier"


def test_images_stay_whole_and_need_few_packs(start: Start, packs: PackStore, tmp_path) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 400)
        image, kept, folds = Image.zero(victim.layout), [], 0
        for number in range(60):
            victim.write((number * 7) % 390, number + 2, 1 + number % 3)
            victim.write(512 + number % 8, number)
            with guest.capture(trusted=number > 0) as capture:
                capture.seal()
                done = capture.write(image, image, packs, f"p{number:02}",
                                     flat=None if number == 0 else False)
            image = done.image
            folds += done.folded_pages > 0
            assert len(image.packs) <= 1 + folding.most(image.resident)
            kept.append((image, victim.memory()))
        assert folds > 3
        assert len(image.packs) <= 1 + 2 * 7, "some 100 pages beside the flat pack: two tiers"
    for number, (one, memory) in enumerate(kept):
        assert contents(one, packs) == memory
        one.verify(packs)
        one.save(tmp_path / f"{number}.map")
        verify(tmp_path / f"{number}.map", packs.directory)
    for pack in {path.stem for path in packs.directory.glob("*.pack")} - set(image.packs):
        packs.drop(pack)
    image.verify(packs)
    assert contents(image, packs) == kept[-1][1], "nothing it needs was in a pack it does not name"


def test_a_nearly_full_store_takes_what_fits(start: Start, packs: PackStore,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding and flat packs can wait; what was written cannot."""
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 100)

        def create(image: Image, number: int) -> WriteResult:
            with guest.capture(trusted=number > 0) as capture:
                capture.seal()
                return capture.write(image, None, packs, f"p{number}")

        image = create(Image.zero(victim.layout), 0).image
        monkeypatch.setattr(PackStore, "room", lambda self: SPARE)
        for number in range(1, 12):
            victim.write(number, number + 2)
            done = create(image, number)
            image = done.image
            assert (done.new_pages, done.folded_pages, done.flat) == (1, 0, False)
        victim.write(0, 77, 90)
        done = create(image, 12)
        assert not done.flat
        monkeypatch.undo()
        victim.write(0, 78)
        done = create(done.image, 13)
        assert done.flat, "the control: there is room again"
        assert contents(done.image, packs) == victim.memory()


def test_a_comparison_does_not_believe_damaged_pages(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 10)
        images = []
        for number in range(2):
            with guest.capture(trusted=False) as capture:
                capture.seal()
                images.append(capture.write(Image.zero(victim.layout), None, packs, f"p{number}",
                                            flat=False).image)
        assert diff(*images, packs) == []
        bad = packs.pack_path("p1")
        whole = bad.read_bytes()
        bad.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        with pytest.raises(MemoryDamaged, match=r"slot 1 of pack p1\.pack"):
            diff(*images, packs)


def test_damage_is_not_folded_under_a_fresh_checksum(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 100)
        image = Image.zero(victim.layout)
        for number in range(8):
            victim.write(number, number + 2)
            with guest.capture(trusted=number > 0) as capture:
                capture.seal()
                image = capture.write(image, None, packs, f"p{number}",
                                      flat=None if number == 0 else False).image
        assert len(image.packs) == 8
        bad = packs.pack_path("p3")
        whole = bad.read_bytes()
        bad.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        victim.write(50, 99)
        with guest.capture(trusted=True) as capture:
            capture.seal()
            with pytest.raises(MemoryDamaged, match=r"slot 0 of pack p3\.pack"):
                capture.write(image, None, packs, "next", flat=False)
            assert not packs.exists("next")
            bad.write_bytes(whole)
            mended = capture.write(image, None, packs, "next", flat=False)  # the control
        assert mended.folded_pages == 7
        assert mended.image.packs == {"p0", "next"}
        assert contents(mended.image, packs) == victim.memory()
