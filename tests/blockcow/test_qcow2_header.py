"""The overlay header that we write, against qemu-img and its specification."""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path

import pytest
from blockcow_qemu import tool

from blockcow import BlockError
from blockcow.qcow2_header import CLUSTER, MAX_SIZE, create_overlay, file_length, read_overlay

SIZES = [512, 1024, 1 << 20, (1 << 30) - 512, 1 << 30, (1 << 30) + 512, 10 << 30, 1 << 40,
         (8 << 40) - 512, 8 << 40, 16 << 40]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_qemu_img_finds_no_error_and_reads_back_what_was_asked(tmp_path: Path, size: int) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "o.qcow2"
    with base.open("wb") as file:
        file.truncate(min(size, 8 << 40))
    create_overlay(path, size, "base.raw", "raw")
    tool("qemu-img", "check", path)
    said = json.loads(tool("qemu-img", "info", "--output=json", path))
    assert said["virtual-size"] == size
    assert said["backing-filename"] == "base.raw" and said["backing-filename-format"] == "raw"
    assert said["cluster-size"] == CLUSTER
    special = said["format-specific"]["data"]
    assert special["extended-l2"] and not special["lazy-refcounts"] and special["compat"] == "1.1"
    assert path.stat().st_size == file_length(size)
    assert path.stat().st_blocks * 512 <= 16384
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    overlay = read_overlay(path)
    assert overlay is not None and overlay.empty and overlay.clean and overlay.size == size
    tool("qemu-io", "-c", f"write -P 7 {size - 512} 512", "-c", f"read -P 7 {size - 512} 512",
         "-c", "write -P 6 0 512", path)  # fmt: skip
    tool("qemu-img", "check", path)
    written = read_overlay(path)
    assert written is not None and not written.empty


def test_the_octets_are_those_of_the_table_in_docs_layers(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    create_overlay(path, 3 << 30, "b.qcow2", "qcow2")
    data = path.read_bytes()
    expected = {
        0: struct.pack(">II", 0x514649FB, 3),
        8: struct.pack(">QI", 128, 7),
        20: struct.pack(">IQI", 17, 3 << 30, 0),
        36: struct.pack(">IQ", 3, 3 * CLUSTER),
        48: struct.pack(">QI", CLUSTER, 1),
        60: struct.pack(">IQ", 0, 0),
        72: struct.pack(">QQQ", 16, 0, 0),
        96: struct.pack(">II", 4, 104),
        104: struct.pack(">II", 0xE2792ACA, 5) + b"qcow2\0\0\0",
        120: bytes(8),
        128: b"b.qcow2",
        CLUSTER: struct.pack(">Q", 2 * CLUSTER),
        2 * CLUSTER: struct.pack(">HHHH", 1, 1, 1, 1),
    }
    for offset, octets in expected.items():
        assert data[offset : offset + len(octets)] == octets, offset
        data = data[:offset] + bytes(len(octets)) + data[offset + len(octets) :]
    assert not any(data) and len(data) == 4 * CLUSTER


@pytest.mark.parametrize("size", [0, -512, 511, 513, MAX_SIZE + 512])
def test_sizes_that_cannot_be(tmp_path: Path, size: int) -> None:
    with pytest.raises(BlockError, match="cannot be an overlay"):
        create_overlay(tmp_path / "o", size, "b", "raw")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    create_overlay(tmp_path / "fits", 512, "b" * 1023, "raw")
    assert json.loads(tool("qemu-img", "info", "--output=json", tmp_path / "fits"))
    with pytest.raises(BlockError, match="too long for qcow2"):
        create_overlay(tmp_path / "o", 512, "b" * 1024, "raw")


def test_an_existing_file_stays(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    with pytest.raises(BlockError, match="exists already"):
        create_overlay(tmp_path / "o", 512, "b", "raw")
    assert (tmp_path / "o").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_every_truncation_and_flipped_length_is_read_without_harm(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    create_overlay(path, 1 << 30, "b.qcow2", "qcow2")
    whole = path.read_bytes()
    for length in range(160):
        path.write_bytes(whole[:length])
        assert read_overlay(path) is None
    for offset in range(0, 128, 4):
        damaged = whole[:offset] + b"\xff\xff\xff\xff" + whole[offset + 4 :]
        path.write_bytes(damaged)
        read_overlay(path)
