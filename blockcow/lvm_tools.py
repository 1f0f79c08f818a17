"""LVM: its commands for making and removing volumes, its reports (JSON) for knowing them, its lock
for keeping others out while we work on its devices ourselves.

A command of LVM must not die half-way, with a volume suspended. So none is tied to our life or to
our terminal; the lock file that it inherits (as its standard input: it closes every other one)
keeps whoever comes after us waiting until it has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .devmapper import SECTOR, DeviceMapper
from .interface import BlockError, SourceRefused
from .names import checked_id

PREFIX = "epochs-"
TAG = "epochs"
_FIELDS = ("vg_name", "vg_uuid", "vg_free", "vg_shared", "vg_extent_size", "lv_name", "lv_uuid",
           "lv_size", "lv_layout", "lv_role", "pool_lv", "origin", "thin_id", "lv_tags",
           "lv_dm_path", "origin_size")
_TAG_WORD = re.compile(r"[^A-Za-z0-9_+./=!:&#-]")
_SIZES = (6, 4, 4, 4, 4, 4, 6)  # characters between the hyphens of a UUID of LVM


class LvmFailed(BlockError):
    """A command of LVM failed; the message has its words."""


@dataclass(frozen=True)
class Volume:
    """A logical volume, as ``lvs`` reports it. Sizes in bytes. ``dm`` is the name of its device if
    it is active; ``uuid`` is what device-mapper knows that by."""

    vg: str
    name: str
    dm: str
    uuid: str
    size: int
    layout: frozenset[str]
    role: frozenset[str]
    pool: str
    origin: str
    thin_id: int | None
    tags: frozenset[str]
    extent: int
    free: int
    shared: bool

    @property
    def full_name(self) -> str:
        return f"{self.vg}/{self.name}"

    @property
    def path(self) -> Path:
        return Path("/dev") / self.vg / self.name

    @property
    def node(self) -> Path:
        return Path("/dev/mapper") / self.dm

    @property
    def pool_dm(self) -> str:
        """Name of the live thin pool that a thin volume is in (``-tpool``, as LVM calls it)."""
        return f"{mangled(self.vg)}-{mangled(self.pool)}-tpool"

    @property
    def pool_metadata(self) -> Path:
        return Path("/dev/mapper") / f"{mangled(self.vg)}-{mangled(self.pool)}_tmeta"


def full_name(path: str) -> str:
    """``VG/LV`` of the node ``/dev/VG/LV``, as layers record it."""
    return "/".join(Path(path).parts[-2:])


def dm_name(path: str) -> str:
    """Name of the live device of the volume at ``/dev/VG/LV``."""
    return "-".join(mangled(part) for part in Path(path).parts[-2:])


def live_volume(dm: DeviceMapper, path: str) -> Volume | None:
    """What can be known without asking LVM of a volume that is live; None if it is not. Of its
    group only the name, of its tags, its pool and its origin nothing."""
    name = dm_name(path)
    info = dm.info(name)
    if info is None or not info.live_table:
        return None
    uuid = Path(f"/sys/dev/block/{info.major}:{info.minor}/dm/uuid").read_text().strip()
    (vg, lv), none = full_name(path).split("/"), frozenset[str]()
    return Volume(vg=vg, name=lv, dm=name, uuid=uuid, layout=none, role=none, pool="", origin="",
                  size=sum(line.length for line in dm.table(name)) * SECTOR, thin_id=None,
                  tags=none, extent=0, free=0, shared=False)


def mangled(name: str) -> str:
    """A name of LVM as part of a name of device-mapper: hyphens are doubled."""
    return name.replace("-", "--")


def volume_name(layer_id: str) -> str:
    """Name of the volume that holds a layer."""
    return f"{PREFIX}{checked_id(layer_id)}"


def tag(owner: str) -> str:
    """A tag that says whose a volume is; characters that LVM does not take become '_'."""
    return f"{TAG}={_TAG_WORD.sub('_', owner)}"[:128]


class Lvm:
    """LVM on this host. ``locks``: a directory for our lock file."""

    def __init__(self, locks: Path) -> None:
        self._lock_file = locks / "lvm"

    def available(self) -> str | None:
        """None if it can be used, else why not."""
        if shutil.which("lvm", path=_path()) is None:
            return "LVM is not installed: install it (Debian: lvm2)"
        return None

    # -- commands ---------------------------------------------------------------------------------
    def run(self, *arguments: str) -> str:
        """One command, ended when this returns. LvmFailed with its last words."""
        with self._inherited() as fd:
            status, out, err = _ended(arguments, fd)
        if status:
            words = [line.strip() for line in err.splitlines() if line.strip()]
            raise LvmFailed(f"{arguments[0]} failed: {words[-1] if words else status}")
        return out

    def settled(self) -> None:
        """Wait until no command of ours runs any more that a killed process has left."""
        with self._inherited():
            pass

    @contextlib.contextmanager
    def _inherited(self) -> Iterator[int]:
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # a child that still runs keeps it

    def volumes(self, selection: str) -> list[Volume]:
        """Volumes that a selection of LVM (lvmreport(7)) finds."""
        text = self.run("lvs", "--reportformat", "json", "--units", "b", "--nosuffix",
                        "--options", ",".join(_FIELDS), "--select", selection)
        try:
            rows = json.loads(text)["report"][0]["lv"]
        except (ValueError, LookupError, TypeError) as error:
            raise LvmFailed("lvs printed a report that is not as it should be") from error
        return [_volume(row) for row in rows]

    def find(self, layer_id: str) -> Volume | None:
        """The volume that holds a layer; None if there is none."""
        found = self.volumes(f'lv_name="{volume_name(layer_id)}" && tags="{TAG}"')
        return found[0] if found else None

    def find_all(self, layer_ids: Iterable[str]) -> dict[str, Volume]:
        """Those that there are, by layer, with one report."""
        wanted = {volume_name(layer): layer for layer in layer_ids}
        if not wanted:
            return {}
        names = " || ".join(f'lv_name="{name}"' for name in wanted)
        return {wanted[found.name]: found
                for found in self.volumes(f'tags="{TAG}" && ({names})')}

    def offered(self, path: Path) -> Volume:
        """The volume that a user names by its node. SourceRefused if it is none."""
        seen = path.stat()
        try:
            text = Path(f"/sys/dev/block/{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}/dm/uuid"
                        ).read_text().strip()
        except FileNotFoundError:
            text = ""
        if not re.fullmatch(r"LVM-[A-Za-z0-9]{64}", text):
            raise SourceRefused(f"{path} is no logical volume; give one, or choose another backend")
        found = self.volumes(f'lv_uuid="{hyphenated(text[36:])}"')
        if not found:
            raise SourceRefused(f"{path} is a logical volume that LVM does not know; is its volume "
                                "group exported, or filtered out in lvm.conf?")
        if found[0].shared:
            raise SourceRefused(f"{path} is in a shared volume group, which is not supported")
        return found[0]

    # -- keeping others out -----------------------------------------------------------------------
    @contextlib.contextmanager
    def group_locked(self, groups: Iterable[str]) -> Iterator[None]:
        """Hold LVM's own lock on volume groups: no command changes them meanwhile. Commands of
        ours would wait for ever: there must be none within. May be nested in one process."""
        with contextlib.ExitStack() as stack:
            for group in ["", *sorted(set(groups))]:
                _held.take(group)
                stack.callback(_held.give, group)
            yield


class _Held:
    """The locks that this process has, counted. The one named "" is ours: whoever takes locks of
    several groups takes it first, so that no two of us wait for each other."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[int, int]] = {}

    def take(self, group: str) -> None:
        if group in self._locks:
            fd, count = self._locks[group]
        else:
            name = f"V_{group}" if group else "epochs"
            fd, count = _group_lock(Path(locking_directory()) / name), 0
        self._locks[group] = fd, count + 1

    def give(self, group: str) -> None:
        fd, count = self._locks.pop(group)
        if count > 1:
            self._locks[group] = fd, count - 1
        else:
            os.close(fd)


