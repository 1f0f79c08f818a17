"""What cannot be done with a domain is refused with the reason, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Failed
from epochs.xen import toolstack
from epochs.xen.config import DomainConfig
from epochs.xen.domains import SAVER, SavedByAnother
from memsave.errors import MemsaveError
from memsave.xen import XenDomain, XlSave, xlfile
from memsave.xen.live import Host
from tests.commands import run_cli
from tests.system.guest import assert_tidy, wait_witness
from tests.xen.lab.domu import DOMU, DomU, config, domains, xl

XEN = ["--disk", "700M", "--disk", "700M"]
pytestmark = pytest.mark.timeout(900)


def refused(store: Store, *arguments: str, status: int = 4) -> str:
    """A command that must end so; what it said, in one line."""
    done = run_cli(store.files.path, *arguments, check=False)
    assert done.returncode == status, (arguments, done.returncode, done.stderr)
    said = done.stderr.strip()
    assert "Traceback" not in said
    assert_tidy(store)
    return said


def await_saver() -> None:
    """Until libxl's helper is at work on some domain."""
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-x", SAVER], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.1)  # nothing tells when a process starts


def test_adding(store: Store, disks: list[tuple[str, str]], tmp_path: Path, host: Host) -> None:
    def add(*more: str, status: int = 4) -> str:
        return refused(store, "add", "web", "--xen", *more, status=status)

    assert "does not exist" in add(str(tmp_path / "nothing.cfg"), status=3)
    assert "cannot be read" in add(str(tmp_path))
    bad = tmp_path / "bad.cfg"
    bad.write_text("this is no configuration\n")
    assert "xl does not take this configuration" in add(str(bad))
    good = config("web", "pvh", tmp_path, disks=disks)
    said = add(str(good))
    assert "disk 'xvdb'" in said
    assert "backend=dmthin" in said, "the mend"
    assert "has no disk 'xvdc'" in add(str(good), "--disk", "xvdc=/dev/vg/a", status=3)
    assert "not /dev/vg/a" in add(str(good), "--disk", "xvdb=/dev/vg/a,backend=dmthin")
    assert "layers are files" in add(str(good), "--disk", f"xvdb={DOMU / 'b.img'},backend=qcow2")
    assert "goes with --disk only" in add(str(good), "--memory", "1G", status=2)
    text = good.read_text()
    good.write_text(text.replace("xvdb,w", "xvdb,r"))
    assert "read-only" in add(str(good))
    good.write_text(text.replace(f"phy:{disks[1][1]},xvdb,w", f"{disks[1][1]},qcow2,xvdb,w"))
    assert "qcow2" in add(str(good))
    good.write_text(text)
    # The same configuration, run without us.
    plain = config("web", "pvh", tmp_path, disks=disks[:1])
    xl("create", "-e", "-p", str(plain))
    assert "there is a domain 'web' already" in add(str(plain))
    xl("destroy", "web")
    assert store.machines() == []
    assert host.free_memory > 0


