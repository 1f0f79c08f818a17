"""Resets in a row through the pytest plugin: what each costs, in one process and with two workers.

Run by `scripts/bench --resets`. Each test finds a nonce in RAM as at the epoch, and spoils it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from bench_run import ctl, ready

from epochs import Store
from epochs.pytest_plugin import summary

SUITE = """
    import pytest

    def ctl(machine, *words):
        done = machine.exec(["/bin/witness-ctl", *words], timeout=60)
        assert done.status == 0, done
        return done.stdout.decode().strip()

    @pytest.mark.epoch("web@ready")
    @pytest.mark.parametrize("number", range({count}))
    def test_reset(epochs_machine, number):
        assert ctl(epochs_machine, "nonce", "get") == "ready"
        ctl(epochs_machine, "nonce", "set", f"spoilt-{{number}}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 instead of 300")
    count = 30 if parser.parse_args().quick else 300
    with tempfile.TemporaryDirectory(prefix="epochs-bench-") as scratch, \
            Store(Path(scratch) / "store") as store:
        place = Path(scratch)
        machine = ready(store, Path(os.environ["EPOCHS_TINY"]))
        try:
            ctl(machine, "nonce", "set", "ready")
            machine.create(tags=["ready"])
            machine.stop(kill=True)
            for workers, standby in ((0, 0), (2, 0), (0, 1)):
                (place / "test_resets.py").write_text(textwrap.dedent(SUITE.format(count=count)))
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n",
                     str(workers), f"--epochs-standby={standby}", f"--rootdir={place}",
                     "--epochs-report=times.json", f"--epochs-store={store.files.path}",
                     "test_resets.py"], cwd=place,
                    check=False, capture_output=True, text=True)
                took = time.perf_counter() - began
                if done.returncode:
                    print(done.stdout + done.stderr)
                    return 1
                times = json.loads((place / "times.json").read_text())
                name = f"{workers} workers" if workers else "one process"
                name += f", {standby} on standby" if standby else ""
                print(f"{name}: {count} tests in {took:.1f} s, {took / count * 1e3:.0f} ms each; "
                      f"{len(times['resets'])} resets, {summary(times['resets'])}", flush=True)
                if len(times["resets"]) + len(times["forks"]) != count:
                    print("not every test began anew")
                    return 1
        finally:
            machine.remove(force=True, with_epochs=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
