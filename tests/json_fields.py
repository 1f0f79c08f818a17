"""docs/json.md against what commands print."""

from __future__ import annotations

import re
from pathlib import Path

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