_held = _Held()


@contextlib.contextmanager
def pool_locked(pool: str) -> Iterator[None]:
    """Be the only one of us on this host who looks into a thin pool of LVM (``VG/POOL``)."""
    fd = _group_lock(Path(locking_directory()) / f"epochs-{pool.replace('/', '-')}")
    try:
        yield
    finally:
        os.close(fd)


def _ended(arguments: Sequence[str], fd: int) -> tuple[int, str, str]:
    """Run a command to its end, whatever happens to us meanwhile (but a kill)."""
    try:
        child = subprocess.Popen(
            ["lvm", *arguments], stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
            env={**os.environ, "PATH": _path(), "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"})
    except FileNotFoundError:
        raise LvmFailed("LVM is not installed: install it (Debian: lvm2)") from None
    interrupted: BaseException | None = None
    while True:
        try:
            out, err = child.communicate()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return child.returncode, out, err


def _group_lock(path: Path) -> int:
    """As LVM does it: the file may be removed by who lets go of it, so look whether the one that
    was locked is still the one of that name."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o777)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass  # removed meanwhile
        os.close(fd)


@cache
def locking_directory() -> str:
    """Where LVM keeps its lock files (lvm.conf(5), global/locking_dir)."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, out, err = _ended(["lvmconfig", "--type", "full", "global/locking_dir"], nothing)
    finally:
        os.close(nothing)
    found = re.fullmatch(r'locking_dir="([^"]+)"\s*', out)
    if not found:
        raise LvmFailed(f"lvmconfig does not say where LVM's lock files are: {err.strip()}")
    return found[1]


def hyphenated(uuid: str) -> str:
    """A UUID of LVM as its reports write it. ``uuid`` is without hyphens."""
    parts, at = [], 0
    for size in _SIZES:
        parts.append(uuid[at:at + size])
        at += size
    return "-".join(parts)


def _volume(row: dict[str, Any]) -> Volume:
    def words(key: str) -> frozenset[str]:
        return frozenset(word for word in row[key].split(",") if word)

    return Volume(
        vg=row["vg_name"], name=row["lv_name"].strip("[]"), dm=Path(row["lv_dm_path"]).name,
        uuid="LVM-" + (row["vg_uuid"] + row["lv_uuid"]).replace("-", ""),
        # Of a classic snapshot lv_size is that of its store.
        size=int(row["origin_size"] or row["lv_size"]),
        layout=words("lv_layout"), role=words("lv_role"),
        pool=row["pool_lv"].strip("[]"), origin=row["origin"].strip("[]"),
        thin_id=int(row["thin_id"]) if row["thin_id"] else None, tags=words("lv_tags"),
        extent=int(row["vg_extent_size"]), free=int(row["vg_free"]), shared=bool(row["vg_shared"]))


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def kind_of(volume: Volume) -> str:
    """The backend for a volume: ``lvm-thin`` or ``lvm-thick``. SourceRefused if it is neither."""
    if "thin" in volume.layout and "pool" not in volume.layout:
        return "lvm-thin"
    if "thicksnapshot" in volume.role:
        raise SourceRefused(f"{volume.path} is a snapshot, of which LVM makes no snapshots; give "
                            f"the volume that it was made of, {volume.vg}/{volume.origin}")
    if "public" not in volume.role:
        raise SourceRefused(f"{volume.path} is a part of another volume; give that")
    return "lvm-thick"
