"""Fixtures in dom0: disks for a domU, and nothing left of it afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from epochs import Machine, Store
from memsave.xen.live import Host
from tests.commands import run_cli
from tests.dm.lab.volumes import group, volume
from tests.system.guest import assert_tidy
from tests.xen.lab.domu import CONSOLES, DOMU, DomU, config, domains, xl


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--operations", type=int, default=4,
                     help="how many random operations (one takes some 20 s)")
    parser.addoption("--all", action="store_true", dest="all_points",
                     help="visit every named point (one takes some 25 s), not only those at which "
                          "a domain is in another state than at the one before")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole: only with --all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("all_points"):
        return
    left = [item for item in items if item.get_closest_marker("whole")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture
def sweep(request: pytest.FixtureRequest) -> Callable[[Iterable[str], Iterable[str]], list[str]]:
    """``sweep(every, some)``: the points that this run visits."""
    def chosen(every: Iterable[str], some: Iterable[str]) -> list[str]:
        found = list(every)
        assert set(some) <= set(found)
        return found if request.config.getoption("all_points") else list(some)

    return chosen


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_domains() -> Iterator[None]:
    """No domain is there before the test; those that are there after it go."""
    assert domains() == []
    yield
    for name in domains():
        xl("destroy", name)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """The domU's two disks, as loop devices over copies."""
    made = []
    for name, disk in (("xvda", "a"), ("xvdb", "b")):
        copy = tmp_path / f"{disk}.img"
        shutil.copy(DOMU / f"{disk}.img", copy)
        device = subprocess.run(["losetup", "--find", "--show", str(copy)], check=True,
                                capture_output=True, text=True).stdout.strip()
        made.append((name, device))
    yield made
    for name in domains():
        xl("destroy", name)
    for _, device in made:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def thin() -> Iterator[None]:
    """A volume group with a thin pool; it outlives the store, whose volumes are in it."""
    with group("/dev/vdb", pool="600M"):
        yield


@pytest.fixture
def store(thin: None, tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened
        print(xl("dmesg")[-1500:])
        for log in sorted(CONSOLES.glob("guest-*.log")):  # shown if the test failed
            print(f"{log.name}: …{log.read_bytes()[-1500:]!r}")
        opened.settle()
        assert_tidy(opened)
        for machine in opened.machines():
            machine.remove(with_epochs=True, force=True)
        opened.delete([epoch.id for epoch in opened.epochs()])
        for pool in opened.pools():
            opened.remove_pool(pool.record.name)
        assert domains() == []
        assert xl("list").count("\n") == 2, "nothing is left of any domain"


@pytest.fixture
def disks(store: Store) -> list[tuple[str, str]]:
    """A thin volume, and a file for the pool."""
    run_cli(store.files.path, "pool", "create", "fast", "/dev/vdc")
    return [("xvda", volume("a", DOMU / "a.img", thin=True)), ("xvdb", str(DOMU / "b.img"))]


@pytest.fixture
def boot(store: Store, disks: list[tuple[str, str]], tmp_path: Path) -> Callable[[str], Machine]:
    def made(kind: str) -> Machine:
        file = config("web", kind, tmp_path, disks=disks)
        run_cli(store.files.path, "add", "web", "--xen", str(file),
                "--disk", f"xvdb={DOMU / 'b.img'},backend=dmthin")
        web = store.machine("web")
        assert {disk["backend"] for disk in web.status()["disks"]} == {"lvm-thin", "dmthin"}
        assert web.start() == "started"
        DomU("web").wait("DOMU READY")
        return web

    return made
