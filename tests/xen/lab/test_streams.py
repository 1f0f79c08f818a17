"""Files of `xl save` become epochs and such files again, and the guest notices nothing; what is
canonical is the same whatever machine frames a domain has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from epochs import Store
from memsave import PackStore
from memsave.xen import State, XenDomain, XlSave, xlfile
from memsave.xen.live import Host
from tests.commands import run_cli
from tests.system.guest import assert_tidy
from tests.xen.lab.domu import DomU, config, xl

pytestmark = pytest.mark.timeout(700)


def accepted(file: Path) -> None:
    """By Xen's own checker of streams."""
    done = subprocess.run(["verify-stream-v2", "-f", "xl", "-i", str(file)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def contents(file: Path, packs: PackStore, name: str) -> tuple[str, State, XlSave]:
    with XenDomain(file.parent) as domain, file.open("rb", buffering=0) as source:
        saved = xlfile.read(source.fileno(), domain)
        image = domain.write_image(None, packs, name).image
        return image.digest(packs), State.of(domain, saved.config, saved.libxl), saved


def test_the_checker_refuses(tmp_path: Path) -> None:
    """The control of ``accepted``."""
    (tmp_path / "bad").write_bytes(b"Xen saved domain, xl format\n \0 \r" + bytes(100))
    with pytest.raises(AssertionError):
        accepted(tmp_path / "bad")


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_there_and_back(kind: str, loops: list[tuple[str, str]], host: Host,
                        tmp_path: Path) -> None:
    web = DomU(f"web{kind}")
    xl("create", "-e", str(config(web.name, kind, tmp_path, disks=loops)))
    web.wait("DOMU READY")
    web.ctl("nonce", "set", "remembered")
    count = web.wait_count(10)
    saved, again, store = tmp_path / "web.save", tmp_path / "again.save", tmp_path / "store"
    xl("save", web.name, str(saved))
    accepted(saved)
    run_cli(store, "import-xen", str(saved))
    with Store(store) as opened:
        (epoch,) = opened.epochs()
        assert epoch.record.compatibility["guest"] == kind
        digest = opened.digest(epoch)
        opened.export_xen(epoch, again)
        assert_tidy(opened)
    accepted(again)
    (tmp_path / "packs").mkdir()
    with PackStore(tmp_path / "packs") as packs:
        first, second = (contents(file, packs, file.stem) for file in (saved, again))
        assert first == second, "memory, records and configuration are the same"
        assert first[0] == digest

        # Under another name it has other machine frames; saved before it runs it is the same.
        two = DomU(f"two{kind}")
        xl("restore", "-e", "-p", str(config(two.name, kind, tmp_path, disks=loops)), str(again))
        (running,) = [one for one in host.domains() if one.domid == two.domid]
        assert running.fresh
        with XenDomain(tmp_path) as domain:
            host.capture(running, domain, lambda: None)
            image = domain.write_image(None, packs, "fresh").image
        assert image.digest(packs) == digest
    xl("unpause", two.name)
    assert two.ctl("nonce", "get") == "remembered"
    assert two.wait_count(count) > count
    xl("destroy", two.name)
