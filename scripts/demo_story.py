"""The demo: a bad upgrade that bricks a Debian guest, undone as if it had never happened.

Run by scripts/demo, which builds the guest and sets $EPOCHS_DEBIAN. Exits non-zero, with one
verdict line, if any check fails.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from epochs import DiskSpec, Machine, MachineSpec, Store
from epochs.errors import EpochsError

MEMORY = 2**30
PSQL = ["/usr/sbin/runuser", "-u", "postgres", "--", "psql", "-qAtX", "-v", "ON_ERROR_STOP=1",
        "-d", "demo", "-c"]
AMCHECK = ["/usr/sbin/runuser", "-u", "postgres", "--", "/usr/lib/postgresql/15/bin/pg_amcheck",
           "--heapallindexed", "--install-missing", "demo"]
# Overwrites nothing but the loader's and the C library's names: what runs goes on, nothing new
# starts, which is how a broken libc upgrade looks.
BRICK = "sync; rm -f /lib/x86_64-linux-gnu/libc.so.6 /lib64/ld-linux-x86-64.so.2"
WORKLOAD = ("while :; do /usr/sbin/runuser -u postgres -- psql -qX -d demo -c "
            "\"insert into work(note) select md5(random()::text) from generate_series(1, 50)\" "
            "|| break; done")

failures: list[str] = []
timings: list[tuple[str, float]] = []


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def check(what: str, good: bool, seen: object = "") -> None:
    shown = f": {seen}" if str(seen) else ""
    print(f"   {'ok  ' if good else 'FAIL'}  {what}{shown}", flush=True)
    if not good:
        failures.append(what)


def timed(what: str, action: Callable[[], object]) -> object:
    began = time.perf_counter()
    result = action()
    timings.append((what, time.perf_counter() - began))
    print(f"   {what}: {timings[-1][1]:.3f} s", flush=True)
    return result


def run(machine: Machine, argv: list[str], timeout: float = 120) -> str:
    """A command in the guest that must succeed; returns what it printed."""
    done = machine.exec(argv, timeout=timeout)
    if done.status != 0:
        raise EpochsError(f"'{' '.join(argv)[:60]}' ended with {done.status} in the guest: "
                          f"{(done.stderr or done.stdout).decode(errors='replace')[-300:]}")
    return done.stdout.decode().strip()


def sql(machine: Machine, statement: str) -> str:
    return run(machine, [*PSQL, statement])


def starts_anything(machine: Machine) -> bool:
    """Whether the guest can still start a program."""
    try:
        return machine.exec(["/bin/true"], timeout=15).status == 0
    except EpochsError as error:
        print(f"   the guest says: {error}")
        return False


def set_nonce(machine: Machine, word: str) -> None:
    """Keep a word in RAM only: a process' environment, in no file."""
    run(machine, ["/bin/sh", "-c", f"NONCE={word} setsid sleep 100000 >/dev/null 2>&1 &"])


def nonce(machine: Machine) -> str:
    return run(machine, ["/bin/sh", "-c", "for p in $(pidof sleep); do tr '\\0' '\\n' "
                         "</proc/$p/environ | sed -n 's/^NONCE=//p'; done | tail -n 1"])


