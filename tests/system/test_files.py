"""`diff --files`, `mount` and `umount` over layers that are files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from epochs.points import POINTS
from epochs.processes import working_in
from tests.commands import cli_json, run_cli

from .files import files_story, loop_devices, mounted_below
from .guest import assert_tidy

pytestmark = pytest.mark.guest
Boot = Callable[..., Machine]


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> object:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    yield
    assert mounted_below(tmp_path) == []
    assert str(tmp_path) not in loop_devices()


def test_files(store: Store, boot: Boot, tmp_path: Path) -> None:
    files_story(store, boot(), tmp_path)


def test_killed_anywhere(store: Store, boot: Boot, tmp_path: Path) -> None:
    """mount and umount killed at each of their points; then the daemon killed under a mount."""
    epoch = boot().create()
    place = tmp_path / "lüük \tat\xa0it"
    place.mkdir()
    for point in POINTS["mount"]:
        if point.startswith("umount"):
            run_cli(store.files.path, "mount", f"{epoch.id}:a", str(place))
        command = ("umount", str(place)) if point.startswith("umount") else (
            "mount", f"{epoch.id}:a", str(place))
        done = run_cli(store.files.path, *command, fault=f"{point}:kill", check=False)
        assert done.returncode == -9, (point, done.stderr)
        run_cli(store.files.path, "recover")
        assert cli_json(store.files.path, "mount") == {"mounts": []}, point
        assert mounted_below(tmp_path) == [], point
        assert_tidy(store)
    record = store.mount(epoch, place, disk="b")
    for process in working_in(store.files.path / "mounts" / record.id):
        process.kill()
    assert store.mounts() == []
    assert mounted_below(tmp_path) == []
    # What somebody else mounted there is left alone.
    store.mount(epoch, place, disk="b")
    subprocess.run(["umount", str(place)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "other", str(place)], check=True)
    try:
        store.umount(place)
        assert mounted_below(tmp_path) != []
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert_tidy(store)


def test_partitions(store: Store, boot: Boot, tmp_path: Path, tiny: object) -> None:
    """A disk with two file systems and one without any."""
    image = tmp_path / "parts.img"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["sfdisk", "--quiet", str(image)], check=True, text=True,
                   input="label: gpt\n1: size=20MiB\n15: size=20MiB\n3: size=8MiB\n",
                   env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    for number, offset in ((1, 1), (2, 21)):
        folder = tmp_path / f"content{number}"
        folder.mkdir()
        (folder / "name").write_text(f"partition {number}\n")
        subprocess.run(["mkfs.ext4", "-q", "-d", str(folder), "-E", f"offset={offset * 2**20}",
                        str(image), "20M"], check=True, capture_output=True,
                       env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    from dataclasses import replace

    from epochs.spec import DiskSpec

    spec = tiny.spec()  # type: ignore[attr-defined]
    machine = store.add("parts", replace(spec, disks=(*spec.disks, DiskSpec("p", str(image)))))
    machine.start()
    epoch = machine.create()
    place = tmp_path / "look"
    place.mkdir()
    refused = run_cli(store.files.path, "mount", f"{epoch.id}:p", str(place), check=False)
    assert refused.returncode == 4
    assert "choose one with --partition: 1, 15" in refused.stderr
    refused = run_cli(store.files.path, "mount", f"{epoch.id}:p", str(place), "--partition", "3",
                      check=False)
    assert "no file system in partition 3; there are 1, 15" in refused.stderr
    assert run_cli(store.files.path, "mount", f"{epoch.id}:q", str(place),
                   check=False).returncode == 3
    store.mount(epoch, place, disk="p", partition=15)
    assert (place / "name").read_text() == "partition 2\n"
    store.umount(place)
    assert store.diff(epoch, machine.create(), files=True).to_json()["files"]["p"] == []


def test_without_root(store: Store, boot: Boot, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root may mount: refused in one sentence, nothing left."""
    epoch = boot().create()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "look").mkdir()
    from epochs.errors import Refused

    with pytest.raises(Refused, match="only root may mount"):
        store.mount(epoch, tmp_path / "look", disk="a")
    with pytest.raises(Refused, match="only root may mount"):
        store.diff(epoch, epoch, files=True)
