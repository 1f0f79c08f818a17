"""An epoch's files: what a change inside the guest shows as, and a look at them by mount."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.errors import Refused

from .guest import assert_tidy, processes_in, wait_witness

WITNESS = {"/direct", "/buffered"}
BEFORE = """
set -e
cd /a; mkdir pkg pkg/lib; cd pkg
echo version 1 >conf; echo same >kept; echo gone >old; echo x >mode; echo y >moved; echo z >lib/so
ln -s conf link; sync
"""
AFTER = """
set -e
cd /a/pkg
echo version 2 >conf; rm old; chmod 751 mode; mv moved elsewhere; echo new >lib/so.2
ln -sf kept link; mkdir share; echo doc >share/doc; cat kept >/dev/null; sync
"""
CHANGES = {
    "/pkg/conf": "changed", "/pkg/old": "removed", "/pkg/mode": "attributes",
    "/pkg/moved": "removed", "/pkg/elsewhere": "added", "/pkg/lib/so.2": "added",
    "/pkg/link": "changed", "/pkg/share": "added", "/pkg/share/doc": "added",
}


def shell(machine: Machine, script: str) -> None:
    done = machine.exec(["/bin/sh", "-c", script], timeout=120)
    assert done.status == 0, done.stderr.decode()


def mounted_below(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().split("\n")
            if line and line.split(" ")[4].startswith(str(directory))]


def files_story(store: Store, web: Machine, scratch: Path) -> None:
    """`diff --files` lists exactly what was changed; `mount` shows an epoch's files while the
    machine goes on, and its bytes stay what they are."""
    shell(web, BEFORE)
    before = web.create()
    shell(web, AFTER)
    after = web.create()
    found = store.diff(before, after, files=True).to_json()["files"]
    changes = {one["path"]: one["change"] for one in found["a"]}
    mine = {path: change for path, change in changes.items() if path not in WITNESS}
    assert mine == CHANGES, mine
    assert {one["path"] for one in found["b"]} <= WITNESS, "nothing else was written to"
    backwards = store.diff(after, before, files=True).to_json()["files"]
    assert {one["path"]: one["change"] for one in backwards["a"]}["/pkg/old"] == "added"
    assert mounted_below(store.files.path) == []

    place = scratch / "look"
    place.mkdir()
    with pytest.raises(Refused, match="several disks"):
        store.mount(before, place)
    count = wait_witness(web, 0)
    store.mount(before, place, disk="a")
    try:
        assert (place / "pkg/conf").read_text() == "version 1\n"
        assert (place / "pkg/old").read_text() == "gone\n"
        with pytest.raises(OSError, match="Read-only file system"):
            (place / "pkg/conf").write_text("mine")
        assert [one.directory for one in store.mounts()] == [str(place)]
        wait_witness(web, count + 20)
        assert store.verify() == [], "the journal was replayed, but not into the epoch"
        with pytest.raises(Refused, match=f"mounted on {place}"):
            store.delete([before])
        with (place / "pkg/conf").open(), pytest.raises(Refused, match="cannot be unmounted"):
            store.umount(place)
        with pytest.raises(Refused, match="not empty"):
            store.mount(after, place, disk="a")
    finally:
        store.umount(place)
    assert list(place.iterdir()) == []
    assert mounted_below(scratch) == []
    assert processes_in(store.files.path / "mounts") == []
    assert_tidy(store)
    assert store.verify() == []
    store.delete([before])
    assert store.verify() == []


def loop_devices() -> str:
    return subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"],
                          capture_output=True, text=True, check=True).stdout
