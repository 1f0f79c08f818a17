"""How much must be free before an epoch is made."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epochs.headroom import HISTORY, MARGIN, METADATA_BLOCK, METADATA_MARGIN, wanted

KIB, MIB, GIB = 2**10, 2**20, 2**30
BLOCK = 64 * KIB


def test_without_history_a_margin_is_enough() -> None:
    found = wanted([], BLOCK, GIB)
    assert (found.data, found.metadata) == (MARGIN, METADATA_MARGIN)


def test_the_most_of_the_last_epochs_counts_twice() -> None:
    assert wanted([MIB, 5 * MIB, MIB], BLOCK, GIB).data == 10 * MIB + MARGIN
    old = [MIB] * HISTORY + [500 * MIB]
    assert wanted(old, BLOCK, GIB).data == 2 * MIB + MARGIN, "long ago"


def test_few_scattered_writes_may_take_a_block_of_metadata_each() -> None:
    # 16 blocks written: 16 leaves and 16 on the way, twice over
    assert wanted([MIB], BLOCK, 100 * GIB).metadata == 64 * METADATA_BLOCK + METADATA_MARGIN


@given(st.integers(0, 2**40), st.integers(2**20, 2**40))
def test_metadata_is_never_more_than_the_whole_list(most: int, size: int) -> None:
    found = wanted([most], BLOCK, size)
    leaves = -(-size // BLOCK) // 126 + 2
    assert METADATA_MARGIN <= found.metadata <= 4 * leaves * METADATA_BLOCK + METADATA_MARGIN
