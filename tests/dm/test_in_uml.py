"""Runs the tests in `lab`, each file in a User-Mode Linux of its own: a real kernel with
device-mapper, and real guests in it where a file wants them.

`./scripts/test tests/dm -k dmthin` runs one file; $EPOCHS_LAB passes arguments on to the pytest
inside (`EPOCHS_LAB='-k story' ...`).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.laboratories import ROOT, must_pass, wishes

LAB = Path(__file__).parent / "lab"
FILES = sorted(LAB.glob("test_*.py"))
LIMIT = 2400  # seconds for one file

pytestmark = pytest.mark.dm


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_lab(file: Path) -> None:
    must_pass(file, "uml_run.py",
              ["--timeout", str(LIMIT), "--directory", str(ROOT), *wishes(file, "UML")],
              [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short",
               "--color=no", "-q", str(file), *shlex.split(os.environ.get("EPOCHS_LAB", ""))],
              "User-Mode Linux")
