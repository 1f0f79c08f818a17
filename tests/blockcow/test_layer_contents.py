"""Checksums and the check of frozen layers: every kind of damage is named."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import xxhash
from blockcow_qemu import MIB

from blockcow import BACKENDS, Backend, BlockError, Layer, LayerDamaged, Source, backend
from blockcow.contents import BLOCK, checksum, signature
from blockcow.names import NODE_NAME_MAX, checked_id, file_node, frozen_node
from blockcow.pools import PoolName


def plain(data: bytes) -> str:
    """The checksum as its description says, without holes or chunks."""
    total = 0
    for index, at in enumerate(range(0, len(data), BLOCK)):
        block = data[at : at + BLOCK]
        if any(block):
            total += xxhash.xxh3_128_intdigest(block, seed=index)
    return f"xxh3:{total % 2**128:032x}:{len(data)}"


@pytest.mark.parametrize("seed", range(10))
def test_checksum_does_not_depend_on_holes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([0, 1, BLOCK, 5 * MIB + 17, 9 * MIB])
    data = bytearray(size)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(size)
        for _ in range(rng.randrange(12) if size else 0):
            at = rng.randrange(size)
            piece = rng.randbytes(min(size - at, rng.randrange(1, 200_000)))
            data[at : at + len(piece)] = piece
            file.seek(at)
            file.write(piece)
    (tmp_path / "dense").write_bytes(data)
    assert checksum(sparse) == checksum(tmp_path / "dense") == plain(bytes(data))


def test_checksum_reports_progress(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (9 * MIB + 5))
    done: list[int] = []
    checksum(path, done.append)
    assert sum(done) == 9 * MIB + 5 and len(done) == 3


@pytest.fixture
def sealed_layer(disks: Backend, layers: Path, adopted: Layer) -> Layer:
    return disks.seal_layer(disks.clone([adopted], "top"))  # type: ignore[attr-defined,no-any-return]


def damaged(disks: Backend, layer: Layer, path: Path, *words: str, full: bool = False) -> None:
    with pytest.raises(LayerDamaged) as caught:
        disks.check(layer, full)
    assert caught.value.layer_id == layer.id and caught.value.path == path
    for word in (*words, str(path), layer.id):
        assert word in str(caught.value)


def test_flipped_bit(disks: Backend, layers: Path, sealed_layer: Layer) -> None:
    path = layers / "top.qcow2"
    data = bytearray(path.read_bytes())
    data[30] ^= 4
    path.write_bytes(data)
    damaged(disks, sealed_layer, path, "is damaged (its checksum differs)")


def test_flipped_bit_with_the_old_times_is_found_by_a_full_check(
    disks: Backend, layers: Path, sealed_layer: Layer
) -> None:
    path = layers / "top.qcow2"
    data = bytearray(path.read_bytes())
    data[30] ^= 4
    path.write_bytes(data)
    forged = Layer(**{**sealed_layer.__dict__, "signature": signature(path)})
    assert disks.check(forged, full=False) == forged
    damaged(disks, forged, path, "is damaged", full=True)


def test_truncation(disks: Backend, layers: Path, sealed_layer: Layer) -> None:
    os.truncate(layers / "top.qcow2", 200_000)
    damaged(disks, sealed_layer, layers / "top.qcow2", "is damaged")


def test_missing_file(disks: Backend, layers: Path, sealed_layer: Layer) -> None:
    (layers / "top.qcow2").unlink()
    damaged(disks, sealed_layer, layers / "top.qcow2", "is missing")
    with pytest.raises(LayerDamaged, match="is missing"):
        disks.blockdev([sealed_layer], "n")


def test_a_users_base_that_was_modified(disks: Backend, adopted: Layer, base: Source) -> None:
    with base.path.open("r+b") as file:
        file.write(b"oops")
    damaged(disks, adopted, base.path, "was modified since it was added", "do not write to it")


def test_a_touched_file_gets_its_signature_renewed(
    disks: Backend, adopted: Layer, base: Source
) -> None:
    os.utime(base.path)
    renewed = disks.check(adopted, full=False)
    assert renewed.signature == signature(base.path) != adopted.signature
    assert renewed.checksum == adopted.checksum
    assert disks.check(renewed, full=True) == renewed


def test_an_active_layer_has_nothing_to_check(disks: Backend, adopted: Layer) -> None:
    with pytest.raises(BlockError, match="not frozen yet"):
        disks.check(disks.clone([adopted], "a"), full=True)


def test_usage_counts_what_is_ours(disks: Backend, adopted: Layer, sealed_layer: Layer) -> None:
    assert disks.usage(adopted) == 0
    assert 0 < disks.usage(sealed_layer) <= 16384


@pytest.mark.parametrize("bad", ["", "../up", "a/b", ".hidden", "x" * 101, "a b", "-x", "a\n"])
def test_ids_that_are_no_file_names(disks: Backend, adopted: Layer, bad: str) -> None:
    with pytest.raises(BlockError, match="is not usable"):
        disks.clone([adopted], bad)
    with pytest.raises(BlockError, match="is not usable"):
        disks.files(bad)


def test_node_names_fit_and_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("1")
    first = frozen_node("x" * 100, path)
    assert first == frozen_node("x" * 100, path)
    assert frozen_node("x" * 100, path, "below") != first
    assert len(file_node(first)) <= NODE_NAME_MAX and len(file_node("n" * 31)) <= NODE_NAME_MAX
    other = tmp_path / "g"
    other.write_text("2")
    other.rename(path)
    assert frozen_node("x" * 100, path) != first
    assert checked_id("x" * 100)


class NoPools:
    """A catalog that knows of no pool."""

    def pool(self, pool_id: str) -> PoolName:
        raise BlockError(f"there is no pool {pool_id}")

    def transaction(self, pool_id: str) -> int:
        raise BlockError(f"there is no pool {pool_id}")

    def unfinished(self) -> bool:
        return False


def test_backends_by_name(layers: Path) -> None:
    for name in BACKENDS:
        assert backend(name, layers, layers, NoPools()).name == name
    with pytest.raises(BlockError, match="no disk backend 'zfs': choose one of qcow2, reflink"):
        backend("zfs", layers)


def test_qcow2_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend("qcow2", tmp_path).available() is None
    assert "not a directory" in str(backend("qcow2", tmp_path / "no").available())
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt install qemu-utils" in str(backend("qcow2", tmp_path).available())
