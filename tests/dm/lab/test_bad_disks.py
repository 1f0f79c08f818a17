"""Bad input about pools, volumes and devices: its sentence, its exit code, and nothing changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockcow import LayerDamaged
from epochs import DiskSpec, Epoch, Machine, MachineSpec, Store, points
from tests.commands import cli_json, run_cli
from tests.dm.lab.disks import MIB, random_image
from tests.dm.lab.volumes import GROUP, group, lvm, volume, volumes
from tests.system.guest import assert_tidy

UML = ["--disk", "256M", "--disk", "256M"]
DEVICE, OTHER = "/dev/ubdb", "/dev/ubdc"
Refuse = Callable[..., str]


def wiped(device: str) -> None:
    subprocess.run(["wipefs", "--quiet", "--all", device], check=True)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    wiped(DEVICE)
    wiped(OTHER)
    yield
    wiped(DEVICE)
    wiped(OTHER)


def devices() -> str:
    return subprocess.run(["dmsetup", "ls"], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def refuse(store: Store) -> Refuse:
    """Run a command that must be refused; returns its sentence. Nothing is changed by it."""
    def state() -> tuple[object, ...]:
        layers = [(layer.id, layer.checksum) for layer in store.files.catalog.layers()]
        return devices(), layers, store.files.catalog.pools()

    def refuse(code: int, *arguments: str) -> str:
        before = state()
        done = run_cli(store.files.path, *arguments, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("epochs: ")
        assert "Traceback" not in done.stderr
        assert state() == before
        assert_tidy(store)
        return message

    return refuse


def add(name: str, *disks: str) -> list[str]:
    words = ["add", name, "--memory", "32M", "--accel", "tcg", "--net", "none"]
    for disk in disks:
        words += ["--disk", disk]
    return words


# -- pools ---------------------------------------------------------------------------------------
def test_devices_that_are_no_place_for_a_pool(store: Store, refuse: Refuse, tmp_path: Path) -> None:
    make = ["pool", "create", "fast"]
    assert "does not exist" in refuse(2, *make, "/dev/nothing")
    assert "neither a file nor a block device" in refuse(4, *make, "/dev/null")
    subprocess.run(["mkfs.ext4", "-q", DEVICE], check=True)
    assert "holds ext4" in refuse(4, *make, DEVICE)
    (tmp_path / "mount").mkdir()
    subprocess.run(["mount", DEVICE, str(tmp_path / "mount")], check=True)
    try:
        for force in ([], ["--force"]):
            assert "mounted on" in refuse(4, *make, DEVICE, *force)
    finally:
        subprocess.run(["umount", DEVICE], check=True)
    wiped(DEVICE)
    with group(DEVICE):
        assert "an LVM physical volume" in refuse(4, *make, DEVICE)
        lvm("lvcreate", "--quiet", "--size", "32M", "--name", "lv", GROUP)
        assert "in use" in refuse(4, *make, DEVICE, "--force")
    table = f"0 2048 linear {DEVICE} 0"
    subprocess.run(["dmsetup", "create", "over", "--table", table], check=True)
    try:
        assert "in use" in refuse(4, *make, DEVICE, "--force")
    finally:
        subprocess.run(["dmsetup", "remove", "over"], check=True)
    assert "needs at least" in refuse(4, *make, str(tmp_path / "tiny.img"), "--size", "1M")
    assert not (tmp_path / "tiny.img").exists()
    assert "there is no pool" in refuse(3, "pool", "extend", "nothing")


def test_a_pool_that_is_not_what_it_was(store: Store, refuse: Refuse, tmp_path: Path) -> None:
    image = tmp_path / "pool.img"
    run_cli(store.files.path, "pool", "create", "fast", str(image), "--size", "64M")
    random_image(tmp_path / "disk.img", 4 * MIB)
    disk = f"a={tmp_path / 'disk.img'},backend=dmthin"
    run_cli(store.files.path, *add("web", disk))
    whole = image.read_bytes()
    os.truncate(image, 32 * MIB)
    assert "was cut short" in refuse(5, "start", "web")
    assert "was cut short" in cli_json(
        store.files.path, "pool", "status", "fast")["trouble"]  # type: ignore[index]
    image.write_bytes(whole)
    image.rename(tmp_path / "away.img")
    assert "bring the device or file back" in refuse(5, "start", "web")
    with Store(tmp_path / "other") as other:
        other.create_pool("fast", image, size=64 * MIB)
    assert "carries another pool" in refuse(5, "start", "web")
    image.unlink()
    (tmp_path / "away.img").rename(image)
    run_cli(store.files.path, "start", "web")
    run_cli(store.files.path, "stop", "--kill", "web")
    # A pool of another time than the catalog: brought back from a copy that was made before.
    run_cli(store.files.path, "start", "web")
    run_cli(store.files.path, "create", "web")
    run_cli(store.files.path, "stop", "--kill", "web")
    later = image.read_bytes()
    image.write_bytes(whole)
    assert "brought back from another time" in refuse(5, "start", "web")
    image.write_bytes(later)
    run_cli(store.files.path, "start", "web")
    assert store.verify() == []


# -- volumes -------------------------------------------------------------------------------------
@pytest.fixture
def image(tmp_path: Path) -> Path:
    random_image(tmp_path / "disk.img", 8 * MIB)
    return tmp_path / "disk.img"


def test_disks_that_are_no_volumes(store: Store, refuse: Refuse, image: Path,
                                   tmp_path: Path) -> None:
    assert "does not exist" in refuse(3, *add("web", "a=/dev/novg/lv,backend=lvm"))
    assert "is no logical volume" in refuse(4, *add("web", f"a={image},backend=lvm"))
    assert "is no logical volume" in refuse(4, *add("web", f"a={OTHER},backend=lvm"))
    with group(DEVICE, pool="64M"):
        thin, thick = volume("thin", image, thin=True), volume("thick", image, thin=False)
        assert "takes backend=lvm-thin" in refuse(4, *add("web", f"a={thin},backend=lvm-thick"))
        assert "ordinary volumes" in refuse(4, *add("web", f"a={thin},backend=lvm,snapshot=8M"))
        assert "unknown option" in refuse(2, *add("web", f"a={thin},backend=lvm,cow=8M"))
        lvm("lvcreate", "--quiet", "--snapshot", "--name", "snap", "--size", "8M", f"{GROUP}/thick")
        assert "is a snapshot" in refuse(4, *add("web", f"a=/dev/{GROUP}/snap,backend=lvm"))
        lvm("lvremove", "--quiet", "--yes", f"{GROUP}/snap")
        subprocess.run(["mkfs.ext4", "-q", thick], check=True)
        (tmp_path / "mount").mkdir()
        subprocess.run(["mount", thick, str(tmp_path / "mount")], check=True)
        try:
            assert "mounted on" in refuse(4, *add("web", f"a={thick},backend=lvm"))
        finally:
            subprocess.run(["umount", thick], check=True)


def test_a_volume_that_is_not_what_it_was(store: Store, refuse: Refuse, image: Path) -> None:
    os.truncate(image, 64 * MIB)
    with group(DEVICE):
        thick = volume("thick", image, thin=False)
        run_cli(store.files.path, *add("web", f"a={thick},backend=lvm"))
        assert "the disk of a machine already" in refuse(4, *add("two", f"a={thick},backend=lvm"))
        lvm("lvextend", "--quiet", "--size", "+8M", f"{GROUP}/thick")
        assert "bring it back to that size" in refuse(6, "start", "web")
        lvm("lvreduce", "--quiet", "--yes", "--force", "--size", "-8M", f"{GROUP}/thick")
        lvm("lvrename", "--quiet", GROUP, "thick", "away")
        assert "is gone" in refuse(6, "start", "web")
        volume("thick", image, thin=False)
        assert "is another volume" in refuse(6, "start", "web")
        lvm("lvremove", "--quiet", "--yes", f"{GROUP}/thick")
        lvm("lvrename", "--quiet", GROUP, "away", "thick")
        run_cli(store.files.path, "start", "web")
        made = store.machine("web").create()
        # What an administrator may do to a snapshot.
        (layer,) = made.disks.values()
        lvm("lvremove", "--quiet", "--yes", f"{GROUP}/epochs-{layer}")
        done = run_cli(store.files.path, "rollback", "web", made.id, "--discard", check=False)
        assert done.returncode == 6
        assert "is missing from its volume group" in done.stderr
        assert store.machine("web").status()["state"] == "running"
        # No room for a snapshot that could not overflow.
        lvm("lvcreate", "--quiet", "--size", "148M", "--name", "rest", GROUP)
        assert "option snapshot=SIZE" in refuse(4, "create", "web")
        lvm("lvextend", "--quiet", "--extents", "+100%FREE", f"{GROUP}/rest")
        assert "extend it with 'vgextend'" in refuse(4, "create", "web")
        assert store.machine("web").status()["state"] == "running"
        lvm("lvremove", "--quiet", "--yes", f"{GROUP}/rest")
        store.machine("web").remove(force=True, with_epochs=True)
        assert {one["lv_name"] for one in volumes()} == {"thick"}
        lvm("lvchange", "--activate", "n", GROUP)


# -- a snapshot that is lost while a machine goes back to it --------------------------------------
@pytest.fixture
def lossy(store: Store, image: Path, tmp_path: Path) -> Iterator[tuple[Machine, Epoch]]:
    """A running machine on an ordinary volume and a file, its epoch and what came later."""
    os.truncate(image, 64 * MIB)
    random_image(tmp_path / "other.img", 4 * MIB)
    with group(DEVICE):
        web = store.add("web", MachineSpec(memory=32 * MIB, accel="tcg", net="none", disks=(
            DiskSpec("a", volume("thick", image, thin=False), "raw", "lvm", snapshot=8 * MIB),
            DiskSpec("b", str(tmp_path / "other.img"), "raw", "qcow2"))))
        web.start()
        yield web, web.create()
        web.remove(force=True, with_epochs=True)
        assert {one["lv_name"] for one in volumes()} == {"thick"}
        lvm("lvchange", "--activate", "n", GROUP)


def overflow_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At that point of a command so much is written to the volume that its snapshot gets full."""
    hit = points.hit

    def hook(name: str) -> None:
        if name == point:
            subprocess.run(["dd", "if=/dev/urandom", f"of=/dev/{GROUP}/thick", "bs=1M", "count=12",
                            "seek=32", "oflag=direct", "conv=notrunc", "status=none"], check=True)
        hit(name)

    monkeypatch.setattr(points, "hit", hook)


