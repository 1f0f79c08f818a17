"""The catalog: what it promises to the protocol modules, without any hypervisor."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from blockcow import Layer
from epochs.catalog import (
    SCHEMA_VERSION,
    Catalog,
    DiskRecord,
    EpochRecord,
    InstanceRecord,
    MachineRecord,
    new_journal,
)
from epochs.errors import Failed, NotFound, Refused
from epochs.processes import ProcessId
from epochs.spec import MachineSpec

SPEC = MachineSpec(memory=2**27)


def machine(name: str, head: str | None = None) -> MachineRecord:
    return MachineRecord(f"id-{name}", name, SPEC, 1.0, "pc-q35-7.2", "52:54:00:0:0:1", "tcg", head)


def layer(layer_id: str, backing: str | None = None) -> Layer:
    return Layer(layer_id, "qcow2", "qcow2", f"{layer_id}.qcow2", 2**20, backing)


def epoch(epoch_id: str, parent: str | None = None) -> EpochRecord:
    return EpochRecord(epoch_id, "id-web", "web", parent, time.time(), "", SPEC,
                       {"qemu": "7.2.0"}, "c", "s", 1, False, {})


@pytest.fixture
def catalog(tmp_path: Path):
    opened = Catalog(tmp_path / "catalog.sqlite")
    yield opened
    opened.close()


def with_line(catalog: Catalog) -> None:
    """web with epochs a <- b <- c, layers base <- la <- lb <- lc, head c."""
    with catalog.transaction():
        for one in (layer("base"), layer("la", "base"), layer("lb", "la"), layer("lc", "lb"),
                    layer("active", "lc")):
            catalog.put_layer(one)
        catalog.add_machine(machine("web"), [DiskRecord("root", "qcow2", "base", "active")])
        catalog.add_pack("p1", "sig")
        for one, parent in (("a", None), ("b", "a"), ("c", "b")):
            catalog.add_epoch(epoch(one, parent), {"root": f"l{one}"}, ["p1"])
        catalog.set_head("id-web", "c")


def test_a_file_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    Catalog(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(Refused, match="newer Epochs"):
        Catalog(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_catalog_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(Failed, match="cannot be opened"):
        Catalog(path)


def test_another_application_s_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(Refused, match="no catalog of Epochs"):
        Catalog(path)


def test_a_transaction_is_whole_or_nothing(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog.transaction():
        catalog.add_machine(machine("web"), [])
        raise RuntimeError
    assert catalog.machines() == []


def test_a_machine_name_is_unique(catalog: Catalog) -> None:
    with catalog.transaction():
        catalog.add_machine(machine("web"), [])
    with pytest.raises(Refused, match="machine 'web' already"), catalog.transaction():
        catalog.add_machine(MachineRecord("other", "web", SPEC, 1.0, "t", "m", "tcg", None), [])


def test_an_unknown_machine_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match="no machine 'web'"):
        catalog.machine("web")


def test_the_chain_is_top_first(catalog: Catalog) -> None:
    with_line(catalog)
    assert [one.id for one in catalog.chain("active")] == ["active", "lc", "lb", "la", "base"]


def test_forgetting_an_epoch_joins_its_neighbours(catalog: Catalog) -> None:
    with_line(catalog)
    with catalog.transaction():
        catalog.forget_epoch("b")
    assert catalog.parents() == {"a": None, "c": "a"}
    assert "lb" not in catalog.wanted_layers()


def test_forgetting_the_head_moves_it_to_the_parent(catalog: Catalog) -> None:
    with_line(catalog)
    with catalog.transaction():
        catalog.forget_epoch("c")
    assert catalog.machine("web").head == "b"


def test_a_pack_is_needed_by_epochs_and_by_instances(catalog: Catalog) -> None:
    with_line(catalog)
    assert catalog.unneeded_packs() == []
    with catalog.transaction():
        for one in "abc":
            catalog.forget_epoch(one)
    assert catalog.unneeded_packs() == ["p1"]
    instance = InstanceRecord("i", "id-web", ProcessId.own(), "/q", {}, 1.0, True)
    with catalog.transaction():
        catalog.put_instance(instance, ["p1"])
    assert catalog.unneeded_packs() == []
    assert catalog.instance_of("id-web") == instance


def test_a_journal_record_comes_back_as_it_was_written(catalog: Catalog) -> None:
    record = new_journal("op", "create", "id-web", {"epoch": "e"})
    with catalog.transaction():
        catalog.begin(record)
        changed = catalog.note_phase(record, "preparing", running=True)
    assert catalog.journal() == [changed]
    assert changed.plan == {"epoch": "e", "running": True}
    with catalog.transaction():
        catalog.end("op")
    assert catalog.journal() == []


def test_a_spec_survives_its_json() -> None:
    from epochs.spec import DiskSpec

    spec = MachineSpec(memory=2**30, cpus=2, disks=(DiskSpec("root", "/x", "raw", "qcow2"),),
                       kernel="/k", append="quiet", net="none", vga=True, extra=("-device", "x"))
    assert MachineSpec.from_json(spec.to_json()) == spec
