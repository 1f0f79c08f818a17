"""Merging layers, exchanging them under a running QEMU, and a random walk against a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blockcow_qemu import MIB, Live, QmpRefused, assert_same, image_bytes, tool

from blockcow import Backend, BlockError, Freeze, Layer, LayerDamaged, backend
from blockcow.chains import Link, plan
from blockcow.qcow2_graph import backing_nodes
from blockcow.qcow2_header import read_overlay


class Machine:
    """One disk of one running QEMU, with the catalog that the caller would keep and a model."""

    def __init__(self, disks: Backend, start: Callable[..., Live], base: Layer, name: str) -> None:
        self.disks, self.start, self.name = disks, start, name
        self.layers = {base.id: base}
        self.model = bytearray(Path(base.file).read_bytes())
        self.images = {base.id: bytes(self.model)}
        self.count = 0
        self.boot(base.id)

    def chain(self, layer_id: str) -> list[Layer]:
        found = []
        at: str | None = layer_id
        while at is not None:
            found.append(self.layers[at])
            at = self.layers[at].backing
        return found

    def _new_id(self) -> str:
        self.count += 1
        return f"{self.name}{self.count}"

    def boot(self, frozen_id: str) -> None:
        active = self.disks.clone(self.chain(frozen_id), self._new_id())
        self.layers[active.id] = active
        self.active, self.node = active.id, f"n{self.count}"
        self.live = self.start(self.disks.blockdev(self.chain(active.id), self.node))
        self.model = bytearray(self.images[frozen_id])

    def write(self, offset: int, length: int, pattern: int) -> None:
        self.live.write(self.node, offset, length, pattern)
        self.model[offset : offset + length] = bytes([pattern]) * length

    def freeze(self) -> str:
        new = self._new_id()
        node = f"n{self.count}"
        chain = self.chain(self.active)
        part = Freeze("root", chain[0], new, self.node, node)
        ticket = self.disks.prepare_freeze(self.live, [(part, chain)])
        ticket.freeze()
        (outcome,) = ticket.seal()
        self.layers[outcome.frozen.id] = outcome.frozen
        self.layers[new] = outcome.active
        self.images[outcome.frozen.id] = bytes(self.model)
        self.active, self.node = new, node
        return outcome.frozen.id

    def merge(self, layer_id: str, count: int) -> None:
        chain = self.chain(layer_id)
        made = self.disks.consolidate(chain, count)
        assert self.disks.check(chain[0], full=True) == chain[0]
        self.layers[layer_id] = self.disks.promote(made)
        if self.layers[self.active].backing is not None:
            self.rebacking()

    def rebacking(self) -> None:
        active, *below = self.chain(self.active)
        self.disks.rebacking(self.live, active, self.node, below)

    def verify(self, directory: Path) -> None:
        for layer_id, expected in self.images.items():
            layer = self.layers[layer_id]
            if layer.backing is not None:
                assert_same(image_bytes(directory / layer.file), expected, layer_id)
                self.disks.check(layer, full=True)
        active = self.chain(self.active)
        nodes = backing_nodes(self.live, self.node)
        assert len(nodes) == len(active) - 1
        everything = self.live.execute("query-named-block-nodes", flat=True)
        assert len(everything) == 2 * len(active), "a node was left open"
        for at in range(0, len(self.model), MIB):
            page = self.model[at : at + 4096]
            if len(set(page)) == 1:
                self.live.io(self.node, f"read -P {page[0]} {at} 4096")


@pytest.fixture
def machine(disks: Backend, start: Callable[..., Live], adopted: Layer) -> Machine:
    return Machine(disks, start, adopted, "m")


def test_consolidate_holds_the_union_and_touches_nothing(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    ids = []
    for number in range(4):
        machine.write(number * 65536, 100_352, number + 1)
        ids.append(machine.freeze())
    before = {p.name: p.read_bytes() for p in layers.iterdir()}
    chain = machine.chain(ids[-1])
    made = disks.consolidate(chain, 3)
    for name, content in before.items():
        assert_same((layers / name).read_bytes(), content, name)
    assert (made.id, made.backing, made.file) == (ids[3], ids[0], f"{ids[3]}.qcow2.merge")
    assert layers / made.file in disks.files(ids[3])
    assert_same(image_bytes(layers / made.file), machine.images[ids[3]])
    header = read_overlay(layers / made.file)
    assert header is not None and header.backing_file == f"{ids[0]}.qcow2"
    disks.check(made, full=True)
    promoted = disks.promote(made)
    assert promoted == replace(made, file=f"{ids[3]}.qcow2", signature=promoted.signature)
    assert disks.promote(made) == promoted  # killed after the rename and done again
    assert disks.check(promoted, full=False) == promoted


def test_consolidate_down_to_the_base_names_it_absolutely(
    machine: Machine, disks: Backend, layers: Path, adopted: Layer
) -> None:
    machine.write(0, 4096, 1)
    machine.freeze()
    machine.write(8192, 4096, 2)
    top = machine.freeze()
    made = disks.consolidate(machine.chain(top), 2)
    header = read_overlay(layers / made.file)
    assert header is not None
    assert (header.backing_file, header.backing_format) == (adopted.file, "raw")
    assert_same(image_bytes(layers / made.file), machine.images[top])


def test_zeros_over_data_stay_zeros_and_cost_nothing(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    machine.write(4 * MIB, 2 * MIB, 9)
    machine.freeze()
    machine.write(4 * MIB, 2 * MIB, 0)
    machine.write(MIB, MIB, 0)
    machine.freeze()
    top = machine.freeze()
    made = disks.consolidate(machine.chain(top), 2)
    assert_same(image_bytes(layers / made.file), machine.images[top])
    assert disks.usage(made) < MIB


def test_consolidate_refuses_damaged_input_and_leaves_nothing(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    machine.write(0, 4096, 1)
    low = machine.freeze()
    top = machine.freeze()
    path = layers / machine.layers[low].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LayerDamaged) as caught:
        disks.consolidate(machine.chain(top), 2)
    assert caught.value.layer_id == low and caught.value.path == path
    assert not list(layers.glob("*.merge"))


def test_consolidate_refuses_headers_that_name_another_chain(
    machine: Machine, disks: Backend, layers: Path, adopted: Layer
) -> None:
    low = machine.freeze()
    top = machine.freeze()
    path = layers / machine.layers[top].file
    machine.live.close()
    tool("qemu-img", "rebase", "-u", "-b", adopted.file, "-F", "raw", path)
    chain = [disks.seal_layer(machine.layers[top]), *machine.chain(low)]  # type: ignore[attr-defined]
    with pytest.raises(LayerDamaged, match=f"instead of '{low}.qcow2'"):
        disks.consolidate(chain, 2)


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_consolidate_refuses_a_count_that_makes_no_sense(
    machine: Machine, disks: Backend, count: int
) -> None:
    machine.freeze()
    top = machine.freeze()
    with pytest.raises(BlockError, match="cannot be merged"):
        disks.consolidate(machine.chain(top), count)


def test_dropping_a_replacement_leaves_the_layer(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    machine.freeze()
    top = machine.freeze()
    made = disks.consolidate(machine.chain(top), 2)
    disks.drop(made)
    disks.drop(made)
    assert (layers / f"{top}.qcow2").exists() and not (layers / made.file).exists()


def test_drop_is_idempotent_and_never_takes_the_users_base(
    machine: Machine, disks: Backend, layers: Path, adopted: Layer
) -> None:
    top = machine.freeze()
    for leftover in disks.files(top):
        leftover.write_bytes(b"x")
    disks.drop(machine.layers[top])
    disks.drop(machine.layers[top])
    disks.drop(adopted)
    assert Path(adopted.file).exists()
    assert [p.name for p in layers.iterdir()] == [f"{machine.active}.qcow2"]


def test_rebacking_while_writes_are_in_flight(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    for number in range(4):
        machine.write(number * MIB, 65536, number + 1)
        top = machine.freeze()
    made = disks.promote(disks.consolidate(machine.chain(top), 4))
    machine.layers[top] = made
    for number in range(16):
        machine.live.io(machine.node, f"aio_write -P 200 {number * 262144} 131072")
        machine.model[number * 262144 : number * 262144 + 131072] = b"\xc8" * 131072
    machine.rebacking()
    machine.live.io(machine.node, "aio_flush")
    assert len(backing_nodes(machine.live, machine.node)) == 2
    frozen = machine.freeze()
    assert_same(image_bytes(layers / f"{frozen}.qcow2"), bytes(machine.model))


def test_rebacking_with_an_iothread_and_a_device(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer
) -> None:
    active = disks.clone([adopted], "a0")
    live = start(
        disks.blockdev([active, adopted], "n0"),
        extra=[
            "-object",
            "iothread,id=t",
            "-device",
            "virtio-blk-pci,drive=n0,iothread=t,share-rw=on",
        ],
    )
    chain = [active, adopted]
    for number in range(1, 3):
        live.write(f"n{number - 1}", 0, 4096, number)
        part = Freeze("root", chain[0], f"a{number}", f"n{number - 1}", f"n{number}")
        ticket = disks.prepare_freeze(live, [(part, chain)])
        ticket.freeze()
        (done,) = ticket.seal()
        chain = [done.active, done.frozen, *chain[1:]]
    merged = disks.promote(disks.consolidate(chain[1:], 2))
    disks.rebacking(live, chain[0], "n2", [merged, adopted])
    live.io("n2", "read -P 2 0 4096")
    (device,) = live.execute("query-block")
    assert device["inserted"]["node-name"] == "n2"
    assert len(backing_nodes(live, "n2")) == 2


def test_rebacking_when_a_layer_in_the_middle_was_replaced(
    machine: Machine, disks: Backend, layers: Path
) -> None:
    """The layers above it are open already, over its old file."""
    ids = []
    for number in range(5):
        machine.write(number * MIB, 8192, number + 1)
        ids.append(machine.freeze())
    machine.live.close()
    machine.layers.pop(machine.active)
    machine.boot(ids[-1])
    machine.write(0, 4096, 77)
    machine.merge(ids[2], 2)
    disks.rebacking(machine.live, *_again(machine))
    del machine.images[ids[1]], machine.images[ids[0]]
    machine.verify(layers)


def _again(machine: Machine) -> tuple[Layer, str, list[Layer]]:
    active, *below = machine.chain(machine.active)
    return active, machine.node, below


def test_rebacking_that_fails_leaves_the_graph_as_it_was(
    machine: Machine, disks: Backend, adopted: Layer
) -> None:
    machine.write(0, 4096, 3)
    top = machine.freeze()
    before = machine.live.execute("x-debug-query-block-graph")
    with pytest.raises(BlockError, match="could not be exchanged"):
        disks.rebacking(machine.live, machine.layers[machine.active], "nosuch", machine.chain(top))
    assert len(machine.live.execute("x-debug-query-block-graph")["nodes"]) == len(before["nodes"])
    machine.live.io(machine.node, "read -P 3 0 4096")


def test_a_moved_store_still_reads(machine: Machine, disks: Backend, layers: Path) -> None:
    machine.write(0, 4096, 4)
    machine.freeze()
    machine.write(4096, 4096, 5)
    top = machine.freeze()
    machine.live.close()
    layers.rename(layers.with_name("elsewhere"))
    moved = layers.with_name("elsewhere")
    assert_same(image_bytes(moved / f"{top}.qcow2"), machine.images[top])
    backend("qcow2", moved).check(machine.layers[top], full=True)


@pytest.mark.parametrize("seed", range(3))
def test_every_frozen_layer_is_always_what_the_model_says(
    machine: Machine, disks: Backend, layers: Path, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        action = rng.choice(["write"] * 4 + ["freeze"] * 3 + ["merge", "drop", "boot"])
        frozen = [i for i in machine.images if machine.layers[i].backing is not None]
        if action == "write":
            length = rng.choice([512, 4096, 5120, 65536, 300 * 1024])
            offset = rng.randrange((8 * MIB - length) // 512) * 512
            machine.write(offset, length, rng.randrange(256))
        elif action == "freeze":
            top = machine.freeze()
            links = [
                Link(x.id, x.backing, x.level, x.id == machine.active)
                for x in machine.chain(machine.active)
            ]
            step = plan(links)
            if step is not None:
                assert step.layer == top
                machine.merge(step.layer, step.count)
                assert machine.layers[top].level == step.level
                assert machine.layers[top].backing == step.backing
        elif action == "merge" and frozen:
            target = rng.choice(frozen)
            depth = len(machine.chain(target))
            if depth > 2:
                machine.merge(target, rng.randrange(2, depth))
        elif action == "drop":
            used = {layer.backing for layer in machine.layers.values()}
            for layer_id in [i for i in frozen if i not in used]:
                disks.drop(machine.layers.pop(layer_id))
                del machine.images[layer_id]
        elif action == "boot" and frozen:
            machine.live.close()
            disks.drop(machine.layers.pop(machine.active))
            machine.boot(rng.choice(frozen))
    machine.verify(layers)


def test_the_model_would_notice(machine: Machine, layers: Path) -> None:
    """Negative control: a write the model does not know of is found."""
    machine.write(0, 4096, 1)
    machine.live.write(machine.node, MIB, 4096, 99)
    machine.freeze()
    with pytest.raises(AssertionError, match=f"first unlike at {MIB}"):
        machine.verify(layers)
    with pytest.raises(QmpRefused):
        machine.live.io(machine.node, "read -P 98 0 4096")


def test_difference_is_exact(machine: Machine, disks: Backend) -> None:
    machine.write(0, MIB, 1)
    shared = machine.freeze()
    machine.write(2 * MIB, 8192, 5)
    machine.write(3 * MIB + 512, 512, 6)
    machine.write(0, 4096, 1)  # the same bytes again
    one = machine.freeze()
    machine.live.close()
    machine.boot(shared)
    machine.write(2 * MIB, 4096, 5)
    machine.write(5 * MIB, 4096, 7)
    other = machine.freeze()
    a, b = machine.chain(one), machine.chain(other)
    expected = tuple(
        (at, 4096)
        for at in range(0, 8 * MIB, 4096)
        if machine.images[one][at : at + 4096] != machine.images[other][at : at + 4096]
    )
    assert expected == ((2 * MIB + 4096, 4096), (3 * MIB, 4096), (5 * MIB, 4096))
    found = disks.difference(a, b)
    assert found.ranges == expected and found.bytes == 3 * 4096
    assert disks.difference(b, a).ranges == expected
    assert disks.difference(a, a).ranges == ()
    assert disks.difference(a, a[1:]).ranges == ((2 * MIB, 8192), (3 * MIB, 4096))


def test_difference_says_why_it_cannot(machine: Machine, disks: Backend, layers: Path) -> None:
    machine.write(0, 4096, 1)
    low = machine.freeze()
    top = machine.freeze()
    a, b = machine.chain(top), machine.chain(low)
    machine.live.close()
    (layers / f"{low}.qcow2").write_bytes(b"no image")
    with pytest.raises(BlockError, match="qemu-img map failed"):
        disks.difference(a, b)
    with pytest.raises(BlockError, match=r"the layers could not be read: .*not in qcow2"):
        # nothing in common: everything would be compared, and the daemon says why it cannot
        disks.difference([replace(layer, id="x" + layer.id) for layer in a], b)