def test_lost_before_the_switch(lossy: tuple[Machine, Epoch], store: Store,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is switched, and the old guest goes on."""
    web, first = lossy
    old = web.status()["pid"]
    overflow_at("rollback.prepared", monkeypatch)
    with pytest.raises(LayerDamaged, match="is full and what it kept is lost"):
        web.rollback(first, keep=False)
    monkeypatch.undo()
    status = web.status()
    assert (status["state"], status["pid"]) == ("running", old)
    assert_tidy(store)
    second = web.create()
    web.rollback(second, keep=False)
    assert store.verify([second]) == []


def test_lost_after_the_switch(lossy: tuple[Machine, Epoch], store: Store,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is off with its volume as it is, and that is said; its other disk, whose epoch
    was not lost, is where it was to go."""
    web, first = lossy
    said: list[str] = []
    monkeypatch.setattr(store.files, "notice", said.append)
    overflow_at("rollback.old-gone", monkeypatch)
    with pytest.raises(LayerDamaged, match="is full and what it kept is lost"):
        web.rollback(first, keep=False)
    monkeypatch.undo()
    assert any("is off, and its disks may be a mixture" in line for line in said), said
    assert web.status()["state"] == "off"
    assert_tidy(store)
    catalog = store.files.catalog
    chains = {disk.name: [layer.id for layer in catalog.chain(disk.active or disk.base)]
              for disk in catalog.disks(web.record.id)}
    assert first.disks["a"] not in chains["a"]
    assert first.disks["b"] in chains["b"]
    web.start()
    second = web.create()
    web.rollback(second, keep=False)
    assert store.verify([second]) == []


def test_a_thin_snapshot_that_is_gone(store: Store, refuse: Refuse, image: Path) -> None:
    with group(DEVICE, pool="100M"):
        thin = volume("thin", image, thin=True)
        run_cli(store.files.path, *add("web", f"a={thin},backend=lvm"))
        run_cli(store.files.path, "start", "web")
        made = store.machine("web").create()
        (layer,) = made.disks.values()
        lvm("lvremove", "--quiet", "--yes", f"{GROUP}/epochs-{layer}")
        done = run_cli(store.files.path, "rollback", "web", made.id, "--discard", check=False)
        assert done.returncode == 6
        assert "is missing from its pool" in done.stderr
        assert store.machine("web").status()["state"] == "running"
        store.machine("web").remove(force=True, with_epochs=True)
        assert {one["lv_name"] for one in volumes()} == {"thin", "pool"}
        lvm("lvchange", "--activate", "n", GROUP)


# -- dmsnap --------------------------------------------------------------------------------------
def test_dmsnap(store: Store, refuse: Refuse, image: Path, tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(image), str(tmp_path / "q")],
                   check=True)
    assert "convert it" in refuse(4, *add("web", f"a={tmp_path / 'q'},backend=dmsnap"))
    run_cli(store.files.path, *add("web", f"a={image},backend=dmsnap"))
    content = image.read_bytes()
    image.write_bytes(b"other" + content[5:])
    assert "was modified since it was added" in refuse(6, "start", "web")
    image.write_bytes(content)
    run_cli(store.files.path, "start", "web")
    made = store.machine("web").create()
    (layer,) = made.disks.values()
    store_file = store.files.layers_dir / f"{layer}.cow"
    data = bytearray(store_file.read_bytes())
    data[0] ^= 1
    store_file.write_bytes(data)
    assert "is damaged" in refuse(6, "fork", made.id, "trial")
    data[0] ^= 1
    store_file.write_bytes(data)
    run_cli(store.files.path, "fork", made.id, "trial")
    store.machine("trial").remove(force=True)
