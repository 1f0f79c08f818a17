"""Bad input: its sentence, its exit code, and nothing changed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epochs import Machine, Store
from memsave import MemsaveError
from tests.commands import run_cli

from .guest import Artefacts, assert_tidy, mounted, wait_console, wait_witness

pytestmark = pytest.mark.guest
Refuse = Callable[..., str]


def snapshot(store: Path) -> list[str]:
    """Names of everything in a store but locks and SQLite's side files."""
    return sorted(str(path.relative_to(store)) for path in store.rglob("*")
                  if "locks" not in path.parts and "catalog" not in path.name
                  and path.name not in ("kvm-probe.json", "console.log"))


@pytest.fixture
def refuse(store: Store) -> Refuse:
    """Run a command that must be refused: returns what it said; the store must be unchanged."""
    def refuse(code: int, *arguments: str, **more: str) -> str:
        before, machines = snapshot(store.files.path), [m.name for m in store.machines()]
        done = run_cli(store.files.path, *arguments, check=False, **more)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("epochs: "), done.stderr
        assert "Traceback" not in done.stderr
        assert snapshot(store.files.path) == before
        assert [m.name for m in store.machines()] == machines
        assert_tidy(store)
        return message

    return refuse


def add_arguments(tiny: Artefacts, name: str, *disks: str, memory: str = "128M") -> list[str]:
    directory = tiny.directory
    arguments = ["add", name, "--memory", memory, "--accel", "tcg",
                 "--kernel", str(directory / "vmlinuz"), "--initrd", str(directory / "initrd"),
                 "--append", (directory / "append").read_text().strip()]
    for disk in disks:
        arguments += ["--disk", disk]
    return arguments


def test_names_that_do_not_exist(store: Store, boot: Callable[..., Machine],
                                 refuse: Refuse) -> None:
    web = boot()
    web.create(tags=["one"])
    assert "no machine 'nobody'" in refuse(3, "create", "nobody")
    assert "no machine 'nobody'" in refuse(3, "rollback", "nobody", "web@one")
    assert "no epoch" in refuse(3, "rollback", "web", "0000000000")
    assert "no epoch tagged" in refuse(3, "fork", "web@two", "trial")
    assert "only 0 before it" in refuse(3, "show", "web~1")
    wait_witness(web, 0)