def story(store: Store, guest: Path) -> None:
    step("Boot a Debian guest")
    web = store.add("web", MachineSpec(
        memory=MEMORY, cpus=2, disks=(DiskSpec("root", str(guest / "root.img"), "raw"),),
        kernel=str(guest / "vmlinuz"), initrd=str(guest / "initrd"),
        append=(guest / "append").read_text().strip()))

    def boot() -> None:
        web.start()
        web.wait_agent(180)

    timed("start (Debian, systemd, PostgreSQL, until the guest agent answers)", boot)
    print("   " + run(web, ["/bin/sh", "-c", ". /etc/os-release; echo $PRETTY_NAME, $(uname -r)"]))

    step("Rows in PostgreSQL, a nonce in RAM only, and a workload that keeps writing")
    run(web, ["/bin/sh", "-c", "until pg_isready -q; do sleep 0.2; done"], 120)
    sql(web, "create table if not exists accounts(id int primary key, balance int); "
             "truncate accounts; insert into accounts select i, i * 10 "
             "from generate_series(1, 1000) i; "
             "create table if not exists work(id serial primary key, note text)")
    word = secrets.token_hex(8)
    set_nonce(web, word)
    check("the nonce is in RAM", nonce(web) == word, word)
    run(web, ["/bin/sh", "-c", f"setsid sh -c '{WORKLOAD}' </dev/null >/dev/null 2>&1 &"])

    step("epochs create web -t before-upgrade")
    timed("create", lambda: web.create("before the upgrade", tags=["before-upgrade"]))
    epoch = store.epoch("web@before-upgrade")
    stats = epoch.stats
    timings.append(("  of it, the guest stood still", stats["pause_seconds"]))
    print(f"   epoch {epoch.id[:12]}: pause {stats['pause_seconds'] * 1e3:.1f} ms, "
          f"{stats['pages_new']} pages, {stats['pack_bytes'] / 2**20:.0f} MiB")
    again = web.create("a minute of work later")
    print(f"   epoch {again.id[:12]}: pause {again.stats['pause_seconds'] * 1e3:.1f} ms, "
          f"{again.stats['pages_new']} pages, {again.stats['pack_bytes'] / 2**20:.1f} MiB")
    timings.append(("  a second create's pause", again.stats["pause_seconds"]))

    step("A bad upgrade, from inside the guest: the C library is gone")
    sql(web, "update accounts set balance = 0")
    run(web, ["/bin/sh", "-c", BRICK])
    check("the guest is bricked: nothing starts any more", not starts_anything(web))

    step("epochs rollback web@before-upgrade --discard")
    timed("rollback, until the guest runs and has the time",
          lambda: web.rollback("web@before-upgrade", keep=False))
    check("programs start again", starts_anything(web))
    check("the nonce is still in RAM: resumed, not rebooted", nonce(web) == word, nonce(web))
    check("all rows are as they were",
          sql(web, "select count(*), sum(balance) from accounts") == "1000|5005000",
          sql(web, "select count(*), sum(balance) from accounts"))
    run(web, ["/bin/sh", "-c", "pkill -f '[i]nsert into work' || true; "
              "pkill -f '[w]hile :' || true"])
    done = web.exec(AMCHECK, timeout=180)
    check("pg_amcheck finds nothing wrong", done.status == 0,
          (done.stdout + done.stderr).decode(errors="replace")[-200:])

    step("Fork twice and let the forks diverge")
    timed("fork, two machines", lambda: store.fork_many("web@before-upgrade", ["try-1", "try-2"]))
    forks = [store.machine("try-1"), store.machine("try-2")]
    for number, fork in enumerate(forks, 1):
        sql(fork, f"update accounts set balance = {number} where id = 1")
        fork.create(f"fork {number} went its own way")
    seen = [sql(machine, "select balance from accounts where id = 1")
            for machine in (web, *forks)]
    check("each has its own truth", seen == ["10", "1", "2"], " / ".join(seen))
    check("each kept the nonce", all(nonce(fork) == word for fork in forks))
    check("every stored byte verifies", store.verify() == [])

    step("epochs log --graph")
    subprocess.run([sys.executable, "-m", "epochs", "--store", str(store.files.path), "log",
                    "--graph"], check=True)


def main() -> int:
    guest = Path(os.environ["EPOCHS_DEBIAN"])
    began = time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix="epochs-demo-"))
    try:
        with Store(place / "store", notice=lambda text: print(f"   note: {text}")) as store:
            try:
                story(store, guest)
            finally:
                for machine in store.machines():
                    machine.remove(force=True, with_epochs=True)
    except (EpochsError, AssertionError) as error:
        failures.append(str(error))
    finally:
        shutil.rmtree(place)
    step("Times")
    for what, seconds in timings:
        print(f"   {what:<66} {seconds:9.3f} s")
    print(f"   {'the story':<66} {time.perf_counter() - began:9.3f} s")
    if failures:
        print(f"\nVERDICT: FAILED - {len(failures)} of the checks: {failures[0]}")
        return 1
    print("\nVERDICT: the bad upgrade was undone; memory and disk came back as one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
