"""doctor: every lack is told with what mends it, and decides the exit code."""

from __future__ import annotations

import io
import json
import sqlite3
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import memsave
import memsave.errors
from blockcow import devmapper, fuse
from epochs import doctor
from epochs.catalog import new_journal
from epochs.cli import cli, failures
from epochs.processes import ProcessId
from epochs.qemu import binary, yama
from epochs.store import StoreFiles


@pytest.fixture(autouse=True)
def no_kvm_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one takes seconds where KVM does not work."""
    monkeypatch.setattr(binary, "kvm_refusal", lambda _qemu: "it does not run here")


def examine(store: Path) -> tuple[int, dict[str, doctor.Check], str]:
    """Exit code, checks by name, and what people are shown."""
    shown, document = io.StringIO(), io.StringIO()
    with redirect_stdout(document):
        code = failures.run(cli, ["--json", "--store", str(store), "doctor"])
    with redirect_stdout(shown):
        assert failures.run(cli, ["--store", str(store), "doctor"]) == code
    checks = [doctor.Check(**one) for one in json.loads(document.getvalue())["checks"]]
    for check in checks:
        assert f"{check.mark} {check.name}" in shown.getvalue()
        if check.state != doctor.GOOD:
            assert check.mend, check
            assert f"mend: {check.mend}" in shown.getvalue()
    return code, {check.name: check for check in checks}, shown.getvalue()


def test_a_host_with_all_it_needs_passes(tmp_path: Path) -> None:
    code, checks, _ = examine(tmp_path / "store")
    assert code == 0, checks
    assert checks["KVM"].state == doctor.LACKING, "slower, but it works"
    assert checks["interrupted commands"].state == doctor.GOOD


def test_without_qemu_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS_QEMU", "/nonexistent/qemu")
    code, checks, _ = examine(tmp_path / "store")
    assert code == 4
    assert checks["QEMU"].state == doctor.MISSING
    assert "apt-get install" in str(checks["QEMU"].mend)


def test_yama_in_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yama, "scope", lambda: 3)
    code, checks, _ = examine(tmp_path / "store")
    assert (code, checks["guest memory"].state) == (4, doctor.MISSING)
    assert "ptrace_scope" in str(checks["guest memory"].mend)


def test_memory_that_cannot_be_inspected_is_told(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise memsave.errors.MemsaveError("the memory of process 1 cannot be inspected")

    monkeypatch.setattr(memsave, "GuestMemory", refused)
    code, checks, _ = examine(tmp_path / "store")
    assert (code, checks["written pages"].state) == (4, doctor.MISSING)


def test_a_store_of_a_newer_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    StoreFiles(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    code, checks, _ = examine(tmp_path)
    assert (code, checks["store"].mend) == (4, "upgrade Epochs")


def test_a_catalog_that_lost_a_table_is_a_finding(tmp_path: Path) -> None:
    StoreFiles(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as database:
        database.execute("DROP TABLE journal")
    database.close()
    code, checks, _ = examine(tmp_path)
    assert (code, checks["catalog"].state) == (4, doctor.MISSING)


def test_an_interrupted_command_is_told_and_not_settled(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    operator = ProcessId.of(child.pid)
    child.kill()
    child.wait()
    files = StoreFiles(tmp_path)
    record = new_journal("j", "create", None, {})
    with files.catalog.transaction():
        files.catalog.begin(record.__class__(**{**vars(record), "operator": operator}))
    files.close()
    code, checks, _ = examine(tmp_path)
    assert (code, checks["interrupted commands"].mend) == (0, "epochs recover")
    files = StoreFiles(tmp_path)
    assert [one.id for one in files.catalog.journal()] == ["j"], "doctor only looks"
    files.close()


def test_a_host_without_device_mapper_says_what_still_works(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise devmapper.DmUnavailable("device-mapper is not there: the kernel has no driver for "
                                      "it; 'modprobe dm-mod' loads it", 19)

    monkeypatch.setattr(devmapper, "open_driver", no_driver)
    code, checks, _ = examine(tmp_path / "store")
    assert code == 0, "machines on files need none"
    found = checks["device-mapper"]
    assert found.state == doctor.LACKING
    assert "the kernel has no driver" in found.detail
    assert "no pools, no disks on LVM and no dmsnap; disks on files (qcow2, reflink) work" in (
        found.detail)
    assert "modprobe dm-mod" in str(found.mend)
    assert "LVM" not in checks, "it would be of no use"


def test_mounting_needs_root_and_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    assert examine(tmp_path / "store")[1]["mount"].state == doctor.LACKING
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 0)
    monkeypatch.setattr(fuse, "refusal", lambda: "the kernel has no FUSE")
    found = examine(tmp_path / "store")[1]["mount"]
    assert (found.state, found.mend) == (doctor.LACKING, "modprobe fuse")
