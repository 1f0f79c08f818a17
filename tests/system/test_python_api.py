"""docs/python.md: the interface from threads and from asyncio."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import epochs
from epochs import Epoch, Machine, Store

from .guest import ctl, wait_witness

pytestmark = pytest.mark.guest
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text()


@pytest.fixture
def any_qemu() -> str:
    """One will do: nothing here depends on which it is."""
    return "7.2"


def forked(path: Path, epoch: str, name: str) -> str:
    """What somebody does in a thread: a store, a fork, work in it."""
    with Store(path) as store, store.fork(epoch, name) as trial:
        ctl(trial, "nonce", "set", name)
        trial.create("in a thread")
        wait_witness(trial, 0)
        return ctl(trial, "nonce", "get")


def test_from_threads_and_asyncio(store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    ready = web.create(tags=["ready"]).id
    path = store.files.path
    names = [f"thread-{number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: forked(path, ready, name), names)) == names

    async def gathered() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(forked, path, "web@ready", name)
                                      for name in names))

    assert asyncio.run(gathered()) == names
    # Calls on one machine wait for each other.
    with ThreadPoolExecutor(3) as pool:
        def again(number: int) -> str:
            with Store(path) as own:
                return own.machine("web").create(f"{number}").id
        made = list(pool.map(again, range(3)))
    assert len({*made}) == 3
    wait_witness(web, 0)
    assert store.verify() == []
    # A guard works in any thread, without touching its process' signals.
    seen = []
    thread = threading.Thread(target=lambda: seen.append(_guarded(path)))
    thread.start()
    thread.join()
    assert seen == [(4, "the command ended with 4")]


def _guarded(path: Path) -> tuple[int, str | None]:
    with Store(path) as store:
        done = store.machine("web").guard(["sh", "-c", "exit 4"])
    return done.status, done.undone


@pytest.mark.parametrize(("name", "kind"), [("Store", Store), ("Machine", Machine),
                                            ("Epoch", Epoch)])
def test_the_table_is_true(name: str, kind: type) -> None:
    """It names what there is, all of it that is public and no more."""
    row = re.search(rf"^\| `{name}` \| (.*) \|$", TEXT, re.MULTILINE)
    assert row
    named = set(re.findall(r"`(\w+)`", row[1]))
    there = {one for one in dir(kind) if not one.startswith("_")}
    assert named <= there | {"name", "record"}, named - there
    if "and what goes with them" not in row[1]:
        assert there - named <= {"record", "to_json", "console_log", "console_socket"}, (
            there - named)


def test_it_is_typed() -> None:
    assert (Path(epochs.__file__).parent / "py.typed").exists()
