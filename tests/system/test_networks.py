"""Isolated networks: same addresses inside, one of its own outside, no way from one to another."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Refused
from epochs.network import isolated
from epochs.network.plan import GUEST
from epochs.points import POINTS
from tests.commands import cli_json, run_cli

from .guest import Artefacts, wait_console, wait_fillers, wait_witness
from .networks import NOTHING, alone, answer, asked, inside, left, serve

pytestmark = [pytest.mark.guest, pytest.mark.root]

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
SECONDS = 20.0  # that a connection may take


@pytest.fixture(autouse=True)
def tidy(store: Store) -> Iterator[None]:
    """Whatever a test does, nothing outlives its machines."""
    with alone():
        assert left() == NOTHING
        yield
        for machine in store.machines():
            machine.remove(with_epochs=True, force=True)
        assert left() == NOTHING


@pytest.fixture
def networked(store: Store, tiny: Artefacts) -> Callable[..., Machine]:
    def boot(name: str = "web", net: str = "isolated", publish: tuple[str, ...] = ()) -> Machine:
        spec = tiny.spec(disks=("a",))
        machine = store.add(name, replace(spec, net=net, publish=publish,
                                          append=f"{spec.append} tiny.net"))
        machine.start()
        wait_console(machine, "TINY READY")
        machine.wait_agent()
        serve(machine, name)
        return machine

    return boot


def answered(machine: Machine, where: str) -> bool:
    """Whether the guest gets through to another one's echo server."""
    return inside(machine, f"echo hello | nc -w 3 {where} 7")[1] == "hello"


@pytest.mark.parametrize("net", ["isolated", "user"])
def test_one_port_and_two_starts_at_once(store: Store, tiny: Artefacts, net: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = tiny.spec(disks=("a",))
    for name in ("one", "two"):
        store.add(name, replace(spec, net=net, publish=(f"{port}:80",)))
    command = [sys.executable, "-m", "epochs", "--store", str(store.files.path), "start"]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True)
            for name in ("one", "two")]
    said = {one.communicate(timeout=120)[1]: one.returncode for one in both}
    assert sorted(said.values()) == [0, 4], said
    assert any("already; publish another one" in text for text in said)


def test_standby_instances(store: Store, networked: Callable[..., Machine]) -> None:
    """One for rollbacks is plugged into its machine's network, one for forks into its own."""
    web = networked()
    epoch = web.create()
    where = answer(web)
    store.standby(epoch, 1, machine="web")
    store.standby(epoch, 1)
    assert len(left()["namespaces"]) == 2, "web's and the fork's to be"
    serve(web, "later")
    assert "take" in web.rollback(epoch, keep=False)["steps"]
    assert (answer(web), asked(where)) == (where, "web")
    waiting = {one.machine for one in store.files.catalog.standbys() if one.owner is None}
    one = store.fork(epoch, "one")
    assert one.record.id in waiting, "no other was launched"
    serve(one, "one")
    assert asked(answer(one)) == "one"
    assert asked(where) == "web"
    wait_fillers(store)
    # A port is looked at, and led to the guest, by a launch.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match="cannot be published"):
            store.fork(epoch, "two", publish=[f"127.0.0.1:{port}:80"])
    # A network that somebody took down and that was made anew: the standby's tap went with it.
    isolated.take_down(store.files, web.record.id)
    done = web.rollback(epoch, keep=False)
    assert "spawn" in done["steps"], "launched"
    assert asked(answer(web)) == "web"
    wait_fillers(store)
    web.stop(kill=True)
    one.remove(force=True)
    assert len(left()["namespaces"]) == 1, "of the next fork to be"
    store.standby(epoch, 0)
    assert left() == NOTHING


def test_forks_beside_each_other(store: Store, networked: Callable[..., Machine]) -> None:
    web = networked()
    assert asked(answer(web)) == "web"
    assert GUEST in inside(web, "ip addr show eth0")[1]
    # A connection of the parent's, open all the time.
    assert inside(web, "nc -ll -p 7 -e /bin/cat >/dev/null 2>&1 & "
                       "until netstat -ltn | grep -q ':7 '; do usleep 10000; done")[0] == 0
    with socket.create_connection((answer(web), 7), timeout=SECONDS) as line:
        def echo(text: bytes) -> None:
            line.sendall(text)
            assert line.recv(100) == text

        echo(b"before")
        epoch = web.create()
        echo(b"after the epoch")
        forks = store.fork_many(epoch, ["one", "two", "three"])
        echo(b"after the forks")
        for fork in forks:
            assert GUEST in inside(fork, "ip addr show eth0")[1]
            serve(fork, fork.name)
        machines = [web, *forks]
        assert len({answer(machine) for machine in machines}) == 4
        assert [asked(answer(machine)) for machine in machines] == ["web", "one", "two", "three"]
        echo(b"to the end")

    # They reach the host, and never each other, not even through a host that forwards.
    one, two = forks[:2]
    there = answer(two)
    assert inside(one, f"ping -c 1 -W 3 {gateway(one)}")[0] == 0
    before = FORWARD.read_text()
    try:
        for forwards in ("0", "1"):
            FORWARD.write_text(forwards)
            assert not answered(one, there), f"ip_forward {forwards}"
        for interface in left()["interfaces"]:  # the control: without the rule it would
            table = interface.replace("epn-", "epochs-")
            subprocess.run(["nft", "flush", "chain", "ip", table, "forward"], check=True)
        assert answered(one, there)
    finally:
        FORWARD.write_text(before)

    # The address stays after a rollback, and who asks finds the guest of then.
    serve(web, "later")
    where = answer(web)
    # Rules that somebody flushed, as a restart of nftables does, come back.
    tables = left()["tables"]
    for table in tables:
        subprocess.run(["nft", "delete", "table", "ip", table], check=True)
    web.rollback(epoch, keep=False)
    assert answer(web) == where
    assert set(left()["tables"]) < set(tables)
    assert len(left()["tables"]) == 1
    assert asked(where) == "web"
    two.stop(kill=True)
    assert two.status()["address"] is None
    assert len(left()["namespaces"]) == 3
    two.start()
    wait_witness(two, 0)
    assert two.status()["address"] == there
    assert store.verify() == []


