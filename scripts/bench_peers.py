"""Epochs beside what else saves and restores a running guest, in one run on one guest.

Run by `scripts/bench --peers`, which sets $EPOCHS_TINY and $EPOCHS_QEMU10. Each contestant boots
the same kernel, initramfs and disk with 512 MiB and about 95 MiB resident. "stands still" is the
guest's pause: measured by Epochs, QEMU's "downtime" for mapped-ram, the whole command for the
others, which stop it throughout. Prints a table; writes JSON and, with --plot, an SVG.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from bench_run import from_standby, ready, rollbacks, savevm, timed

from epochs import Machine, Store
from epochs.qemu.connection import open_monitor
from epochs.qemu.monitor import Monitor

MEMORY_MIB = 512


@dataclass
class Result:
    """Medians in milliseconds; ``still``: of the guest while it is saved. ``disks``: whether what
    is restored has its disks as they were, too. None: there is no such thing."""

    name: str
    save: float
    still: float
    restore: float | None
    disks: bool
    remark: str = ""


def median(values: list[float]) -> float:
    return statistics.median(values)


@contextmanager
def qemu(path: Path | None) -> Iterator[None]:
    """Have Epochs use another QEMU."""
    before = {name: os.environ.get(name) for name in ("EPOCHS_QEMU", "PATH")}
    if path is not None:
        os.environ["EPOCHS_QEMU"] = str(path / "qemu-system-x86_64")
        os.environ["PATH"] = f"{path}:{os.environ['PATH']}"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def epochs(guest: Path, place: Path, count: int, version: str) -> Iterator[Result]:
    with Store(place / "epochs") as store:
        web = ready(store, guest)
        try:
            first = web.create("first", flat=True)
            made = [web.create("again") for _ in range(count)]
            save = median([one.stats["total_seconds"] * 1e3 for one in made])
            still = median([one.stats["pause_seconds"] * 1e3 for one in made])
            plain = median(rollbacks(web, first, count))
            yield Result(f"Epochs, QEMU {version}", save, still, plain, True)
            standing = median(from_standby(store, web, first, count))
            yield Result(f"Epochs, standby, QEMU {version}", save, still, standing, True)
        finally:
            web.remove(force=True, with_epochs=True)
    shutil.rmtree(place / "epochs")


def internal(guest: Path, place: Path, count: int, version: str) -> Result:
    saved, loaded = savevm(guest, place, count)
    shutil.rmtree(place / "peer")
    return Result(f"savevm, loadvm, QEMU {version}", median(saved), median(saved), median(loaded),
                  True)


def migrated(monitor: Monitor, start: Callable[[], object]) -> None:
    """Wait for the end of a migration, in or out."""
    monitor.execute("migrate-set-capabilities", capabilities=[
        {"capability": name, "state": True} for name in ("events", "mapped-ram", "multifd")])
    monitor.execute("migrate-set-parameters", multifd_channels=2)
    events = monitor.listen("MIGRATION")
    try:
        start()
        while (status := monitor.wait_event(events)["data"]["status"]) != "completed":
            if status == "failed":
                raise RuntimeError(str(monitor.execute("query-migrate")))
    finally:
        monitor.forget(events)


def mapped_ram(guest: Path, place: Path, count: int, version: str) -> Result:
    """A live migration into a file laid out as RAM is, and back. Memory and devices only."""
    image = place / "mapped-ram"
    saves, stills, restores = [], [], []
    with Store(place / "mapped") as store:
        web = ready(store, guest)
        record = store.files.catalog.instance_of(web.record.id)
        assert record is not None
        command = Path(f"/proc/{record.process.pid}/cmdline").read_bytes().split(b"\0")[:-1]
        try:
            for _ in range(count):
                with open_monitor(store.files, record) as monitor:
                    saves.append(timed(lambda m=monitor: migrated(  # type: ignore[misc]
                        m, lambda: m.execute("migrate", uri=f"file:{image}"))) * 1e3)
                    stills.append(float(monitor.execute("query-migrate")["downtime"]))
                    restores.append(_restored(command, store, web, image) * 1e3)
                    monitor.execute("cont")
        finally:
            web.remove(force=True, with_epochs=True)
    image.unlink()
    shutil.rmtree(place / "mapped")
    return Result(f"mapped-ram to a file, QEMU {version}", median(saves), median(stills),
                  median(restores), False, "memory and devices, no disks")


def _restored(command: list[bytes], store: Store, web: Machine, image: Path) -> float:
    """Seconds from starting a second QEMU to its guest running from the file; on a disk of its
    own that begins as the first one's is."""
    directory = image.parent / "restored"
    directory.mkdir()
    disks = store.files.catalog.disks(web.record.id)
    layer = store.files.catalog.layer(disks[0].active or "")
    copy = directory / layer.file
    shutil.copy(store.files.layers_dir / layer.file, copy)
    memory = json.dumps({"qom-type": "memory-backend-ram", "id": "ram",
                         "size": MEMORY_MIB * 2**20})
    sockets = {f"socket,id={name}": f"socket,id={name},path={directory}/{name},server=on,wait=off"
               for name in ("qmp", "console", "agent")}
    words = [memory if "memory-backend-file" in word else
             next((socket for start, socket in sockets.items() if word.startswith(start)),
                  word.replace(str(store.files.layers_dir / layer.file), str(copy)))
             for word in (part.decode() for part in command)]
    began = time.perf_counter()
    child = subprocess.Popen([*words, "-incoming", "defer"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, cwd=directory)
    try:
        while not (directory / "agent").exists():  # the socket is what says that it is there
            if child.poll() is not None:
                raise RuntimeError("QEMU ended: " + " ".join(words))
            time.sleep(0.001)
        with Monitor.open(directory / "qmp") as monitor:
            migrated(monitor, lambda: monitor.execute("migrate-incoming", uri=f"file:{image}"))
            monitor.execute("cont")
            return time.perf_counter() - began
    finally:
        child.kill()
        child.wait()
        shutil.rmtree(directory)


# -- libvirt --------------------------------------------------------------------------------------
DOMAIN = """
    <domain type='qemu'>
      <name>peer</name>
      <memory unit='MiB'>{memory}</memory>
      <vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type>
        <kernel>{guest}/vmlinuz</kernel><initrd>{guest}/initrd</initrd>
        <cmdline>{append}</cmdline></os>
      <cpu mode='maximum'/>
      <devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
          <source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
        <serial type='file'><source path='{place}/console.log'/></serial>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
        <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
        <memballoon model='none'/>
      </devices>
    </domain>
"""


NOBODY = 65534


class Libvirt:
    """A session libvirtd of our own with a copy of the guest, away from any that the host has: for
    that it must not be root's."""

    def __init__(self, guest: Path) -> None:
        self.place = place = Path(tempfile.mkdtemp(prefix="epochs-bench-libvirt-"))
        for file in guest.iterdir():
            shutil.copy(file, place)
        self._as_user = []
        if os.geteuid() == 0:
            for entry in (place, *place.iterdir()):
                os.chown(entry, NOBODY, NOBODY)
            self._as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        self._environment = {**os.environ, "HOME": str(place), "XDG_RUNTIME_DIR": str(place),
                             "XDG_CONFIG_HOME": str(place), "XDG_CACHE_HOME": str(place)}
        with (place / "libvirtd.log").open("wb") as log:
            self._daemon = subprocess.Popen([*self._as_user, "libvirtd"], env=self._environment,
                                            stdout=log, stderr=log, cwd=place)
        deadline = time.monotonic() + 30
        while self.virsh("uri", check=False).returncode:
            if time.monotonic() > deadline or self._daemon.poll() is not None:
                raise RuntimeError("libvirtd does not answer: " + self.virsh(
                    "uri", check=False).stderr.strip())
            time.sleep(0.1)

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._as_user, "virsh", "--quiet", "-c", "qemu:///session", *words], text=True,
            env=self._environment, capture_output=True, check=check, cwd=self.place)

    def ctl(self, *words: str) -> None:
        document = {"execute": "guest-exec", "arguments": {
            "path": "/bin/witness-ctl", "arg": list(words), "capture-output": True}}
        pid = json.loads(self.virsh("qemu-agent-command", "peer", json.dumps(document)).stdout
                         )["return"]["pid"]
        status = {"execute": "guest-exec-status", "arguments": {"pid": pid}}
        while not (done := json.loads(self.virsh("qemu-agent-command", "peer", json.dumps(
                status)).stdout)["return"])["exited"]:
            time.sleep(0.05)
        assert done["exitcode"] == 0, done

    def wait_agent(self) -> None:
        deadline = time.monotonic() + 120
        while self.virsh("qemu-agent-command", "peer", '{"execute":"guest-ping"}',
                         check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError("the guest's agent does not answer")
            time.sleep(0.2)

    def close(self) -> None:
        self.virsh("destroy", "peer", check=False)
        self._daemon.send_signal(signal.SIGTERM)
        self._daemon.wait(30)
        shutil.rmtree(self.place)


def libvirt(guest: Path, count: int) -> Iterator[Result]:
    """Internal snapshots, which hold memory and disks and stand still; and the external live one,
    of which libvirt says itself whether it reverts to it."""
    host = Libvirt(guest)
    try:
        disk, guest = host.place / "disk.qcow2", host.place
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(guest / "a.img"), "-F",
                        "raw", str(disk)], check=True)
        disk.chmod(0o666)
        (host.place / "peer.xml").write_text(textwrap.dedent(DOMAIN.format(
            memory=MEMORY_MIB, guest=guest, append=(guest / "append").read_text().strip(),
            disk=disk, place=host.place)))
        host.virsh("define", str(host.place / "peer.xml"))
        host.virsh("start", "peer")
        host.wait_agent()
        host.ctl("dirty", "48")
        host.ctl("pause")
        version = host.virsh("--version").stdout.strip()
        saves, reverts = [], []
        for number in range(count):
            saves.append(timed(lambda n=number: host.virsh(  # type: ignore[misc]
                "snapshot-create-as", "peer", f"s{n}")) * 1e3)
            reverts.append(timed(lambda n=number: host.virsh(  # type: ignore[misc]
                "snapshot-revert", "peer", f"s{n}")) * 1e3)
        yield Result(f"libvirt {version}, internal snapshot", median(saves), median(saves),
                     median(reverts), True)
        for number in range(count):
            host.virsh("snapshot-delete", "peer", f"s{number}")
        took = timed(lambda: host.virsh(
            "snapshot-create-as", "peer", "live", "--live", "--memspec",
            f"file={host.place}/memory,snapshot=external", "--diskspec", "vda,snapshot=external"))
        revert = timed(lambda: refused.append(host.virsh("snapshot-revert", "peer", "live",
                                                         check=False)))
        said = " ".join(refused[0].stderr.split())
        yield Result(f"libvirt {version}, external live snapshot", took * 1e3, float("nan"),
                     None if refused[0].returncode else revert * 1e3, True, said[-60:])
    finally:
        host.close()


