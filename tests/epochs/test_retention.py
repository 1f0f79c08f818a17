"""Rules of keeping, over made-up dates."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epochs.retention import Candidate, Policy, decide

START = datetime(2026, 1, 1, 12).timestamp()


def epochs(*hours: float) -> list[Candidate]:
    return [Candidate(f"e{n}", START + 3600 * at) for n, at in enumerate(hours)]


def kept(candidates: list[Candidate], policy: Policy) -> set[str]:
    return {one.id for one in decide(candidates, policy) if one.kept}


def test_last() -> None:
    assert kept(epochs(0, 1, 2, 3), Policy(last=2)) == {"e2", "e3"}
    assert kept(epochs(3, 2, 1, 0), Policy(last=2)) == {"e0", "e1"}, "by date, not by order"


def test_the_newest_of_each_period() -> None:
    made = epochs(0, 0.2, 0.4, 1, 1.5, 5)
    assert kept(made, Policy(hourly=2)) == {"e4", "e5"}
    assert kept(made, Policy(hourly=9)) == {"e2", "e4", "e5"}, "hours without any do not count"
    days = epochs(0, 24, 25, 24 * 8, 24 * 40, 24 * 400)
    assert kept(days, Policy(daily=3)) == {"e3", "e4", "e5"}
    assert kept(days, Policy(monthly=2)) == {"e4", "e5"}
    assert kept(days, Policy(yearly=5)) == {"e4", "e5"}


def test_weeks_begin_on_monday_across_the_year() -> None:
    sunday = datetime(2027, 1, 3, 12)  # ISO week 53 of 2026
    made = [Candidate("monday", (sunday - timedelta(days=6)).timestamp()),
            Candidate("sunday", sunday.timestamp()),
            Candidate("next", (sunday + timedelta(days=1)).timestamp())]
    assert kept(made, Policy(weekly=2)) == {"sunday", "next"}


def test_reasons_add_up() -> None:
    made = [Candidate("a", START, ("v1", "x")), Candidate("b", START + 60, (), "is mounted")]
    decisions = {one.id: one for one in decide(made, Policy(last=1, daily=1, tags=("v*",)))}
    assert decisions["a"].reasons == ["tag v1"]
    assert decisions["b"].reasons == ["is mounted", "last 1", "daily 1"]
    assert decisions["a"].firm
    assert decisions["b"].firm
    assert not decide(made, Policy(daily=1))[-1].firm


def test_no_rule_is_empty() -> None:
    assert Policy().empty
    assert not Policy(tags=("*",)).empty
    with pytest.raises(ValueError, match="less than 0"):
        Policy(daily=-1)


@given(st.lists(st.floats(0, 10000), max_size=40), st.integers(0, 5), st.integers(0, 5),
       st.integers(0, 5))
def test_what_holds_for_any(hours: list[float], last: int, hourly: int, weekly: int) -> None:
    made = epochs(*hours)
    policy = Policy(last=last, hourly=hourly, weekly=weekly)
    decisions = decide(made, policy)
    assert len(decisions) == len(made)
    stays = [one for one in decisions if one.kept]
    assert min(last, len(made)) <= len(stays) <= last + hourly + weekly
    if stays:
        assert stays[0] is decisions[0], "the newest is always among them"
    # A rule that is applied twice deletes nothing the second time.
    left = [one for one in made if one.id in {d.id for d in stays}]
    assert kept(left, policy) == {one.id for one in left}
