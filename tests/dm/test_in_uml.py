"""Runs the tests in `lab`, each file in a User-Mode Linux of its own: a real kernel with
device-mapper, and real guests in it where a file wants them.

`./scripts/test tests/dm -k dmthin` runs one file; $EPOCHS_LAB passes arguments on to the pytest
inside (`EPOCHS_LAB='-k story' ...`).
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).parent / "lab"
FILES = sorted(LAB.glob("test_*.py"))
LIMIT = 2400  # seconds for one file

pytestmark = pytest.mark.dm


def wishes(file: Path, constant: str = "UML") -> list[str]:
    """Options for its laboratory that a file asks for: its constant UML, a list of strings."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == constant:
            return [str(word) for word in ast.literal_eval(node.value)]
    return []


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_lab(file: Path) -> None:
    inside = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short",
              "--color=no", "-q", str(file), *shlex.split(os.environ.get("EPOCHS_LAB", ""))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "uml_run.py"), "--timeout", str(LIMIT),
         "--directory", str(ROOT), *wishes(file), "--", *inside],
        capture_output=True, text=True, check=False, env={**os.environ, "EPOCHS_IN_UML": "1"})
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0, f"{file.name} failed in User-Mode Linux"
    assert re.search(r"\d+ passed", done.stdout), "nothing was run"
    if os.environ.get("CI"):
        assert "skipped" not in done.stdout.splitlines()[-1], "a test was skipped"
