"""Random operations with the witness writing throughout: memory and disks never part.

CI runs one fixed seed with each QEMU, so that what it says of a commit can be repeated.
EPOCHS_SEED=N runs another, EPOCHS_SEED=random a new one, which is printed; EPOCHS_OPERATIONS
changes the number.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store

from .model import Model

pytestmark = [pytest.mark.guest, pytest.mark.slow]
OPERATIONS = int(os.environ.get("EPOCHS_OPERATIONS", "150"))


@pytest.mark.timeout(2700)
def test_random_operations_never_mix_memory_and_disks(
        store: Store, boot: Callable[..., Machine], tmp_path: Path) -> None:
    wanted = os.environ.get("EPOCHS_SEED", "20261124")
    seed = random.randrange(10**6) if wanted == "random" else int(wanted)
    print(f"EPOCHS_SEED={seed}")
    model = Model(store, boot(), random.Random(seed))
    model.run(OPERATIONS, f"EPOCHS_SEED={seed}")
    model.check_everything(tmp_path)