def test_what_others_do(boot: Callable[[str], Machine], store: Store, tmp_path: Path) -> None:
    web = boot("pvh")
    epoch = web.create()
    count = wait_witness(web, 0, 60)
    # xl saves it, into a pipe that nobody reads yet.
    pipe = tmp_path / "slow"
    os.mkfifo(pipe)
    with subprocess.Popen(["xl", "save", "-c", "web", str(pipe)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as saver:
        reader = os.open(pipe, os.O_RDONLY)
        try:
            os.read(reader, 1 << 20)
            assert "is suspended: 'xl save'" in refused(store, "create", "web")
            assert "being saved or migrated by xl" in refused(store, "start", "web")
            while os.read(reader, 1 << 20):
                pass
        finally:
            os.close(reader)
        assert saver.wait() == 0
    count = wait_witness(web, count, 60)
    # It is on its way to another host, which takes nothing yet.
    receiver = tmp_path / "receiver"
    receiver.write_text("#!/bin/sh\nprintf 'xl migration receiver ready, send binary domain "
                        f"data.\n'\nexec cat {pipe}\n")
    receiver.chmod(0o755)
    with subprocess.Popen(["xl", "migrate", "-s", str(receiver), "web", "elsewhere"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as saver:
        writer = os.open(pipe, os.O_WRONLY)  # the receiver is there
        try:
            await_saver()
            assert "being saved or migrated by xl" in refused(store, "create", "web")
        finally:
            os.close(writer)  # it ends
        assert saver.wait() != 0
    count = wait_witness(web, count, 60)
    # A disk that it was given since would not come back with an epoch.
    more = tmp_path / "more.img"
    more.write_bytes(bytes(1 << 20))
    xl("block-attach", "web", f"phy:{more},xvdc,w")
    assert "'xl block-detach'" in refused(store, "create", "web")
    assert "'xl block-detach'" in refused(store, "rollback", "web", epoch.id)
    xl("block-detach", "web", "xvdc")
    # What goes out of the store does not run over the disks of today, nor as a machine's domain.
    run_cli(store.files.path, "export-xen", epoch.id, str(tmp_path / "out.save"))
    with XenDomain(tmp_path) as domain:
        with (tmp_path / "out.save").open("rb", buffering=0) as file:
            saved = xlfile.read(file.fileno(), domain)
        out = DomainConfig.parse(saved.config)
        changed = json.loads(saved.config)
        changed["c_info"]["type"] = "hvm"
        with (tmp_path / "hvm.save").open("wb", buffering=0) as file:
            xlfile.write(file.fileno(), domain, XlSave(json.dumps(changed).encode(), saved.libxl))
    run_cli(store.files.path, "import-xen", str(tmp_path / "hvm.save"), "--name", "other")
    other = next(one for one in store.epochs() if one.record.machine_name == "other")
    assert "a domain of type hvm" in refused(store, "fork", other.id, "trial")
    assert not any(Path(disk["pdev_path"]).exists() for disk in out.disks.values())
    assert out.raw["c_info"]["uuid"] not in xl("list", "-l")


@pytest.mark.whole
def test_guest_and_host(boot: Callable[[str], Machine], store: Store, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    web = boot("pvh")
    epoch = web.create()
    count = wait_witness(web, 0, 60)
    # A guest that does not react has the request taken back.
    original = toolstack.config_of
    with Host() as host:
        domid = web.status()["domid"]

        calls = iter([False, True])  # the second one is behind the look at what it does

        def held(domid: int) -> object:
            if next(calls):
                host.pause(domid)
            return original(domid)

        with monkeypatch.context() as patch:
            patch.setattr(toolstack, "config_of", held)
            with pytest.raises(MemsaveError, match="does not suspend itself"):
                web.create()
        assert host.read(f"/local/domain/{domid}/control/shutdown") == ""
        host.unpause(domid)
    assert_tidy(store)
    count = wait_witness(web, count, 60)
    # xl began on it between our first look and the pause: it is left suspended, for xl to resume.
    looks = iter([False])

    def seen(domid: int) -> None:
        if next(looks, True):
            raise SavedByAnother(f"the domain (number {domid}) is being saved")

    with monkeypatch.context() as patch:
        patch.setattr("epochs.xen.domains.refuse_if_saved_by_another", seen)
        with pytest.raises(Failed, match=r"is being saved.*epochs recover"):
            web.create()
        assert web.status()["state"] == "suspended"
    assert [one.kind for one in store.settle()] == ["create"]
    assert_tidy(store)
    count = wait_witness(web, count, 60)
    # Not enough memory for one more.
    with Host() as host:
        big = config("big", "pvh", tmp_path, memory=(host.free_memory >> 20) - 100)
    xl("create", "-e", "-p", str(big))
    said = refused(store, "fork", epoch.id, "trial")
    assert "MiB free, and a domain for 'trial' needs" in said
    said = refused(store, "rollback", "web", epoch.id, "--discard")
    assert "MiB free, and a domain for 'web' needs" in said
    assert sorted(domains()) == ["big", "web"], "it has its own name again"
    xl("destroy", "big")
    count = wait_witness(web, count, 60)
    # No agent in a domain.
    assert "has no guest agent" in refused(store, "exec", "web", "--", "true")
    # The guest powers itself off, and is gone.
    DomU("web").run("sync")
    web.stop()
    assert domains() == []
    assert "is off" in refused(store, "create", "web")
    said_before = len(DomU("web").said())
    web.start()
    DomU("web").wait("DOMU READY", since=said_before)
    xl("destroy", "web")
    assert "the domain is gone" in refused(store, "create", "web")
    assert web.status()["state"] == "died"
    web.rollback(epoch, keep=False)
    assert (web.status()["state"], domains()[0]) == ("running", "web")
    wait_witness(web, 0, 60)


def test_doctor(store: Store) -> None:
    done = run_cli(store.files.path, "doctor", check=False)
    (line,) = [line for line in done.stdout.splitlines() if " Xen " in line]
    assert "ok" in line
    assert "4.17" in line
