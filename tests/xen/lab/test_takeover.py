"""A domain that xl started becomes a machine without being booted anew, and until everything is
recorded nothing happens to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epochs import Store
from epochs.points import POINTS
from tests.commands import run_cli
from tests.dm.lab.test_kills import settle, strike
from tests.dm.lab.volumes import volume
from tests.system.guest import check_disks, ctl, wait_witness
from tests.xen.lab.domu import DOMU, DomU, config, domains, xl
from tests.xen.lab.test_bad_input import refused
from tests.xen.lab.test_kills import Sweep, known

XEN = ["--disk", "700M", "--disk", "700M"]
RECORDED = ("take-over.committed", "take-over.old-gone")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def plain(store: Store, tmp_path: Path) -> Iterator[Callable[[str], DomU]]:
    """A domain of xl's, on two thin volumes."""
    run_cli(store.files.path, "pool", "create", "fast", "/dev/vdc")
    disks = [(f"xvd{name}", volume(name, DOMU / f"{name}.img", thin=True)) for name in "ab"]

    def started(kind: str) -> DomU:
        xl("create", "-e", str(config("plain", kind, tmp_path, disks=disks)))
        domain = DomU("plain")
        domain.wait("DOMU READY")
        return domain

    yield started
    if "plain" in domains():
        xl("destroy", "plain")


def digest(device: str) -> str:
    return hashlib.sha256(Path(device).read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.whole), "pvh"])
def test_taken_over(kind: str, plain: Callable[[str], DomU], store: Store, tmp_path: Path) -> None:
    domain = plain(kind)
    domain.ctl("nonce", "set", "one")
    count = domain.wait_count(10)
    said = run_cli(store.files.path, "add", "web", "--xen", "plain",
                   "--disk", "xvdb=/dev/vg/b,backend=dmthin").stdout
    assert "goes on as machine 'web'" in said
    assert domains() == ["web"]
    web = store.machine("web")
    assert web.status()["state"] == "running"
    assert {disk["backend"] for disk in web.status()["disks"]} == {"lvm-thin", "dmthin"}
    assert ctl(web, "nonce", "get") == "one", "the same programs, still running"
    originals = {device: digest(device) for device in ("/dev/vg/a", "/dev/vg/b")}
    wait_witness(web, count, 60)
    first = web.head
    assert first is not None
    print(first.stats)
    ctl(web, "nonce", "set", "two")
    second = web.create()
    web.rollback(first, keep=False)
    assert ctl(web, "nonce", "get") == "one"
    for epoch in (first, second):
        check_disks(store, epoch, tmp_path)
    assert store.verify() == []
    # It has a configuration to boot with, too.
    web.stop(kill=True)
    since = len(DomU("web").said())
    web.start()
    DomU("web").wait("DOMU READY", since=since)
    wait_witness(web, 0, 60)
    assert {device: digest(device) for device in originals} == originals, "left as they were"


@pytest.mark.whole
def test_killed(plain: Callable[[str], DomU], store: Store, sweep: Sweep) -> None:
    domain = plain("pvh")
    domain.ctl("nonce", "set", "one")
    domid, nodes = domain.domid, known()
    add = ("add", "web", "--xen", "plain", "--disk", "xvdb=/dev/vg/b,backend=dmthin")
    before = [point for point in POINTS["take-over"] if point not in RECORDED]
    for point in sweep(before, ("take-over.intended", "take-over.disks-adopted")):
        strike(store, point, *add)
        settle(store)
        assert domain.domid == domid, "it goes on"
        domain.wait_count(domain.count())
        assert known() == nodes, point
        assert (store.machines(), store.epochs()) == ([], []), point
    recorded = sweep(RECORDED, RECORDED[:1])
    for point in recorded:
        strike(store, point, *add)
        settle(store)
        assert domains() == []
        web = store.machine("web")
        assert web.status()["state"] == "off"
        web.rollback(keep=False)
        assert ctl(web, "nonce", "get") == "one", point
        wait_witness(web, 0, 60)
        web.remove(with_epochs=True, force=True)
        if point != recorded[-1]:
            domain = plain("pvh")
            domain.ctl("nonce", "set", "one")


@pytest.mark.whole
def test_refused(plain: Callable[[str], DomU], store: Store) -> None:
    domain = plain("pvh")
    assert "neither a configuration file nor" in refused(store, "add", "web", "--xen", "nobody",
                                                         status=3)
    xl("pause", "plain")
    assert "does not run" in refused(store, "add", "web", "--xen", "plain")
    xl("unpause", "plain")
    assert "whose layers are files" in refused(
        store, "add", "web", "--xen", "plain", "--disk", "xvdb=/dev/vg/b,backend=qcow2")
    file = config("web", "pvh", Path(store.files.path).parent, disks=[("xvda", "/dev/vg/a")])
    assert "is in use by domain 'plain'" in refused(store, "add", "web", "--xen", str(file))
    domain.wait_count(domain.count())
