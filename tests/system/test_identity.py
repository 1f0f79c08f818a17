"""What a guest knows after a rollback or a fork: the time, and that it is another one.

Each test that something differs has a control with ``--no-fixup``, under which it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epochs import Epoch, Machine, Store
from epochs.fixup import DONE, HOOK, Wishes
from epochs.qemu.fixup import machine_id
from tests.commands import cli_json, run_cli

from .conftest import required
from .guest import Artefacts, debian_spec, wait_console, wait_witness

pytestmark = pytest.mark.guest

DRAWS = 200
DRAW = f"dd if=/dev/urandom bs=16 count={DRAWS} 2>/dev/null | od -An -v -tx1 -w16"
ATTEMPTS = 8  # the kernel reseeds by itself now and then, from what no two guests share
AWAY = 5.0  # seconds that an epoch is old when it is gone back to
NEAR = 3.0  # seconds that a clock may be off


def inside(machine: Machine, line: str) -> str:
    done = machine.exec(["sh", "-c", line], timeout=120)
    assert done.status == 0, (line, done)
    return done.stdout.decode().strip()


def offset(machine: Machine) -> float:
    """Seconds that the guest's clock is ahead of the host's; 0 if it showed a second that the host
    had between the question and the answer."""
    asked = time.time()
    shown = int(inside(machine, "date +%s"))
    return min(0.0, shown + 1 - asked) + max(0.0, shown - time.time())


def shared(machines: list[Machine]) -> int:
    """How many 16-byte draws of the first machine the second one makes as well. A draw moves the
    generator on by one step, whoever makes it, so that few draws of others hide nothing."""
    drawn = [set(inside(machine, DRAW).splitlines()) for machine in machines]
    assert all(len(one) == DRAWS for one in drawn)
    return len(drawn[0] & drawn[1])


def pairs(store: Store, web: Machine, *, fixup: bool,
          before: Callable[[], object] = lambda: None) -> list[int]:
    """What two forks of an epoch draw in common, for several epochs; ends when it is something."""
    found: list[int] = []
    while len(found) < ATTEMPTS and not any(found):
        before()
        epoch = web.create()
        forks = store.fork_many(epoch, ["one", "two"], fixup=fixup)
        found.append(shared(forks))
        for fork in forks:
            fork.remove(with_epochs=True, force=True)
    return found


@pytest.fixture
def trixie(store: Store) -> Iterator[Machine]:
    """The tiny guest with Debian 13's kernel, which listens to the generation id."""
    web = store.add("web", Artefacts(required("EPOCHS_TINY_TRIXIE")).spec())
    web.start()
    wait_console(web, "TINY READY")
    web.wait_agent()
    wait_witness(web, 0)
    yield web


@pytest.mark.timeout(600)
def test_random_numbers_by_generation_id(store: Store, trixie: Machine) -> None:
    """The agent has no way to reseed here: it is the generation id alone."""
    assert any(pairs(store, trixie, fixup=False)), "the control"
    assert not any(pairs(store, trixie, fixup=True))
    epoch = trixie.create()
    trixie.rollback(epoch, keep=False)
    assert "crng reseeded due to virtual machine fork" in inside(trixie, "dmesg")
    trixie.rollback(epoch, keep=False, fixup=False)
    assert "virtual machine fork" not in inside(trixie, "dmesg")


@pytest.fixture
def debian(store: Store) -> Iterator[Machine]:
    """Debian 12, whose kernel knows nothing of generation ids, with an agent. One CPU: each has a
    generator of its own."""
    web = store.add("web", debian_spec(required("EPOCHS_DEBIAN"), cpus=1))
    web.start()
    web.wait_agent(180)
    yield web


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_through_the_agent(store: Store, debian: Machine) -> None:
    reseed = "perl -e 'open(F, \">\", \"/dev/urandom\") && ioctl(F, 0x5207, 0) or exit 1'"
    assert any(pairs(store, debian, fixup=False, before=lambda: inside(debian, reseed))), (
        "the control")
    assert not any(pairs(store, debian, fixup=True))

    inside(debian, f"mkdir -p {Path(HOOK).parent}; printf '#!/bin/sh\\necho "
                   f"$EPOCHS_EVENT $EPOCHS_MACHINE $EPOCHS_EPOCH >>/run/told\\n' >{HOOK}; "
                   f"chmod 755 {HOOK}")
    epoch = debian.create(tags=["ready"])
    old = time.monotonic()
    names = [inside(debian, "hostname"), inside(debian, "cat /etc/machine-id")]
    time.sleep(max(0.0, AWAY - (time.monotonic() - old)))  # what is measured is that time passed

    fork = store.fork(epoch, "trial", wishes=Wishes(hostname=True, machine_id=True))
    told = fork.fixup
    assert told is not None
    assert told.missed == []
    assert (told.clock, told.random, told.hostname, told.machine_id, told.hook) == (DONE,) * 5
    assert abs(offset(fork)) < NEAR
    assert inside(fork, "hostname; cat /etc/hostname; cat /etc/machine-id").splitlines() == [
        "trial", "trial", machine_id(fork.record.id)]
    assert inside(fork, "cat /run/told") == f"fork trial {epoch.id}"

    plain = store.fork(epoch, "plain")
    assert plain.fixup is not None
    assert (plain.fixup.hostname, plain.fixup.machine_id) == (None, None)
    assert [inside(plain, "hostname"), inside(plain, "cat /etc/machine-id")] == names

    document = cli_json(store.files.path, "rollback", "web@ready", "--discard")
    assert isinstance(document, dict)
    assert document["fixup"] == {"machine": "web", "clock": DONE, "random": DONE,
                                 "hostname": None, "machine_id": None, "hook": DONE}
    assert abs(offset(debian)) < NEAR
    assert inside(debian, "cat /run/told") == f"rollback web {epoch.id}"

    inside(debian, f"printf '#!/bin/sh\\nexit 3\\n' >{HOOK}")
    failing = debian.create()
    said = run_cli(store.files.path, "rollback", "web", failing.id[:12], "--discard").stderr
    assert f"not done in the guest of 'web': hook ({HOOK} ended with 3)" in said

    assert debian.rollback(epoch, keep=False, fixup=False)["fixup"] is None
    assert offset(debian) < -AWAY, "the control"
    assert inside(debian, "cat /run/told || echo nothing") == "nothing"


def test_what_was_not_done_is_said(store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    epoch: Epoch = web.create()
    assert store.fork(epoch, "held", paused=True).fixup is not None
    path = store.files.path
    said = run_cli(path, "fork", epoch.id[:12], "held-2", "--paused").stderr
    assert "not done in the guest of 'held-2': clock, random numbers (the guest is paused)" in said
    refused = run_cli(path, "fork", epoch.id[:12], "no", "--no-fixup", "--hostname", check=False)
    assert refused.returncode == 2
    assert "goes with neither" in refused.stderr
    # Without perl or python3 what was mixed in waits for the kernel.
    told = store.fork(epoch, "go").fixup
    assert told is not None
    assert told.clock == DONE
    assert told.random.startswith("mixed in, but used only from the next reseeding on")
