"""docs/json.md against what commands print."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from epochs.cli import cli, failures

ROOT = Path(__file__).resolve().parents[1]


def fields(document: object, prefix: str = "") -> set[str]:
    """Dotted paths of all keys; lists count as their items."""
    if isinstance(document, dict):
        return {path for key, value in document.items()
                for path in {f"{prefix}{key}"} | fields(value, f"{prefix}{key}.")}
    if isinstance(document, list):
        return {path for item in document for path in fields(item, prefix)}
    return set()


def documented(section: str) -> set[str]:
    """Field names in the table under a heading of docs/json.md."""
    text = (ROOT / "docs" / "json.md").read_text()
    part = text.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))


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
    """The document of a command, run in this process."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        failures.run(cli, ["--json", "--store", str(store), *arguments])
    return json.loads(shown.getvalue())