refused: list[subprocess.CompletedProcess[str]] = []


# -- showing --------------------------------------------------------------------------------------
def plot(results: list[Result], file: Path) -> None:
    """Bars on a logarithmic scale, as SVG."""
    mpl = import_module("matplotlib")  # only scripts/bench installs it
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "epochs"  # the same picture from the same figures
    pyplot = import_module("matplotlib.pyplot")
    shown = list(reversed(results))
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(shown) + 1.6))
    kinds = (("guest stands still while saved", "still", "#c0504d"),
             ("save, whole", "save", "#9aa5b1"),
             ("restore to a running guest", "restore", "#4f81bd"))
    for number, (label, field, colour) in enumerate(kinds):
        values = [getattr(one, field) or float("nan") for one in shown]
        places = [row + (1 - number) * 0.27 for row in range(len(shown))]
        axes.barh(places, values, 0.25, label=label, color=colour)
        for place, value in zip(places, values, strict=True):
            if value == value:  # not NaN: there is such a thing
                axes.text(value * 1.05, place, f"{value:.{1 if value < 100 else 0}f}",
                          va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(1)
    axes.set_xlabel("milliseconds, 512 MiB guest under emulation, medians of one run")
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def measured(guest: Path, place: Path, count: int) -> Iterator[Result]:
    newer = Path(os.environ["EPOCHS_QEMU10"])
    for version, path in (("7.2", None), ("10.0", newer)):
        with qemu(path):
            yield from epochs(guest, place, count, version)
            yield internal(guest, place, count, version)
            if path is not None:
                yield mapped_ram(guest, place, count, version)
    if shutil.which("libvirtd") and shutil.which("virsh"):
        yield from libvirt(guest, min(count, 5))
    else:
        print("libvirt is not installed here (libvirt-daemon, libvirt-clients): left out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--output", type=Path, default=Path("bench-peers.json"))
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="epochs-bench-"))
    results = []
    print(f"{'milliseconds':<40} {'stands still':>13} {'save':>9} {'restore':>9}  disks, too")
    try:
        for one in measured(Path(os.environ["EPOCHS_TINY"]), place, 3 if options.quick else 9):
            results.append(one)
            restore = "-" if one.restore is None else f"{one.restore:.1f}"
            still = "-" if one.still != one.still else f"{one.still:.1f}"
            print(f"{one.name:<40} {still:>13} {one.save:>9.1f} {restore:>9}  "
                  f"{'yes' if one.disks else 'no'}  {one.remark}", flush=True)
    finally:
        shutil.rmtree(place)
    options.output.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
