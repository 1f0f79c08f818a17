"""Runs the tests in `lab`, each file in dom0 of a Xen host of its own, real domUs beside it.

`./scripts/test tests/xen -k streams` runs one file; $EPOCHS_XEN_LAB passes arguments on to the
pytest inside.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dm.test_in_uml import wishes

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).parent / "lab"
FILES = sorted(LAB.glob("test_*.py"))
LIMIT = 1500  # seconds for one file

pytestmark = pytest.mark.xen


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_lab(file: Path) -> None:
    inside = ["/opt/epochs/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-rA",
              "--tb=short", "--color=no", "-q", str(file.relative_to(ROOT)),
              *shlex.split(os.environ.get("EPOCHS_XEN_LAB", ""))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "xen_run.py"), "--timeout", str(LIMIT),
         *wishes(file, "XEN"), "--", *inside],
        capture_output=True, text=True, check=False)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0, f"{file.name} failed in Xen's dom0"
    assert re.search(r"\d+ passed", done.stdout), "nothing was run"
    if os.environ.get("CI"):
        assert "skipped" not in done.stdout.splitlines()[-1], "a test was skipped"
