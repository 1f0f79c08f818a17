"""What a machine is: the specification that ``epochs add`` records.

It is stored as JSON in the catalog and can be given as TOML (``--from machine.toml``) with the
same keys::

    memory = "1G"
    cpus = 2
    kernel = "/srv/vmlinuz"
    net = "user"
    [[disk]]
    name = "root"
    file = "/srv/root.img"
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from epochs.errors import NotFound, Refused, UsageError
from epochs.network.plan import Publish

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
DISK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}")  # virtio-blk's serial holds 20 bytes
MAX_CPUS = 255
NETS = ("user", "isolated", "none")
ACCELERATORS = ("auto", "kvm", "tcg")
QEMU, XEN = "qemu", "xen"  # hypervisors
_UNITS = {"": 2**20, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# These give guest RAM back with fallocate(FALLOC_FL_PUNCH_HOLE) on the file behind it, private
# mapping or not (QEMU's ram_block_discard_range), which would punch holes into an epoch.
_DISCARDS_RAM = ("balloon", "virtio-mem", "pc-dimm", "nvdimm")
# These would fight with what the driver itself says on the command line.
_OURS = ("-incoming", "-daemonize", "-S", "-qmp", "-mon", "-m", "-smp", "-machine", "-M", "-accel",
         "-enable-kvm", "-snapshot", "-loadvm", "-preconfig", "-pidfile", "-mem-path", "-name",
         "-cpu", "-memory")


@dataclass(frozen=True)
class DiskSpec:
    """One disk as given: ``format`` None means probed, ``backend`` None means chosen. ``pool``:
    name of the pool for the dmthin backend; None: the only one there is. ``snapshot``: bytes of a
    classic snapshot of LVM; None: so many that it never gets full."""

    name: str
    file: str
    format: str | None = None
    backend: str | None = None
    pool: str | None = None
    snapshot: int | None = None


@dataclass(frozen=True)
class MachineSpec:
    """A machine's hardware. ``memory`` in bytes; files as absolute paths. ``config``: of a Xen
    domain, the text of its configuration for `xl create`. ``publish``: ports of the host that lead
    to the guest, as :class:`epochs.network.plan.Publish` reads them."""

    memory: int
    cpus: int = 1
    disks: tuple[DiskSpec, ...] = ()
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    net: str = "user"
    publish: tuple[str, ...] = field(default=())
    vga: bool = False
    accel: str = "auto"
    qemu: str | None = None
    extra: tuple[str, ...] = field(default=())
    hypervisor: str = QEMU
    config: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MachineSpec:
        raw = json.loads(text)
        raw["disks"] = tuple(DiskSpec(**disk) for disk in raw["disks"])
        for name in ("extra", "publish"):
            raw[name] = tuple(raw.get(name, ()))
        return cls(**raw)


def parse_size(text: str) -> int:
    """"512M", "1G", "1.5G" or plain MiB into bytes; UsageError if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"'{text}' is not a memory size; write it like 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_disk(text: str) -> DiskSpec:
    """``root=FILE[,format=F][,backend=B][,pool=P][,snapshot=SIZE]``; a comma in the file name is
    written twice."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UsageError(f"'{text}' is not a disk; write it like root=/path/to/image")
    parts = [part.replace("\0", ",") for part in rest.replace(",,", "\0").split(",")]
    options: dict[str, Any] = {}
    for part in parts[1:]:
        key, equals, value = part.partition("=")
        if key not in ("format", "backend", "pool", "snapshot") or not value:
            raise UsageError(f"disk {name}: unknown option '{part}'; "
                             "there are format=, backend=, pool= and snapshot=")
        options[key] = parse_size(value) if key == "snapshot" else value
    return DiskSpec(name, parts[0], **options)


def _disk(raw: dict[str, Any]) -> DiskSpec:
    """A [[disk]]; TypeError for keys that there are not."""
    disk = DiskSpec(**raw)
    return disk if disk.snapshot is None else replace(disk, snapshot=parse_size(str(disk.snapshot)))


def from_toml(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Read a machine file; returns (name or None, keyword arguments of MachineSpec)."""
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(f"machine file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"machine file {path} cannot be read: {error}") from error
    name = raw.pop("name", None)
    disks = raw.pop("disk", [])
    known = set(MachineSpec.__dataclass_fields__) - {"disks", "hypervisor", "config"}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise UsageError(f"machine file {path}: unknown key '{unknown[0]}'")
    try:
        raw["disks"] = tuple(_disk(disk) for disk in disks)
    except TypeError as error:
        raise UsageError(f"machine file {path}: a [[disk]] {error}") from error
    if isinstance(raw.get("memory"), str):
        raw["memory"] = parse_size(raw["memory"])
    if "memory" not in raw:
        raise UsageError(f"machine file {path}: 'memory' is missing")
    for several in ("extra", "publish"):
        if not isinstance(raw.get(several, []), list) or not all(
                isinstance(one, str) for one in raw.get(several, [])):
            raise UsageError(f"machine file {path}: '{several}' must be a list of strings")
        raw[several] = tuple(raw.get(several, ()))
    for key, value in raw.items():
        wanted = {"memory": int, "cpus": int, "vga": bool, "disks": tuple, "extra": tuple,
                  "publish": tuple}
        if not isinstance(value, wanted.get(key, str)) or (
                key in ("memory", "cpus") and isinstance(value, bool)):
            raise UsageError(f"machine file {path}: '{key}' has a value of the wrong kind")
    return name, raw


def host_memory() -> int:
    """Bytes of RAM in this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_name(name: str) -> None:
    """Refuse names that could be mistaken for an option, a path or an epoch expression."""
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is not a machine name; use letters, digits, '_', '.', '-', "
                         "at most 63, starting with a letter or digit")


def check(spec: MachineSpec) -> None:
    """Refuse a specification that cannot work, before anything is recorded."""
    if spec.hypervisor != QEMU:
        raise Refused(f"hypervisor '{spec.hypervisor}' cannot be chosen here")
    if spec.memory < 2**20 or spec.memory % 4096:
        raise Refused(f"memory of {spec.memory} bytes is not possible; "
                      "give at least 1M, in whole pages of 4 KiB")
    if spec.memory >= host_memory():
        raise Refused(f"memory of {spec.memory // 2**20} MiB is more than this host has "
                      f"({host_memory() // 2**20} MiB); give less")
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise Refused(f"{spec.cpus} CPUs are not possible; give 1 to {MAX_CPUS}")
    if spec.net not in NETS:
        raise Refused(f"network '{spec.net}' is unknown; there are {', '.join(NETS)}")
    check_publish(spec)
    if spec.accel not in ACCELERATORS:
        raise Refused(f"accelerator '{spec.accel}' is unknown; there are "
                      + ", ".join(ACCELERATORS))
    _check_disks(spec)
    for what, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path is not None and not Path(path).is_file():
            raise NotFound(f"{what} {path} does not exist or is not a file")
    if spec.kernel is None and (spec.initrd or spec.append):
        raise UsageError("--initrd and --append go with --kernel")
    if spec.kernel is None and not spec.disks:
        raise UsageError("a machine needs a disk or a kernel to boot from")
    _check_extra(spec.extra)


def check_publish(spec: MachineSpec) -> None:
    """Refuse ports that cannot be published."""
    ports = [Publish.parse(text) for text in spec.publish]
    if ports and spec.net == "none":
        raise Refused("a machine without a network has no ports to publish")
    for one in ports:
        if [other.port for other in ports if other.protocol == one.protocol].count(one.port) > 1:
            raise Refused(f"port {one.port} is published twice")


def _check_disks(spec: MachineSpec) -> None:
    names = [disk.name for disk in spec.disks]
    for name in names:
        if not DISK_NAME.fullmatch(name):
            raise UsageError(f"'{name}' is not a disk name; use letters, digits, '_' and '-', "
                             "at most 16")
        if names.count(name) > 1:
            raise Refused(f"disk name '{name}' is given twice; name each disk differently")
    files = [os.path.realpath(disk.file) for disk in spec.disks]
    for file in files:
        if files.count(file) > 1:
            raise Refused(f"disk file {file} is given twice; a machine cannot use it as two disks")


def _check_extra(extra: tuple[str, ...]) -> None:
    for argument in extra:
        option = argument.replace("--", "-", 1)
        if option in _OURS:
            raise Refused(f"QEMU option {argument} cannot be given: Epochs sets it itself")
        for word in _DISCARDS_RAM:
            if word in argument:
                raise Refused(f"QEMU argument '{argument}' cannot be used: {word} devices discard "
                              "guest memory behind Epochs' back, which would damage epochs")
