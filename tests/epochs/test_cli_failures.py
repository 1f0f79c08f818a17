"""How commands end when the store, the disk or the words are bad: exit code, sentence, nothing
changed. No guest runs here; tests/system/test_bad_input.py has those that need one."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import blockcow
import blockcow.devmapper
import blockcow.dmsnap
import blockcow.dmthin
import blockcow.lvm_thick
import blockcow.lvm_thin
import memsave.errors
from epochs import errors
from epochs.cli import cli, failures
from epochs.cli.failures import describe
from epochs.points import FaultInjected
from epochs.qemu.agent import AgentSilent
from epochs.qemu.monitor import MonitorError
from epochs.xen.domains import SavedByAnother

ROOT = Path(__file__).resolve().parents[2]


def run(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process: a start of Python per case would be most of the time."""
    out, err = io.StringIO(), io.StringIO()
    given = ["--store", str(store), *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        code = failures.run(cli, given)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def assert_sentence(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert done.returncode == code, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith("epochs: "), done.stderr
    assert words in last
    assert "Traceback" not in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    assert run(path, "list").returncode == 0
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    file = tmp_path / "disk.img"
    with file.open("wb") as handle:
        handle.truncate(2**20)
    return file


def catalog(store: Path, statement: str) -> None:
    database = sqlite3.connect(store / "catalog.sqlite")
    with database:
        database.execute(statement)
    database.close()


# -- the store -------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [["list"], ["log"], ["start", "web"], ["gc"], ["recover"]])
def test_a_store_of_a_newer_version_is_refused_and_left_alone(store: Path,
                                                              command: list[str]) -> None:
    catalog(store, "PRAGMA user_version = 99")
    before = (store / "catalog.sqlite").read_bytes()
    done = run(store, "--json", *command)
    assert_sentence(done, 4, "made by a newer Epochs (catalog version 99")
    assert json.loads(done.stdout)["error"]["kind"] == "Refused"
    assert (store / "catalog.sqlite").read_bytes() == before
    catalog(store, "PRAGMA user_version = 1")
    assert run(store, "list").returncode == 0, "it was the version alone"


def in_a_mount_namespace(store: Path, script: str) -> subprocess.CompletedProcess[str]:
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    return subprocess.run(
        [*unshare, "sh", "-c", script + '\nexec "$0" -m epochs --store "$STORE" list',
         sys.executable], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "STORE": str(store)})


def test_a_read_only_store_is_refused(store: Path) -> None:
    writable = in_a_mount_namespace(store, 'mount --bind "$STORE" "$STORE" || exit 77')
    if writable.returncode == 77:
        pytest.skip("this user cannot mount in a namespace of its own")
    assert writable.returncode == 0, "the mount alone is no reason to refuse"
    done = in_a_mount_namespace(store, 'mount --bind "$STORE" "$STORE" && '
                                       'mount -o remount,ro,bind "$STORE" || exit 77')
    assert_sentence(done, 4, "is not writable; name another with --store")


def test_a_catalog_that_is_no_database_ends_with_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / "broken"
    place.mkdir()
    (place / "catalog.sqlite").write_bytes(b"no database at all " * 100)
    before = (place / "catalog.sqlite").read_bytes()
    assert_sentence(run(place, "list"), 5, "cannot be opened: file is not a database")
    assert (place / "catalog.sqlite").read_bytes() == before


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "other"
    place.mkdir()
    catalog(place, "CREATE TABLE songs (name TEXT)")
    assert_sentence(run(place, "list"), 4, "is no catalog of Epochs")


def test_a_store_that_is_a_file_is_refused(disk: Path) -> None:
    assert_sentence(run(disk, "list"), 4, "cannot be used: File exists")
    assert disk.stat().st_size == 2**20


# -- what add is given -----------------------------------------------------------------------------
@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["../web", "--memory", "64M"], 2, "is not a machine name"),
    (["-web", "--memory", "64M"], 2, ""),
    (["w@b", "--memory", "64M"], 2, "is not a machine name"),
    (["w" * 64, "--memory", "64M"], 2, "is not a machine name"),
    (["web", "--memory", "lots"], 2, "is not a memory size"),
    (["web", "--memory", "0"], 4, "memory of 0 bytes is not possible"),
    (["web", "--memory", "900T"], 4, "more than this host has"),
    (["web", "--memory", "64M", "--cpus", "0"], 4, "0 CPUs are not possible"),
    (["web", "--memory", "64M", "--cpus", "two"], 2, "not a valid integer"),
    (["web", "--memory", "64M", "--append", "quiet"], 2, "go with --kernel"),
    (["web", "--memory", "64M", "--kernel", "/nonexistent"], 3, "does not exist"),
    (["web", "--memory", "64M", "--disk", "root=DISK,colour=red"], 2, "unknown option"),
    (["web", "--memory", "64M", "--disk", "root=DISK,format=qcow2"], 4, "is not qcow2 but raw"),
    (["web", "--memory", "64M", "--disk", "root=DISK,backend=tape"], 4, "no backend 'tape'"),
    (["web", "--memory", "64M", "--disk", "a=DISK", "--disk", "b=DISK"], 4, "given twice"),
    (["web", "--memory", "64M", "--", "-m", "1G"], 4, "Epochs sets it itself"),
    (["web", "--memory", "64M", "--", "-device", "virtio-balloon"], 4, "discard"),
])
def test_a_bad_machine_is_refused_and_not_added(store: Path, disk: Path, arguments: list[str],
                                                code: int, words: str) -> None:
    given = [one.replace("DISK", str(disk)) for one in arguments]
    if not any(one.startswith("--disk") for one in given):
        given[1:1] = ["--disk", f"root={disk}"]
    assert_sentence(run(store, "add", *given), code, words)
    assert json.loads(run(store, "--json", "list").stdout) == {"machines": []}
    assert list((store / "layers").iterdir()) == []
    assert disk.read_bytes() == bytes(2**20)


