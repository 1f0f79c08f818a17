"""What test_unprivileged runs as another user: the tiny guest's story through the Python API."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

from epochs import DiskSpec, MachineSpec, Store

home, ctl_path = Path(sys.argv[1]), sys.argv[2]
guest = home / "guest"
print("UID", os.geteuid())
assert os.geteuid() != 0

with Store() as store:  # the default place of an ordinary user
    assert store.files.path == home / ".local" / "state" / "epochs"
    web = store.add("web", MachineSpec(
        memory=128 * 2**20, accel="tcg", kernel=str(guest / "vmlinuz"),
        initrd=str(guest / "initrd"), append=(guest / "append").read_text().strip(),
        disks=(DiskSpec("a", str(guest / "a.img")), DiskSpec("b", str(guest / "b.img")))))
    try:
        web.start()
        while b"TINY READY" not in web.console_log.read_bytes():
            assert web.status()["state"] == "running", web.status()
            select.select([], [], [], 0.05)
        web.wait_agent()

        def ctl(machine, *words):
            done = machine.exec([ctl_path, *words], timeout=60)
            assert done.status == 0, done
            return done.stdout.decode().strip()

        ctl(web, "nonce", "set", "one")
        first = web.create(tags=["one"])
        ctl(web, "nonce", "set", "two")
        second = web.create()
        web.rollback("web@one", keep=False)
        assert ctl(web, "nonce", "get") == "one"
        trial = store.fork(second, "trial")
        assert ctl(trial, "nonce", "get") == "two"
        assert ctl(trial, "status").startswith("OK")
        store.delete([first])
        assert ctl(web, "status").startswith("OK")
        assert store.verify() == []
        print("TRACKING", second.stats["tracking"])
    finally:
        for machine in store.machines():
            machine.remove(force=True, with_epochs=True)
    assert list((store.files.path / "packs").iterdir()) == []
print("STORY COMPLETE")
