"""docs/hazards.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def missing(text: str) -> list[str]:
    """Tests named in a text, as FILE::NAME, that are not there."""
    return [f"{file}::{name}" for file, name in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", text)
            if not (ROOT / file).is_file()
            or not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)]


def test_the_tests_of_the_table_are_there() -> None:
    text = (ROOT / "docs" / "hazards.md").read_text()
    assert text.count("::test_") > 10
    assert missing(text) == []


def test_one_that_is_not_there_is_seen() -> None:
    gone = "`tests/epochs/test_hazards.py::test_of_nothing` `tests/epochs/no.py::test_x`"
    assert len(missing(gone)) == 2


def test_every_row_is_whole() -> None:
    """Four cells; and what is called covered names a test."""
    lines = [line for line in (ROOT / "docs" / "hazards.md").read_text().splitlines()
             if line.startswith("| ")][1:]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if set("".join(cells)) == {"-", " "}:
            continue
        assert len(cells) == 4, line
        assert "::test_" in cells[2] or not cells[3].startswith("covered"), line
