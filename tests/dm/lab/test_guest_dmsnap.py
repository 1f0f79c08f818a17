"""A guest over stacked exception stores: the story, and random operations with the witness
writing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from tests.dm.lab.story import OPERATIONS, negative_control, story
from tests.system.files import files_story
from tests.system.model import Model

UML = ["--installed"]  # Debian 12's kernel, which has no PAGEMAP_SCAN


def test_story(store: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    web = boot("dmsnap")
    story(store, web, tmp_path)
    files_story(store, web, tmp_path)
    negative_control(store, web)


@pytest.mark.timeout(2000)
def test_random_operations(store: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    model = Model(store, boot("dmsnap"), random.Random(20261128), boot_limit=180,
                  machines=2)
    model.run(OPERATIONS, "dmsnap")
    model.check_everything(tmp_path)