def gateway(machine: Machine) -> str:
    """The host, as a machine sees it: the other address of its pair."""
    first, last = answer(machine).rsplit(".", 1)
    return f"{first}.{int(last) - 1}"


@pytest.mark.parametrize("net", ["isolated", "user"])
def test_published_ports(store: Store, tiny: Artefacts, net: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        spec = tiny.spec(disks=("a",))
        web = store.add("web", replace(spec, net=net, publish=(f"{port}:80",),
                                       append=f"{spec.append} tiny.net"))
        with pytest.raises(Refused, match=f"port {port}:80/tcp cannot be published"):
            web.start()
        assert web.status()["state"] == "off"
        assert left() == NOTHING
    web.start()
    wait_console(web, "TINY READY")
    web.wait_agent()
    serve(web, "web")
    assert asked(f"127.0.0.1:{port}") == "web"
    epoch = web.create()
    serve(web, "later")
    web.rollback(epoch, keep=False)
    assert asked(f"127.0.0.1:{port}") == "web"
    # A fork has ports of its own, or none.
    fork = store.fork(epoch, "one")
    serve(fork, "one")
    assert fork.status()["publish"] == []
    assert asked(f"127.0.0.1:{port}") == "web"
    with pytest.raises(Refused, match="leads to machine 'web' already"):
        store.fork(epoch, "two", publish=[f"{port}:80"])
    said = run_cli(store.files.path, "fork", epoch.id[:12], "two", "--count", "2", "--publish",
                   f"{port + 1}:80", check=False)
    assert said.returncode == 4
    other = store.fork(epoch, "two", publish=[f"127.0.0.1:{port + 1}:80"])
    serve(other, "two")
    assert asked(f"127.0.0.1:{port + 1}") == "two"
    shown = cli_json(store.files.path, "status", "two")
    assert isinstance(shown, dict)
    assert shown["publish"] == [f"127.0.0.1:{port + 1}:80"]
    other.stop(kill=True)
    with pytest.raises((urllib.error.URLError, OSError)):
        asked(f"127.0.0.1:{port + 1}")


@pytest.mark.timeout(900)
def test_killed(store: Store, networked: Callable[..., Machine]) -> None:
    """Killed anywhere on the way, and nothing is left of a network that nobody is in."""
    web = networked()
    epoch = web.create()
    mine = left()
    put_up = [point for point in POINTS["network"] if point != "network.unplugged"]
    for point in (*put_up, *POINTS["launch"], "fork.prepared"):
        done = run_cli(store.files.path, "fork", epoch.id[:12], "trial", fault=f"{point}:kill",
                       check=False)
        assert done.returncode == -9, point
        run_cli(store.files.path, "recover")
        assert left() == mine, point
    for point in ("network.ruled", *POINTS["launch"], "rollback.prepared", "rollback.switched",
                  "rollback.taken-over"):
        done = run_cli(store.files.path, "rollback", "web", "--discard", fault=f"{point}:kill",
                       check=False)
        assert done.returncode == -9, point
        run_cli(store.files.path, "recover")
        assert left()["namespaces"] == mine["namespaces"], point
        assert asked(answer(web)) == "web", point
    done = run_cli(store.files.path, "stop", "--kill", "web", fault="network.unplugged:kill",
                   check=False)
    assert done.returncode == -9
    run_cli(store.files.path, "recover")
    assert left() == NOTHING
    for point in (*put_up, *POINTS["launch"], "start.intended", "start.launched"):
        done = run_cli(store.files.path, "start", "web", fault=f"{point}:kill", check=False)
        if done.returncode == 0:  # a cold start has fewer of them
            web.stop(kill=True)
            continue
        run_cli(store.files.path, "recover")
        assert left() == NOTHING, point
    # A network whose machine was put off by a command that was killed before it took that down.
    web.start()
    instance = store.files.catalog.instance_of(web.record.id)
    assert instance is not None
    from epochs.protocol.launch import put_off
    put_off(store.files, web.record)
    assert left() != NOTHING
    run_cli(store.files.path, "recover")
    assert left() == NOTHING


def test_what_is_lacking_is_said(store: Store, tiny: Artefacts, tmp_path: Path) -> None:
    spec = replace(tiny.spec(disks=("a",)), net="isolated")
    store.add("web", spec)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("qemu-system-x86_64", "qemu-img", "nsenter", "dnsmasq", "ip", "env", "sh"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    done = run_cli(store.files.path, "start", "web", check=False, PATH=str(tools))
    assert done.returncode == 4, done.stderr
    assert "isolated networks need nft: apt-get install" in done.stderr
    for words, code in ((("--net", "none", "--publish", "1:2"), 4), (("--publish", "x"), 2),
                        (("--publish", "1:2", "--publish", "1:3"), 4)):
        done = run_cli(store.files.path, "add", "other", "--memory", "64M", "--kernel",
                       str(tiny.directory / "vmlinuz"), *words, check=False)
        assert done.returncode == code, (words, done.stderr)
    shown = json.loads(run_cli(store.files.path, "--json", "doctor").stdout)
    assert any(check["name"] == "isolated networks" and check["state"] == "good"
               for check in shown["checks"])