def test_an_ambiguous_prefix(store: Store, boot: Callable[..., Machine], refuse: Refuse,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    from epochs.protocol import create

    web = boot()
    original = create.new_id
    monkeypatch.setattr(create, "new_id", lambda: "abcd" + original()[4:])
    first, second = web.create(), web.create()
    message = refuse(4, "show", "abcd")
    assert first.id[:12] in message
    assert second.id[:12] in message
    assert "no epoch 'abc'; a prefix needs 4" in refuse(3, "show", "abc")
    assert run_cli(store.files.path, "show", first.id[:12]).returncode == 0


def test_duplicate_names(store: Store, boot: Callable[..., Machine], tiny: Artefacts,
                         refuse: Refuse) -> None:
    web = boot()
    web.create(tags=["one"])
    disk = f"a={tiny.directory / 'a.img'}"
    assert "machine 'web' already" in refuse(4, *add_arguments(tiny, "web", disk))
    assert "machine 'web' already" in refuse(4, "fork", "web@one", "web")
    assert "tag 'one' already" in refuse(4, "create", "web", "-t", "one")
    assert "given twice" in refuse(4, *add_arguments(tiny, "new", disk, disk))
    wait_witness(web, 0)


def test_names_that_are_no_names(tiny: Artefacts, refuse: Refuse) -> None:
    disk = f"a={tiny.directory / 'a.img'}"
    for name in ("../web", "a b", ".web", "web@1", "web~1", "x" * 64):
        assert "not a machine name" in refuse(2, *add_arguments(tiny, name, disk))
    refuse(2, *add_arguments(tiny, "", disk))


def test_disks_that_cannot_be_used(store: Store, tiny: Artefacts, refuse: Refuse,
                                   tmp_path: Path) -> None:
    assert "does not exist" in refuse(3, *add_arguments(tiny, "new", f"a={tmp_path}/none.img"))
    assert "directory" in refuse(4, *add_arguments(tiny, "new", f"a={tmp_path}"))
    text = tmp_path / "text.img"
    text.write_text("this is no disk\n")
    refuse(4, *add_arguments(tiny, "new", f"a={text},format=qcow2"))
    refuse(4, *add_arguments(tiny, "new", f"a={text}"))  # 16 bytes: no whole sector
    refuse(2, *add_arguments(tiny, "new", f"a={text},colour=red"))
    refuse(4, *add_arguments(tiny, "new", f"a={text},backend=punchcards"))
    used = tmp_path / "used.img"
    shutil.copyfile(tiny.directory / "a.img", used)
    with used.open("r+b"):
        assert "in use" in refuse(4, *add_arguments(tiny, "new", f"a={used}"))
    done = run_cli(store.files.path, *add_arguments(tiny, "new", f"a={used}"))
    assert done.returncode == 0, "the same file, once it is free"


def test_a_disk_that_another_qemu_writes_to(store: Store, tiny: Artefacts, refuse: Refuse,
                                            tmp_path: Path) -> None:
    used = tmp_path / "used.img"
    shutil.copyfile(tiny.directory / "a.img", used)
    qmp = tmp_path / "q"
    with subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults",
             "-blockdev", f"driver=file,filename={used},node-name=x", "-S",
             "-qmp", f"unix:{qmp},server=on,wait=on"], stdin=subprocess.DEVNULL) as other:
        with socket.socket(socket.AF_UNIX) as monitor:
            while True:  # QEMU has opened its disk before it serves the monitor
                try:
                    monitor.connect(str(qmp))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    assert other.poll() is None
            monitor.recv(1)
            assert "in use" in refuse(4, *add_arguments(tiny, "new", f"a={used}"))
        other.kill()


def test_memory_that_is_not_there(tiny: Artefacts, refuse: Refuse) -> None:
    disk = f"a={tiny.directory / 'a.img'}"
    assert "not possible" in refuse(4, *add_arguments(tiny, "new", disk, memory="0"))
    assert "more than this host has" in refuse(
        4, *add_arguments(tiny, "new", disk, memory="900T"))
    assert "not a memory size" in refuse(2, *add_arguments(tiny, "new", disk, memory="lots"))


def test_qemu_that_is_missing_or_dies_at_start(store: Store, tiny: Artefacts, refuse: Refuse,
                                               tmp_path: Path) -> None:
    disk = f"a={tiny.directory / 'a.img'}"
    assert "QEMU is not there" in refuse(3, *add_arguments(tiny, "new", disk),
                                         EPOCHS_QEMU=str(tmp_path / "none"))
    run_cli(store.files.path, *add_arguments(tiny, "new", disk), "--", "-device", "no-such-device")
    assert "'no-such-device' is not a valid device" in refuse(5, "start", "new")
    assert "off" in run_cli(store.files.path, "status", "new").stdout


def test_options_that_would_damage_epochs(tiny: Artefacts, refuse: Refuse) -> None:
    disk = f"a={tiny.directory / 'a.img'}"
    assert "discard guest memory" in refuse(
        4, *add_arguments(tiny, "new", disk), "--", "-device", "virtio-balloon-pci")
    assert "sets it itself" in refuse(4, *add_arguments(tiny, "new", disk), "--", "-m", "1G")


def test_a_device_that_blocks_migration(store: Store, tiny: Artefacts, refuse: Refuse,
                                        tmp_path: Path) -> None:
    """ivshmem-plain marks the machine unmigratable as long as it is its shared memory's master
    elsewhere; QEMU's own reason is what the user sees."""
    disk = f"a={tiny.directory / 'a.img'}"
    run_cli(store.files.path, *add_arguments(tiny, "new", disk), "--",
            "-object", f"memory-backend-file,id=shm,mem-path={tmp_path}/shm,size=1M,share=on",
            "-device", "ivshmem-plain,memdev=shm,master=off")
    run_cli(store.files.path, "start", "new")
    message = refuse(4, "create", "new")
    assert "cannot be checkpointed" in message
    assert "ivshmem" in message
    assert store.machine("new").status()["state"] == "running"


