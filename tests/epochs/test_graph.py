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


HEX_IDS = st.lists(st.text("0123456789abcdef", min_size=12, max_size=12), min_size=1, max_size=20,
                   unique=True)


@st.composite
def histories(draw: st.DrawFn) -> Names:
    """Epochs with real-looking ids, machines on some of them, tags on some of them."""
    ids = draw(HEX_IDS)
    parents: dict[str, str | None] = {}
    for number, one in enumerate(ids):
        parents[one] = draw(st.sampled_from([None, *ids[:number]]))
    machines = {name: (f"m-{name}", draw(st.sampled_from([None, *ids])))
                for name in ("web", "database")}
    tags = draw(st.lists(st.tuples(st.sampled_from(["stable", "old", "x.y"]),
                                   st.sampled_from(["m-web", "m-database", "m-gone"]),
                                   st.sampled_from(ids)),
                         max_size=6, unique_by=lambda tag: tag[:2]))
    return Names(parents, tags, machines)


@given(histories(), st.data())
def test_a_prefix_means_the_only_epoch_that_has_it(names: Names, data: st.DataObject) -> None:
    epoch = data.draw(st.sampled_from(list(names.parents)))
    prefix = epoch[:data.draw(st.integers(4, 12))]
    matching = [one for one in names.parents if one.startswith(prefix)]
    if len(matching) == 1:
        assert resolve(prefix, names) == epoch
    else:
        with pytest.raises(Refused) as caught:
            resolve(prefix, names)
        assert all(one in str(caught.value) for one in matching)
    with pytest.raises(NotFound, match="a prefix needs 4"):
        resolve(epoch[:3], names)


@given(histories(), st.data())
def test_n_steps_back_are_n_parents(names: Names, data: st.DataObject) -> None:
    epoch = data.draw(st.sampled_from(list(names.parents)))
    line = list(graph.ancestors(names.parents, epoch))
    steps = data.draw(st.integers(0, len(line) + 1))
    for text in (f"{epoch}~{steps}", epoch + "~" * steps, epoch + "~1" * steps):
        if steps < len(line):
            assert resolve(text, names) == line[steps], text
        else:
            with pytest.raises(NotFound, match=f"only {len(line) - 1} before it"):
                resolve(text, names)


@given(histories())
def test_a_tag_alone_works_exactly_when_it_means_one_epoch(names: Names) -> None:
    for tag, owner, epoch in names.tags:
        meant = {e for name, _, e in names.tags if name == tag}
        if len(meant) == 1:
            assert resolve(tag, names) == epoch
        else:
            with pytest.raises(Refused):
                resolve(tag, names)
        machine = next((m for m, (key, _) in names.machines.items() if key == owner), None)
        if machine is not None:
            assert resolve(f"{machine}@{tag}", names) == epoch, "its own tag before any other"


@given(histories())
def test_a_machine_means_its_head_and_inherits_tags_of_its_line(names: Names) -> None:
    for machine, (key, head) in names.machines.items():
        if head is None:
            with pytest.raises(NotFound):
                resolve(machine, names)
            continue
        assert resolve(machine, names) == head
        line = set(graph.ancestors(names.parents, head))
        for tag in {name for name, _, _ in names.tags}:
            own = [e for name, owner, e in names.tags if name == tag and owner == key]
            inherited = {e for name, _, e in names.tags if name == tag and e in line}
            if own or len(inherited) == 1:
                expected = own[0] if own else inherited.pop()
                assert resolve(f"{machine}@{tag}", names) == expected
            else:
                with pytest.raises(NotFound):
                    resolve(f"{machine}@{tag}", names)


@given(st.text(max_size=30))
def test_any_text_ends_in_an_epoch_or_an_error_of_ours(text: str) -> None:
    try:
        assert resolve(text, NAMES) in PARENTS
    except (NotFound, Refused, UsageError) as error:
        assert str(error)


def test_a_branch_is_drawn_as_columns_that_join() -> None:
    shown = [(line.drawing, line.epoch) for line in graph.draw(PARENTS, [A, B, D, C])]
    assert shown == [("*", C), ("| *", D), ("* |", B), ("|/", None), ("*", A)]


@given(forests())
def test_a_drawing_is_no_wider_than_its_leaves_and_ends_empty(
        parents: dict[str, str | None]) -> None:
    leaves = len(parents) - len({p for p in parents.values() if p is not None})
    for line in graph.draw(parents, list(parents)):
        assert len(line.drawing) <= 2 * leaves - 1
        assert set(line.drawing) <= set("*|/ ")


def test_an_epoch_whose_parent_is_not_shown_ends_its_column() -> None:
    assert [line.drawing for line in graph.draw({B: None, D: A}, [B, D])] == ["*", "*"]
