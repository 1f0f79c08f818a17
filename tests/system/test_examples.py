"""examples/pytest-postgresql, as its README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epochs import Store

from .conftest import required
from .guest import assert_tidy

pytestmark = [pytest.mark.guest, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def test_pytest_postgresql(tmp_path: Path) -> None:
    suite = shutil.copytree(ROOT / "examples" / "pytest-postgresql", tmp_path / "suite")
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("PYTEST_")}
    environment |= {"EPOCHS_STORE": str(tmp_path / "store"),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with Store(tmp_path / "store") as store:
        try:
            subprocess.run([suite / "prepare", required("EPOCHS_DEBIAN")], env=environment,
                           check=True, timeout=300)
            done = subprocess.run(
                ["pytest", "-p", "no:cacheprovider", "-v", "-n", "2", "."], cwd=suite,
                env=environment, capture_output=True, text=True, check=False, timeout=400)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "6 passed" in done.stdout
            assert "resets: median" in done.stdout
            assert_tidy(store)
            assert [one.name for one in store.machines()] == ["web"]
        finally:
            for machine in store.machines():
                machine.remove(force=True, with_epochs=True)
