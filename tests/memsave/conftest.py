"""Fixtures: the victim program, a pack directory, and victims that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from victim import Victim, build

from memsave import PackStore

MAIN, OTHER = 512, 64  # pages


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("victim"))


@pytest.fixture
def packs(tmp_path: Path) -> Iterator[PackStore]:
    directory = tmp_path / "packs"
    directory.mkdir(mode=0o700)
    with PackStore(directory) as store:
        yield store


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    """start(image=…, preload=…) -> Victim"""
    with ExitStack() as stack:
        def make(image: Path | None = None, *, main: int = MAIN, other: int = OTHER,
                 preload: bool = True) -> Victim:
            return stack.enter_context(
                Victim(program, image or tmp_path / "blank", main, other, preload=preload))

        yield make
