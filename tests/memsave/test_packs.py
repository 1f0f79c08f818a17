"""Pack files: made whole or not at all, private, dropped without a trace, checked when used."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from victim import Victim, contents

from memsave import PAGE, GuestMemory, Image, MemoryDamaged, MemsaveError, PackStore, WriteResult

Start = Callable[..., Victim]


def take(guest: GuestMemory, packs: PackStore, pack_id: str, base: Image,
         flat: bool | None = None) -> WriteResult:
    with guest.capture(trusted=False) as capture:
        capture.seal()
        return capture.write(base, None, packs, pack_id, flat=flat)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As a disk that is full after ``size`` bytes of each file: write(2) fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("limit", [0, 5 * PAGE, 40 * PAGE])
def test_a_pack_that_does_not_fit_leaves_nothing(start: Start, packs: PackStore, flat: bool,
                                                 limit: int) -> None:
    with start(main=64, other=4) as victim, victim.guest() as guest:
        victim.write(0, 1, 50)
        with file_size_limit(limit), pytest.raises(
                MemsaveError, match=f"pack full cannot be written to {packs.directory}: File too"):
            take(guest, packs, "full", Image.zero(victim.layout), flat)
        assert list(packs.directory.iterdir()) == []
        result = take(guest, packs, "full", Image.zero(victim.layout), flat)  # the control
        assert contents(result.image, packs) == victim.memory()


def test_no_pack_directory(start: Start, tmp_path: Path) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1)
        with pytest.raises(MemsaveError, match="No such file"):
            take(guest, PackStore(tmp_path / "none"), "p", Image.zero(victim.layout))


def test_files_are_private_and_named(start: Start, packs: PackStore, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with start() as victim, victim.guest() as guest:
            victim.write(0, 1, 3)
            image = take(guest, packs, "a1", Image.zero(victim.layout)).image
            image.save(tmp_path / "map")
    finally:
        os.umask(old)
    made = sorted(path.name for path in packs.directory.iterdir())
    assert made == ["a1.idx", "a1.pack"]
    for path in [*packs.final_files("a1"), tmp_path / "map"]:
        assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in packs.files("a1")] == ["a1.pack", "a1.pack.tmp", "a1.idx",
                                                         "a1.idx.tmp"]


def test_drop_takes_what_a_killed_writer_left(packs: PackStore) -> None:
    for path in packs.files("dead"):
        path.write_bytes(b"x")
    (packs.directory / "other.pack").write_bytes(b"x")
    packs.drop("dead")
    packs.drop("dead")
    assert [path.name for path in packs.directory.iterdir()] == ["other.pack"]


@pytest.mark.parametrize("pack_id", ["", "../x", "a/b", ".hidden", "x" * 65, "a.tmp", "a\n"])
def test_an_id_that_is_no_file_name_is_refused(packs: PackStore, pack_id: str) -> None:
    with pytest.raises(ValueError, match="not a pack id"):
        packs.pack_path(pack_id)


def test_a_signature_sees_every_touch(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 3)
        take(guest, packs, "p", Image.zero(victim.layout))
    seen = {packs.signature("p")}
    assert packs.signature("p") in seen  # reading changes nothing
    packs.verify("p")
    assert packs.signature("p") in seen
    flip(packs.pack_path("p"), 5)
    assert packs.signature("p") not in seen
    seen.add(packs.signature("p"))
    stat = packs.pack_path("p").stat()
    flip(packs.pack_path("p"), 5)
    os.utime(packs.pack_path("p"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert packs.signature("p") not in seen  # the change time cannot be set back
    packs.index_path("p").unlink()
    with pytest.raises(FileNotFoundError):
        packs.signature("p")


def test_damage_never_reaches_a_guest(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 20)
        flat = take(guest, packs, "flat", Image.zero(victim.layout)).image
        victim.write(8, 2)
        image = take(guest, packs, "delta", flat, flat=False).image
    flip(packs.pack_path("delta"), 100)
    with start(packs.pack_path("flat")) as fresh, fresh.guest() as guest:
        before = fresh.memory()
        with pytest.raises(MemoryDamaged, match=r"slot 0 of pack delta\.pack") as caught:
            guest.patch(image, packs, image.flat_view())
        assert caught.value.path == packs.pack_path("delta")
        assert fresh.memory() == before
        flip(packs.pack_path("delta"), 100)
        assert guest.patch(image, packs, image.flat_view()) == 1  # the control: mended


def test_damage_is_not_copied_into_a_new_flat_pack(start: Start, packs: PackStore) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 20)
        base = take(guest, packs, "flat", Image.zero(victim.layout)).image
    with start(packs.pack_path("flat")) as clone, clone.guest() as guest:
        clone.write(50, 1)  # pages 0 to 19 are read from the old pack, not from the guest
        flip(packs.pack_path("flat"), 3 * PAGE)
        with pytest.raises(MemoryDamaged, match=r"slot 3 of pack flat\.pack"):
            take(guest, packs, "next", base, flat=True)
        assert not any(path.exists() for path in packs.files("next"))
        flip(packs.pack_path("flat"), 3 * PAGE)
        result = take(guest, packs, "next", base, flat=True)
        assert contents(result.image, packs) == clone.memory()


@pytest.mark.parametrize("what", ["pack", "idx"])
def test_a_missing_pack_is_named_before_anything_is_done(start: Start, packs: PackStore,
                                                         what: str) -> None:
    with start() as victim, victim.guest() as guest:
        victim.write(0, 1, 20)
        image = take(guest, packs, "flat", Image.zero(victim.layout)).image
        packs.close()
        path = packs.directory / f"flat.{what}"
        path.unlink()
        for use in (lambda: image.verify(packs), lambda: image.digest(packs),
                    lambda: take(guest, packs, "next", image),
                    lambda: guest.patch(image, packs, image.flat_view())):
            with pytest.raises(MemoryDamaged, match=f"flat.{what} is missing") as caught:
                use()
            assert caught.value.path == path


def test_no_descriptor_is_left_open(start: Start, packs: PackStore) -> None:
    def descriptors() -> list[str]:
        return [str(path.readlink()) for path in sorted(Path("/proc/self/fd").iterdir())
                if path.is_symlink()]

    with start() as victim:
        before = len(descriptors())
        with PackStore(packs.directory) as store, victim.guest() as guest:
            victim.write(0, 1, 20)
            with guest.capture(False, packs.directory) as capture:
                capture.precopy(enough=0)
                capture.reserve()
                capture.seal()
                image = capture.write(Image.zero(victim.layout), None, store, "a").image
            image.verify(store)
        assert len(descriptors()) == before
