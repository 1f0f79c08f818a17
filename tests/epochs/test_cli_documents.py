"""The table of commands in docs/json.md against what the commands print that need no guest."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from epochs.cli import COMMANDS, cli, failures

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_DOCUMENT = {"console", "completion"}  # they pass bytes on, and say so in docs/json.md


def rows() -> dict[str, str]:
    """Command to the second cell of its row."""
    text = (ROOT / "docs" / "json.md").read_text().split("\n## ", 1)[0]
    found = re.findall(r"^\| (`[a-z`, -]+`) \| (.*) \|$", text, re.MULTILINE)
    return {name: cell for names, cell in found for name in re.findall(r"`([\w-]+)`", names)}


def top_level(cell: str) -> set[str]:
    """The document's own keys: what stands in front of any colon, bracket or dot."""
    outside = re.sub(r"\([^)]*\)", "", cell)
    outside = re.sub(r": list of [^;]*", "", outside)
    return {name.split(".")[0] for name in re.findall(r"`([\w.]+)`", outside)}


def printed(store: Path, *arguments: str) -> Any:
    shown = io.StringIO()
    with redirect_stdout(shown):
        failures.run(cli, ["--json", "--store", str(store), *arguments])
    return json.loads(shown.getvalue())


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