def test_the_same_machine_without_its_fault_is_added(store: Path, disk: Path) -> None:
    done = run(store, "add", "web", "--disk", f"root={disk}", "--memory", "64M", "--accel", "tcg")
    assert done.returncode == 0, "else the refusals above prove nothing"


@pytest.mark.parametrize(("command", "words"), [
    (["start", "nobody"], "no machine 'nobody'"), (["log", "nobody"], "no machine 'nobody'"),
    (["remove", "nobody"], "no machine 'nobody'"), (["console", "nobody", "--log"], "no machine"),
    (["show", "abcdef"], "no epoch 'abcdef'"), (["fork", "abcdef", "x"], "no epoch 'abcdef'"),
    (["delete", "abcdef"], "no epoch 'abcdef'"), (["verify", "abcdef"], "no epoch 'abcdef'"),
    (["diff", "abcdef", "abcdef"], "no epoch"), (["tag", "abcdef", "x"], "no epoch"),
    (["show", "nobody@x"], "no machine 'nobody'"),
])
def test_what_does_not_exist_is_not_found(store: Path, command: list[str], words: str) -> None:
    in_words, as_json = run(store, *command), run(store, "--json", *command)
    assert_sentence(in_words, 3, words)
    assert in_words.stdout == ""
    error = json.loads(as_json.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == ("NotFound", 3)
    assert in_words.stderr == f"epochs: {error['message']}\n"


# -- docs/errors.md --------------------------------------------------------------------------------
def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for one in kind.__subclasses__():
        if one.__module__.split(".")[0] in ("epochs", "blockcow", "memsave"):
            yield one
        yield from subclasses(one)


def built(kind: type[BaseException]) -> Exception:
    """An exception of that class, with whatever its constructor wants."""
    found: BaseException
    if issubclass(kind, blockcow.LayerDamaged):
        found = kind("words", "layer", Path("/file"))
    elif issubclass(kind, blockcow.devmapper.DmError):
        found = kind("words", 5)
    elif issubclass(kind, memsave.errors.MemoryDamaged):
        found = kind("words", Path("/file"))
    elif issubclass(kind, MonitorError):
        found = kind("migrate", "words")
    else:
        found = kind("words")
    assert isinstance(found, Exception)
    return found


def documented() -> dict[str, set[int]]:
    rows = re.findall(r"^\| (\d+) \| `?(\w+)`? \|", (ROOT / "docs/errors.md").read_text(),
                      re.MULTILINE)
    found: dict[str, set[int]] = {}
    for code, name in rows:
        found.setdefault(name, set()).add(int(code))
    return found


def test_every_error_is_documented_with_the_exit_code_it_has() -> None:
    kinds = {errors.EpochsError, blockcow.BlockError, memsave.errors.MemsaveError, FaultInjected,
             AgentSilent, MonitorError, SavedByAnother}
    kinds |= set(subclasses(errors.EpochsError)) | set(subclasses(blockcow.BlockError))
    kinds |= set(subclasses(memsave.errors.MemsaveError))
    table = documented()
    for kind in kinds - {errors.EpochsError}:
        assert describe(built(kind))[2] in table.get(kind.__name__, set()), kind
    names = {kind.__name__ for kind in kinds} | {"OSError"}
    assert set(table) <= names, "and no class that there is not"


@pytest.mark.parametrize(("error", "code"), [
    (blockcow.SourceRefused("/disk does not exist: check the path"), 3),
    (blockcow.SourceRefused("/disk is in use by process 7: stop it"), 4),
    (OSError(28, "No space left on device", "/store/packs/x"), 5),
    (OSError(13, "Permission denied", "/picture.png"), 5),
    (ValueError("never meant to happen"), 5),
])
def test_foreign_errors_have_their_codes(error: Exception, code: int) -> None:
    _, sentence, found, _ = describe(error)
    assert found == code
    assert "\n" not in sentence


def test_damage_names_its_file() -> None:
    for error in (blockcow.LayerDamaged("layer x is missing", "x", Path("/s/layers/x")),
                  memsave.errors.MemoryDamaged("pack y is cut off", Path("/s/layers/x"))):
        _, _, code, more = describe(error)
        assert code == 6
        assert more == {"findings": [{"file": "/s/layers/x"}]}


@pytest.mark.parametrize("backend", ["dmthin", "lvm", "dmsnap"])
def test_without_device_mapper_its_backends_are_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def no_driver() -> None:
        raise blockcow.devmapper.DmUnavailable("device-mapper is not there: no driver", 19)

    for module in ("device_freeze", "thin_layers", "lvm_thick", "dmsnap"):
        monkeypatch.setattr(f"blockcow.{module}.open_driver", no_driver)
    (tmp_path / "disk.img").write_bytes(bytes(2**20))
    store = tmp_path / "store"
    done = run(store, "add", "web", "--memory", "64M", "--disk",
               f"a={tmp_path / 'disk.img'},format=raw,backend={backend}")
    assert_sentence(done, 4, "device-mapper is not there")
    assert_sentence(run(store, "pool", "create", "fast", str(tmp_path / "p"), "--size", "64M"), 4,
                    "a pool needs device-mapper")
    assert not (tmp_path / "p").exists()
