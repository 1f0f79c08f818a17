"""Runs the tests in `lab`, each file in dom0 of a Xen host of its own, real domUs beside it.

`./scripts/test tests/xen -k streams` runs one file; $EPOCHS_XEN_LAB passes arguments on to the
pytest inside. By default commands are killed at the points where a domain's state changes, and
tests marked `whole` are left out; `--all` does so at every point, runs those, too, and makes random
operations, `--operations` of them (lab/conftest.py): hours in all.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from tests.laboratories import ROOT, must_pass, wishes

LAB = Path(__file__).parent / "lab"
FILES = sorted(LAB.glob("test_*.py"))
LIMIT = 3600 if "EPOCHS_XEN_LAB" in os.environ else 1500  # seconds for one file

pytestmark = pytest.mark.xen


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_lab(file: Path) -> None:
    must_pass(file, "xen_run.py", ["--timeout", str(LIMIT), *wishes(file, "XEN")],
              ["/opt/epochs/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-rA",
               "--tb=short", "--color=no", "-q", str(file.relative_to(ROOT)),
               *shlex.split(os.environ.get("EPOCHS_XEN_LAB", ""))],
              "Xen's dom0")
