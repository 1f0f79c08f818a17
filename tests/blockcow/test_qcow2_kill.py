"""SIGKILL at every step of a freeze, then recovery: nothing is lost and nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from blockcow_qemu import MIB, Live, image_bytes

from blockcow import Backend, Chain, Freeze, Layer

STEPS = {"open", "os.rename", "os.truncate", "os.remove"}


class Fuse:
    """Kills this process at the Nth action that the outside can see."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, _: object) -> None:
        if event in STEPS:
            self.burn()


class FusedLive:
    def __init__(self, live: Live, fuse: Fuse) -> None:
        self.live, self.fuse = live, fuse

    def execute(self, command: str, **arguments: object) -> Any:
        self.fuse.burn()
        answer = self.live.execute(command, **arguments)
        self.fuse.burn()
        return answer

    def run_job(self, command: str, job_id: str, **arguments: object) -> None:
        raise NotImplementedError


def freeze_in_a_child(
    disks: Backend, live: Live, parts: Sequence[tuple[Freeze, Chain]], steps: int
) -> bool:
    """Do a whole freeze in a forked process that dies at step ``steps``; True if it did."""
    child = os.fork()
    if child == 0:
        fuse = Fuse(steps)
        sys.addaudithook(fuse.audit)
        try:
            ticket = disks.prepare_freeze(FusedLive(live, fuse), parts)
            fuse.burn()
            ticket.freeze()
            fuse.burn()
            ticket.seal()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("alive", [True, False])
def test_kill_at_every_step(
    disks: Backend, layers: Path, start: Callable[..., Live], adopted: Layer, alive: bool
) -> None:
    steps, died, outcomes = 0, True, set()
    while died:
        steps += 1
        active = disks.clone([adopted], "a0")
        live = start(disks.blockdev([active, adopted], "n0"))
        live.write("n0", 0, 4096, 1)
        live.io("n0", "flush")
        parts = [(Freeze("root", active, "a1", "n0", "n1"), [active, adopted])]
        died = freeze_in_a_child(disks, live, parts, steps)
        if not alive:
            live.kill()
        (state,) = disks.recover_freeze(live if alive else None, parts).values()
        ids = [layer.id for layer in state]
        outcomes.add(tuple(ids))
        assert {p.name for p in layers.iterdir()} == {f"{i}.qcow2" for i in ids}
        if alive:
            nodes = {n["node-name"] for n in live.execute("query-named-block-nodes", flat=True)}
            assert ("n1" in nodes) == (len(ids) == 2)
            node = "n1" if len(ids) == 2 else "n0"
            live.io(node, "read -P 1 0 4096")
            live.write(node, MIB, 4096, 2)  # the guest goes on
            live.close()
            assert image_bytes(layers / f"{ids[0]}.qcow2")[MIB : MIB + 4096] == b"\x02" * 4096
        assert image_bytes(layers / f"{ids[0]}.qcow2")[:4096] == b"\x01" * 4096
        for layer in state:
            disks.drop(layer)
    assert steps > 12
    assert outcomes == ({("a0",), ("a1", "a0")} if alive else {("a0",)})
