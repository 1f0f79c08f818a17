"""Running a file of tests inside one of the laboratories, User-Mode Linux or Xen."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wishes(file: Path, constant: str) -> list[str]:
    """Options for its laboratory that a file asks for: its constant of that name, a list of
    strings."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == constant:
            return [str(word) for word in ast.literal_eval(node.value)]
    return []


def must_pass(file: Path, runner: str, options: list[str], inside: list[str], place: str) -> None:
    """Run ``inside`` (a Python with ``-m pytest`` and its arguments) through scripts/``runner``;
    all its tests pass, and in CI none is skipped. How many were left out is among pytest's
    warnings."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / runner), *options, "--", *inside],
        capture_output=True, text=True, check=False, env={**os.environ, "EPOCHS_IN_LAB": "1"})
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0, f"{file.name} failed in {place}"
    assert re.search(r"\d+ passed", done.stdout), "nothing was run"
    if left := re.search(r"(\d+) deselected", done.stdout.splitlines()[-1]):
        warnings.warn(f"{file.name}: {left[1]} tests were not wanted in this run", stacklevel=2)
    if os.environ.get("CI"):
        assert "skipped" not in done.stdout.splitlines()[-1], "a test was skipped"
