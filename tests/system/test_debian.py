"""A whole Debian with PostgreSQL on two CPUs that never rests: live epochs of it are exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from epochs import Machine, Store

from .conftest import required
from .guest import debian_spec
from .oracle import assert_same_memory, image_of, memory_of_the_pause

pytestmark = [pytest.mark.guest, pytest.mark.slow]

PSQL = "/usr/sbin/runuser -u postgres -- psql -qAtX -v ON_ERROR_STOP=1 -d demo"
# Two writers, one in the database, one in memory and the page cache.
LOAD = (f"while :; do {PSQL} -c \"insert into work(note) select md5(random()::text) "
        "from generate_series(1, 200)\" || break; done & "
        "while :; do dd if=/dev/urandom of=/root/noise bs=64k count=64 2>/dev/null; done")


@pytest.fixture
def debian(store: Store) -> Iterator[Machine]:
    web = store.add("web", debian_spec(required("EPOCHS_DEBIAN")))
    web.start()
    web.wait_agent(180)
    run(web, "until pg_isready -q; do sleep 0.2; done")
    run(web, f"{PSQL} -c 'create table work(id serial primary key, note text)'")
    yield web


def run(machine: Machine, script: str) -> str:
    done = machine.exec(["/bin/sh", "-c", script], timeout=180)
    assert done.status == 0, (script, done.stdout, done.stderr)
    return done.stdout.decode().strip()


@pytest.mark.timeout(900)
def test_epochs_of_a_busy_debian_are_exact(store: Store, debian: Machine,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    run(debian, f"setsid sh -c '{LOAD}' </dev/null >/dev/null 2>&1 &")
    run(debian, f"until [ $({PSQL} -c 'select count(*) from work') -gt 0 ]; do sleep 0.1; done")
    epochs, written = [], []
    with memory_of_the_pause(store, debian, monkeypatch) as seen:
        for number in range(6):
            if number in (0, 5):
                written.append(int(run(debian, f"{PSQL} -c 'select count(*) from work'")))
            epochs.append(debian.create(flat=number == 3 or None))
    for number, (epoch, memory) in enumerate(zip(epochs, seen, strict=True)):
        assert epoch.stats["pages_precopied"] > 512, "it was busy"
        assert_same_memory(image_of(store, epoch), memory, f"epoch {number}")
    assert store.verify() == []
    for epoch, rows in ((epochs[5], written[1]), (epochs[0], written[0])):
        debian.rollback(epoch, keep=False)
        run(debian, "pkill -f '[i]nsert into work' || true; pkill -f '[w]hile :' || true")
        assert int(run(debian, f"{PSQL} -c 'select count(*) from work'")) >= rows > 0
        run(debian, "/usr/sbin/runuser -u postgres -- /usr/lib/postgresql/15/bin/pg_amcheck "
            "--heapallindexed demo")
