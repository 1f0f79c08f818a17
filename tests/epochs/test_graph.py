"""The graph: names of epochs, ancestry, drawing. Pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epochs import graph
from epochs.errors import NotFound, Refused, UsageError
from epochs.graph import Names, resolve

A, B, C, D = "aaaa1111", "aaab2222", "cccc3333", "dddd4444"
PARENTS = {A: None, B: A, C: B, D: A}
NAMES = Names(PARENTS, [("stable", "m-web", B), ("old", "m-web", A), ("stable", "m-db", D)],
              {"web": ("m-web", C), "db": ("m-db", D), "new": ("m-new", None)})


@pytest.mark.parametrize(("text", "epoch"), [
    (A, A), ("aaab", B), ("web", C), ("web~1", B), ("web~", B), ("web~~", A), ("web~2", A),
    ("web@stable", B), ("db@stable", D), ("web@stable~1", A), ("old", A), ("db@old", A),
])
def test_an_expression_stands_for_an_epoch(text: str, epoch: str) -> None:
    assert resolve(text, NAMES) == epoch


@pytest.mark.parametrize(("text", "words"), [
    ("eeee", "no epoch 'eeee'"), ("aaa", "a prefix needs 4"), ("web~3", "only 2 before it"),
    ("web@none", "no epoch tagged 'none'"), ("nobody@x", "no machine 'nobody'"),
    ("new", "has no epoch yet"),
])
def test_a_name_of_nothing_is_not_found(text: str, words: str) -> None:
    with pytest.raises(NotFound, match=words):
        resolve(text, NAMES)


@pytest.mark.parametrize("text", ["", "~1", "web~x", "~"])
def test_what_is_no_expression_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        resolve(text, NAMES)


def test_ambiguity_is_refused_and_names_the_candidates() -> None:
    names = Names({"aaaa1111": None, "aaaa2222": None, "aaab3333": None}, [], {})
    with pytest.raises(Refused, match="epoch aaaa1111 or epoch aaaa2222"):
        resolve("aaaa", names)
    assert resolve("aaaa2", names) == "aaaa2222"


def test_a_tag_of_two_machines_must_be_qualified() -> None:
    with pytest.raises(Refused, match=r"db@stable or web@stable"):
        resolve("stable", NAMES)


@st.composite
def forests(draw: st.DrawFn) -> dict[str, str | None]:
    """Epochs in the order they were made; each has an earlier parent or none."""
    found: dict[str, str | None] = {}
    for number in range(draw(st.integers(1, 25))):
        earlier = [None, *found]
        found[f"e{number}"] = draw(st.sampled_from(earlier))
    return found


@given(forests())
def test_every_epoch_is_drawn_once_above_its_parent(parents: dict[str, str | None]) -> None:
    lines = graph.draw(parents, list(parents))
    drawn = [line.epoch for line in lines if line.epoch]
    assert sorted(drawn) == sorted(parents)
    for epoch, parent in parents.items():
        if parent is not None:
            assert drawn.index(epoch) < drawn.index(parent)
    assert all(line.drawing.count("*") == (1 if line.epoch else 0) for line in lines)


@given(forests(), st.data())
def test_ancestry_is_consistent(parents: dict[str, str | None], data: st.DataObject) -> None:
    a, b = (data.draw(st.sampled_from(list(parents))) for _ in range(2))
    common = graph.common_ancestor(parents, a, b)
    above = [set(graph.ancestors(parents, one)) for one in (a, b)]
    if common is None:
        assert not above[0] & above[1]
    else:
        assert above[0] & above[1] == set(graph.ancestors(parents, common))
    assert graph.depth(parents, a) == len(above[0])
