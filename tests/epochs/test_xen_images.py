"""import-xen and export-xen on files built octet by octet; real ones are in tests/xen."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest

from epochs import DiskSpec, MachineSpec, Store
from epochs.errors import NotFound
from epochs.points import POINTS
from tests.commands import cli_json, run_cli
from tests.memsave.xen_writers import PvDomain, hvm_records, xl_file
from tests.system.guest import assert_tidy

CONFIG = json.dumps({
    "c_info": {"type": "pv", "name": "web", "uuid": "11111111-2222-3333-4444-555555555555"},
    "b_info": {"max_memkb": 4096, "max_vcpus": 1, "type.pv": {}},
    "disks": [{"pdev_path": "/dev/vg/web", "vdev": "xvda", "backend": "phy", "format": "raw"}],
}).encode()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "web.save"
    file.write_bytes(xl_file(PvDomain(content={7: b"seven"}).stream(), config=CONFIG,
                             emulator=b"12345678state"))
    return file


def refuse(store: Path, code: int, *arguments: str) -> str:
    done = run_cli(store, *arguments, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    with Store(store) as opened:
        assert_tidy(opened)
    return done.stderr.strip().splitlines()[-1]


def test_there_and_back(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = cli_json(store, "import-xen", str(saved), "-m", "from elsewhere")
    assert isinstance(made, dict)
    assert made["machine"] == "web"
    assert made["compatibility"] == {"hypervisor": "xen", "xen": "4.17", "guest": "pv", "cpus": 1,
                                     "memory": 4 * 2**20, "page_size": 4096}
    assert "Xen 4.17, a pv domain" in run_cli(store, "show", made["id"]).stdout
    assert "from elsewhere" in run_cli(store, "log").stdout
    target = tmp_path / "again.save"
    run_cli(store, "export-xen", made["id"][:8], str(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    second = cli_json(store, "import-xen", str(target), "--name", "copy")
    assert isinstance(second, dict)
    assert second["stats"]["pages_new"] == made["stats"]["pages_new"]
    with Store(store) as opened:
        assert opened.digest(made["id"]) == opened.digest(second["id"])
        states = {opened.files.state_file(one["id"]).read_bytes() for one in (made, second)}
        assert len(states) == 1, "what is not memory is the same, too"
        assert opened.verify() == []
        assert_tidy(opened)
    run_cli(store, "delete", made["id"], second["id"])
    with Store(store) as opened:
        assert opened.epochs() == []
        assert list(opened.files.packs_dir.iterdir()) == []


def test_refusals(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert "does not exist" in refuse(store, 3, "import-xen", str(tmp_path / "nothing"))
    assert "cannot be read" in refuse(store, 4, "import-xen", str(tmp_path))
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-100])
    assert "cannot be imported: it ends within" in refuse(store, 4, "import-xen", str(saved))
    saved.write_bytes(whole + b"x")
    assert "follows behind its end" in refuse(store, 4, "import-xen", str(saved))
    saved.write_bytes(xl_file(PvDomain(entry=2**30).stream(), config=CONFIG))
    assert "outside the domain" in refuse(store, 4, "import-xen", str(saved))
    saved.write_bytes(xl_file(PvDomain().stream(), config=b"{}"))
    assert "not one of libxl's" in refuse(store, 4, "import-xen", str(saved))
    saved.write_bytes(whole)
    assert "not a disk; write it like" in refuse(store, 2, "import-xen", str(saved), "--disk", "a")
    made = cli_json(store, "import-xen", str(saved))
    assert isinstance(made, dict)
    assert "has no disk 'root'" in refuse(store, 3, "import-xen", str(saved), "--disk",
                                          f"xvda={made['id']}:root")
    assert "exists" in refuse(store, 4, "export-xen", made["id"], str(saved))
    assert saved.read_bytes() == whole
    missing = tmp_path / "no" / "such.save"
    assert "cannot be written" in refuse(store, 4, "export-xen", made["id"], str(missing))
    assert "Xen" in refuse(store, 4, "fork", made["id"], "trial"), "there is none on this host"
    with Store(store) as opened:
        assert_tidy(opened)
        assert opened.machines() == []


def test_damage_is_never_exported(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = cli_json(store, "import-xen", str(saved))
    assert isinstance(made, dict)
    with Store(store) as opened:
        state = opened.files.state_file(made["id"])
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    target = tmp_path / "again.save"
    done = run_cli(store, "export-xen", made["id"], str(target), check=False)
    assert done.returncode == 6
    assert not target.exists()
    assert list(tmp_path.glob("again*")) == []


def test_pvh(tmp_path: Path) -> None:
    store, file = tmp_path / "store", tmp_path / "web.save"
    file.write_bytes(xl_file(b"".join(hvm_records({7: b"x"}).values()), config=CONFIG.replace(
        b'"pv"', b'"pvh"')))
    made = cli_json(store, "import-xen", str(file))
    assert isinstance(made, dict)
    assert made["compatibility"]["guest"] == "pvh"
    target = tmp_path / "again.save"
    run_cli(store, "export-xen", made["id"], str(target))
    assert target.stat().st_size == file.stat().st_size


def test_paired_with_a_frozen_layer(saved: Path, tmp_path: Path) -> None:
    """The layer is the epoch's then, too: it stays when the one it was taken from goes."""
    (tmp_path / "disk.img").write_bytes(b"disk".ljust(2**20, b"\0"))
    with Store(tmp_path / "store") as store:
        disk = DiskSpec("root", str(tmp_path / "disk.img"), "raw", "qcow2")
        with store.add("bare", MachineSpec(memory=16 * 2**20, accel="tcg", net="none",
                                           disks=(disk,))) as bare:
            bare.start()
            frozen = bare.create()
            layer = frozen.disks["root"]
            made = store.import_xen(saved, disks={"xvda": (frozen, "root")})
            assert made.disks == {"xvda": layer}
            with pytest.raises(NotFound, match="has no disk 'xvdb'"):
                store.import_xen(saved, disks={"xvdb": (frozen, "root")})
        assert [epoch.id for epoch in store.epochs()] == [made.id]
        assert store.verify() == []
        store.delete([made])
        assert store.files.catalog.find_layer(layer) is None


def test_export_killed(saved: Path, tmp_path: Path) -> None:
    """Nothing is left beside the file that was to be; the control is that something is there
    before."""
    store, target = tmp_path / "store", tmp_path / "again.save"
    made = cli_json(store, "import-xen", str(saved))
    assert isinstance(made, dict)
    for point in POINTS["export-xen"]:
        done = run_cli(store, "export-xen", made["id"], str(target), fault=f"{point}:kill",
                       check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("again*"))) == 1
        run_cli(store, "recover")
        assert list(tmp_path.glob("again*")) == []
    run_cli(store, "export-xen", made["id"], str(target))
    assert list(tmp_path.glob("again*")) == [target]


@pytest.mark.parametrize("point", POINTS["import-xen"])
def test_killed(point: str, saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = run_cli(store, "import-xen", str(saved), fault=f"{point}:kill", check=False)
    assert done.returncode == -signal.SIGKILL
    run_cli(store, "recover")
    with Store(store) as opened:
        assert opened.epochs() == []
        assert_tidy(opened)
        assert list(opened.files.packs_dir.iterdir()) == []
    run_cli(store, "import-xen", str(saved))
