"""The table of commands in docs/json.md against what the commands print that need no guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from epochs.cli import COMMANDS
from tests.json_fields import printed, rows, top_level

WITHOUT_DOCUMENT = {"console", "completion"}  # they pass bytes on, and say so in docs/json.md


def test_every_command_has_its_row() -> None:
    assert set(rows()) == set(COMMANDS) - WITHOUT_DOCUMENT


@pytest.mark.parametrize("command", ["list", "log", "verify", "recover", "gc", "remove"])
def test_a_document_has_the_keys_of_its_row(tmp_path: Path, command: str) -> None:
    disk, store = tmp_path / "disk.img", tmp_path / "store"
    with disk.open("wb") as handle:
        handle.truncate(2**20)
    printed(store, "add", "web", "--memory", "64M", "--accel", "tcg", "--disk", f"root={disk}")
    found = printed(store, command, *(["web"] if command == "remove" else []))
    assert set(found) == top_level(rows()[command])


def test_keys_are_read_from_a_row() -> None:
    assert top_level("`a`, `b.c` (not `d`); `e`: list of `f`, `g`") == {"a", "b", "e"}
    assert top_level("`a`: list of Machine") != {"a", "b"}
