"""The plan that keeps chains short: pure."""

from __future__ import annotations

import math
import random

import pytest

from blockcow.chains import (
    FANOUT,
    Consolidation,
    Drop,
    Link,
    applied,
    longest,
    merged_level,
    plan,
    unwanted,
)


def chain_of(links: dict[str, Link], top: str) -> list[Link]:
    found, at = [], links.get(top)
    while at is not None:
        found.append(at)
        at = links.get(at.backing) if at.backing else None
    return found


def chain(*levels: int) -> list[Link]:
    """A base and layers of these levels on it, given top first, below an active layer."""
    ids = [f"l{n}" for n in range(len(levels))] + ["base"]
    links = [Link(ids[n], ids[n + 1], level) for n, level in enumerate(levels)]
    return [Link("active", ids[0], 0, is_active=True), *links, Link("base", None)]


@pytest.mark.parametrize(
    "levels", [(), (0,), (0, 0, 0), (0, 0, 0, 1), (0, 1, 1, 1, 1), (0, 0, 1, 1, 1)]
)
def test_nothing_to_do(levels: tuple[int, ...]) -> None:
    assert plan(chain(*levels)) is None


def test_four_of_a_level_become_one_of_the_next() -> None:
    step = plan(chain(0, 0, 0, 0, 1, 2))
    assert step == Consolidation("l0", ("l0", "l1", "l2", "l3"), "l4", 1)
    assert step.count == FANOUT
    assert plan(chain(1, 1, 1, 1)) == Consolidation("l0", ("l0", "l1", "l2", "l3"), "base", 2)


def test_the_base_is_never_merged() -> None:
    links = chain(0, 0, 0)
    assert plan(links) is None and plan([Link(str(n), None) for n in range(4)]) is None


def test_levels_of_unions() -> None:
    assert merged_level([0, 0, 0, 0]) == 1
    assert merged_level([0, 2]) == 2


def tree(*links: Link) -> list[Link]:
    return [Link("base", None), *links]


def test_unwanted_leaf_is_dropped() -> None:
    assert unwanted(tree(Link("a", "base", wanted=False))) == Drop("a")


def test_unwanted_with_one_frozen_child_is_merged_into_it() -> None:
    links = tree(Link("a", "base", 2, wanted=False), Link("b", "a", 1))
    assert unwanted(links) == Consolidation("b", ("b", "a"), "base", 2)
    after = applied({link.id: link for link in links}, Consolidation("b", ("b", "a"), "base", 2))
    assert unwanted(after.values()) == Drop("a")


@pytest.mark.parametrize(
    "children",
    [(Link("b", "a"), Link("c", "a")), (Link("b", "a", is_active=True),)],
    ids=["several", "active"],
)
def test_unwanted_that_must_stay(children: tuple[Link, ...]) -> None:
    assert unwanted(tree(Link("a", "base", wanted=False), *children)) is None


def test_unwanted_base_with_children_stays_and_without_is_dropped() -> None:
    base = Link("base", None, wanted=False)
    assert unwanted([base, Link("a", "base")]) is None
    assert unwanted([base]) == Drop("base")


def test_wanted_layers_are_never_touched() -> None:
    assert unwanted(tree(Link("a", "base"), Link("b", "a"))) is None


class Simulation:
    """Layers as sets of blocks; every merge must keep what each wanted layer holds."""

    def __init__(self) -> None:
        self.links = {"base": Link("base", None)}
        self.data: dict[str, dict[int, int]] = {"base": {}}
        self.truth: dict[str, dict[int, int]] = {"base": {}}
        self.copied = 0
        self.clock = 0

    def content(self, layer: str) -> dict[int, int]:
        held: dict[int, int] = {}
        for link in reversed(chain_of(self.links, layer)):
            held.update(self.data[link.id])
        return held

    def create(self, parent: str, blocks: list[int]) -> str:
        self.clock += 1
        name = f"e{self.clock}"
        self.links[name] = Link(name, parent)
        self.data[name] = {block: self.clock for block in blocks}
        self.truth[name] = {**self.truth[parent], **self.data[name]}
        step = plan(chain_of(self.links, name))
        while step is not None:
            self.do(step)
            step = plan(chain_of(self.links, name))
        return name

    def delete(self, name: str) -> None:
        link = self.links[name]
        self.links[name] = Link(name, link.backing, link.level, wanted=False)
        del self.truth[name]
        while (step := unwanted(self.links.values())) is not None:
            self.do(step)

    def do(self, step: Drop | Consolidation) -> None:
        if isinstance(step, Consolidation):
            union: dict[int, int] = {}
            for layer in reversed(step.merged):
                union.update(self.data[layer])
            self.data[step.layer] = union
            self.copied += len(union)
        else:
            del self.data[step.layer]
        self.links = applied(self.links, step)

    def verify(self) -> None:
        for name, truth in self.truth.items():
            assert self.content(name) == truth
        for link in self.links.values():
            if link.backing is not None and link.backing != "base":
                assert self.links[link.backing].level >= link.level


def test_200_epochs_in_a_row_stay_short_and_cheap() -> None:
    world, written, head = Simulation(), 0, "base"
    for number in range(200):
        head = world.create(head, [number * 10 + n for n in range(10)])
        written += 10
        assert len(chain_of(world.links, head)) - 1 <= longest(number + 1)
    world.verify()
    assert longest(200) == 12
    assert world.copied <= written * math.log(200, FANOUT)


@pytest.mark.parametrize("seed", range(20))
def test_random_creates_rollbacks_and_deletes(seed: int) -> None:
    rng = random.Random(seed)
    world, head, written, deleted = Simulation(), "base", 0, 0
    for number in range(200):
        if rng.random() < 0.1:
            head = rng.choice(sorted(world.truth))
        blocks = [rng.randrange(300) for _ in range(10)]
        head = world.create(head, blocks)
        written += 10
        if rng.random() < 0.4:
            victim = rng.choice(sorted(set(world.truth) - {"base", head}) or [head])
            if victim != head:
                world.delete(victim)
                deleted += 1
        longest_now = max(len(chain_of(world.links, name)) - 1 for name in world.truth)
        assert longest_now <= longest(number + 1), number
    world.verify()
    # a delete copies its layer and one child, of 300 blocks at most
    assert world.copied <= written * math.log(200, FANOUT) + deleted * 300