def test_a_store_of_a_newer_version(store: Store, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(store.files.path / "catalog.sqlite") as catalog:
        catalog.execute("PRAGMA user_version = 99")
    catalog.close()
    try:
        done = run_cli(store.files.path, "list", check=False)
        assert done.returncode == 4
        assert "newer Epochs" in done.stderr
    finally:
        with sqlite3.connect(store.files.path / "catalog.sqlite") as catalog:
            catalog.execute("PRAGMA user_version = 1")
        catalog.close()


def test_a_second_command_waits_with_a_message(store: Store, boot: Callable[..., Machine]) -> None:
    web = boot()
    record = store.files.catalog.machine("web")
    with store.files.machine_lock(record.id, "web"):
        done = run_cli(store.files.path, "create", "web", check=False, EPOCHS_WAIT="0.3")
        assert done.returncode == 4
        assert "waiting for another command" in done.stderr
        assert "try again" in done.stderr
        environment = {**os.environ, "EPOCHS_STORE": str(store.files.path)}
        second = subprocess.Popen([sys.executable, "-m", "epochs", "create", "web"],
                                  env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True)
        assert second.stderr is not None
        assert "waiting for another command" in second.stderr.readline()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0, out
    assert len(store.epochs()) == 1
    wait_witness(web, 0)


# -- a store on a small file system --------------------------------------------------------------
@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 512 MiB on a loop device."""
    with mounted(tmp_path, "ext4") as mount:
        yield mount


@pytest.mark.root
def test_a_full_store(small: Path, tiny: Artefacts) -> None:
    with Store(small / "store") as store:
        web = store.add("web", tiny.spec(backend="qcow2"))
        try:
            web.start()
            wait_console(web, "TINY READY")
            web.wait_agent()
            count = wait_witness(web, 0)
            filler = small / "filler"
            stat = os.statvfs(small)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 12 * 2**20)
            done = run_cli(store.files.path, "create", "web", check=False)
            assert done.returncode == 4, done.stderr
            assert "MiB free" in done.stderr
            assert store.epochs() == []
            assert_tidy(store)
            count = wait_witness(web, count)
            filler.unlink()
            run_cli(store.files.path, "create", "web")
            wait_witness(web, count)
        finally:
            (small / "filler").unlink(missing_ok=True)
            web.remove(force=True, with_epochs=True)


@pytest.mark.root
def test_a_store_that_fills_up_while_an_epoch_is_written(
        small: Path, tiny: Artefacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head-room check passed, and then somebody else took the space."""
    from epochs.protocol import freezing

    monkeypatch.setattr(freezing, "check_space", lambda *_, **__: None)
    with Store(small / "store") as store:
        web = store.add("web", tiny.spec(backend="qcow2"))
        try:
            web.start()
            wait_console(web, "TINY READY")
            web.wait_agent()
            count = wait_witness(web, 0)
            filler = small / "filler"
            stat = os.statvfs(small)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 12 * 2**20)
            with pytest.raises((OSError, MemsaveError), match="No space left"):
                web.create()
            filler.unlink()
            store.settle()
            assert store.epochs() == []
            assert_tidy(store)
            if web.status()["state"] == "io-error":  # the guest's own write found no space either
                assert web.start() == "resumed"
            count = wait_witness(web, count)
            epoch = web.create()
            with store.fork(epoch, "probe") as probe:
                wait_witness(probe, 0)
            wait_witness(web, count)
        finally:
            (small / "filler").unlink(missing_ok=True)
            for machine in store.machines():
                machine.remove(force=True, with_epochs=True)


@pytest.mark.root
def test_a_read_only_store(small: Path) -> None:
    with Store(small / "store"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    done = run_cli(small / "store", "list", check=False)
    assert done.returncode == 4
    assert "not writable" in done.stderr or "cannot be used" in done.stderr
