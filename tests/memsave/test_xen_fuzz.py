"""libFuzzer on the reader of Xen streams, under AddressSanitizer and UndefinedBehaviorSanitizer,
with bounded memory. $EPOCHS_FUZZ_SECONDS says for how long (default: 30)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.memsave.test_core import CORE, SOURCES
from tests.memsave.xen_writers import PAGE, PvDomain, hvm_records, record

TARGET = Path(__file__).with_name("fuzz_xen.c")


def built(place: Path, *more: str) -> Path:
    program, kernels = place / f"fuzz{len(more)}", place / "kernels_avx2.o"
    # Its pragma is GCC's.
    subprocess.run(["gcc", "-O2", "-c", "-o", str(kernels), str(CORE / "kernels_avx2.c")],
                   check=True)
    others = [source for source in SOURCES if not source.endswith("/kernels_avx2.c")]
    subprocess.run(["clang", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread",
                    "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
                    f"-I{CORE}", *more, "-o", str(program), str(TARGET), str(kernels), *others],
                   check=True)
    return program


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Small streams of both kinds, good ones and nearly good ones."""
    place = tmp_path / "corpus"
    place.mkdir()
    pv, hvm = PvDomain(content={7: b"x" * PAGE}, sparse=True).records(), hvm_records()
    for name, one in {
            "pv": pv, "hvm": hvm, "optional": {**pv, "tsc": record(0x80000001, b"more")},
            "no pages": {key: part for key, part in pv.items() if not key.startswith("pages")},
            "swapped": {**pv, "tsc": pv["shared"], "shared": pv["tsc"]}}.items():
        (place / name).write_bytes(b"".join(one.values()))
    return place


def run(program: Path, corpus: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    # Behind a shell: across exec a process keeps the peak memory of the one that made it, here
    # that of all the tests before, and libFuzzer would take it for its own.
    return subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", str(program), f"-max_total_time={seconds:.0f}",
         "-rss_limit_mb=700", "-malloc_limit_mb=64", "-timeout=20", "-max_len=1500000",
         "-print_final_stats=1",
         f"-artifact_prefix={corpus.parent}/", str(corpus)],
        capture_output=True, text=True, check=False, cwd=corpus.parent)


def test_no_input_breaks_the_reader(corpus: Path, tmp_path: Path) -> None:
    done = run(built(tmp_path), corpus, float(os.environ.get("EPOCHS_FUZZ_SECONDS", "30")))
    print(done.stderr[-2000:])
    assert done.returncode == 0, done.stderr[-4000:]
    (units,) = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert int(units) > 500


def test_a_fault_would_be_seen(corpus: Path, tmp_path: Path) -> None:
    """The control."""
    done = run(built(tmp_path, "-DPLANTED"), corpus, 60)
    assert done.returncode != 0
    assert "deadly signal" in done.stderr
