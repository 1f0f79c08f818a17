"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer; its speed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import memsave
from memsave.bench import measure

CORE = Path(memsave.__file__).parent / "csrc"
SOURCES = [str(path) for path in sorted(CORE.glob("*.c"))
           if path.name not in ("tracker_preload.c", "xen_live.c", "xen_boot.c")]  # not C's alone


def test_the_core_under_sanitisers(tmp_path: Path) -> None:
    program = tmp_path / "core"
    subprocess.run(["gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread",
                    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CORE}",
                    "-o", str(program), str(Path(__file__).with_suffix(".c")), *SOURCES],
                   check=True)
    done = subprocess.run([str(program), str(tmp_path)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 failures\n")


def test_the_sanitisers_are_on(tmp_path: Path) -> None:
    """The control of the test above: a read behind a buffer ends a program built this way."""
    source = tmp_path / "bad.c"
    source.write_text("#include <stdlib.h>\nint main(int n, char **v) {(void)v; "
                      "volatile char *p = malloc(8); return p[7 + n]; }\n")
    program = tmp_path / "bad"
    subprocess.run(["gcc", "-O1", "-fsanitize=address,undefined", "-o", str(program), str(source)],
                   check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_the_bench_measures(tmp_path: Path) -> None:
    figures = measure(tmp_path)
    assert set(figures) == {"unchanged_or_zero_gb_s", "new_gb_s", "memcmp_gb_s"}
    assert all(figure > 0 for figure in figures.values())


PROBE = """
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
int main(void) { printf("%d %s\\n", fcntl(1000, F_GETFD), getenv("LD_PRELOAD") ? "left" : "clean");
                 return 0; }
"""


@pytest.mark.parametrize(("prepare", "expected"), [
    ("", "1 clean"),  # 1: FD_CLOEXEC
    ("ulimit -n 256; ", "-1 clean"),  # no room for the descriptor
    ("exec 1000</dev/null; ", "0 clean"),  # the number is taken: it is left to its owner
])
def test_the_tracker_gives_way(tmp_path: Path, prepare: str, expected: str) -> None:
    (tmp_path / "probe.c").write_text(PROBE)
    program = tmp_path / "probe"
    subprocess.run(["gcc", "-o", str(program), str(tmp_path / "probe.c")], check=True)
    done = subprocess.run(
        ["bash", "-c", f"{prepare}LD_PRELOAD=$LIBRARY exec {program}"], check=True,
        capture_output=True, text=True,
        env={**os.environ, "LIBRARY": str(memsave.preload_library())})
    assert (done.stdout, done.stderr) == (expected + "\n", "")
