"""The witness itself, on folders of this host: what it forgives after a power cut and what not."""

from __future__ import annotations

import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "guests" / "witness.c"
BLOCK, RING = 4096, 512

pytestmark = pytest.mark.root  # its socket has a fixed place: a mount namespace hides that


@pytest.fixture
def program(tmp_path: Path) -> Path:
    built = tmp_path / "witness"
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(built),
                    str(SOURCE)], check=True)
    (tmp_path / "witness-ctl").symlink_to("witness")
    for disk in ("a", "b"):
        (tmp_path / disk).mkdir()
    return built


@contextmanager
def running(program: Path) -> Iterator[Callable[..., str]]:
    """Start it on folders a and b; yields a function that asks it something. Killed at the end."""
    place = program.parent
    script = (f"mount -t tmpfs run /run; {program} a b >/dev/null & "
              "until [ -S /run/witness.sock ]; do :; done; echo up; "
              "while read -r words; do ./witness-ctl $words; done")
    with subprocess.Popen(["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c",
                           script],
                          cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        try:
            assert shell.stdout.readline() == "up\n"

            def ask(words: str = "status") -> str:
                shell.stdin.write(words + "\n")  # type: ignore[union-attr]
                shell.stdin.flush()  # type: ignore[union-attr]
                return shell.stdout.readline().strip()  # type: ignore[union-attr]

            yield ask
        finally:
            shell.send_signal(signal.SIGKILL)


def count(ask: Callable[..., str], beyond: int) -> int:
    while (found := ask()).startswith("OK") and int(found.split()[1]) <= beyond:
        select.select([], [], [], 0.05)  # it counts only while nobody asks
    assert found.startswith("OK"), found
    return int(found.split()[1])


def lose(ring: Path, newest: int, how_many: int) -> None:
    """Put the newest blocks of a ring back to what they held one lap before (here: nothing)."""
    with ring.open("r+b") as file:
        for number in range(newest, newest - how_many, -1):
            file.seek(number % RING * BLOCK)
            file.write(bytes(BLOCK))


def newest(ring: Path) -> int:
    data = ring.read_bytes()
    return max(int.from_bytes(data[at + 8:at + 16], "little") for at in range(0, len(data), BLOCK))


def test_it_goes_on_after_a_kill(program: Path) -> None:
    with running(program) as ask:
        assert ask("nonce set abc") == "done"
        seen = count(ask, 60)
        assert ask("nonce get") == "abc"
    with running(program) as ask:
        assert count(ask, 0) >= seen - 32
        count(ask, seen + 40)


@pytest.mark.parametrize(("ring", "lost"), [("a/direct", 10), ("b/direct", 15), ("a/buffered", 16)])
def test_writes_that_were_never_flushed_may_be_lost(program: Path, ring: str, lost: int) -> None:
    with running(program) as ask:
        count(ask, 60)
    place = program.parent / ring
    lose(place, newest(place), lost)
    with running(program) as ask:
        count(ask, count(ask, 0) + 40)


@pytest.mark.parametrize("ring", ["a/direct", "b/buffered"])
def test_writes_that_were_flushed_may_not(program: Path, ring: str) -> None:
    with running(program) as ask:
        count(ask, 80)
    place = program.parent / ring
    lose(place, newest(place) - 33, 1)
    with running(program) as ask:
        assert ask().startswith("MISMATCH")


def test_a_disk_of_an_earlier_time_is_seen(program: Path) -> None:
    place = program.parent
    with running(program) as ask:
        count(ask, 60)
    shutil.copytree(place / "a", place / "old")
    with running(program) as ask:
        count(ask, newest(place / "a" / "direct") + 60)
    shutil.rmtree(place / "a")
    (place / "old").rename(place / "a")
    with running(program) as ask:
        assert ask().startswith("MISMATCH")
