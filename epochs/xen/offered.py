"""What a domain's configuration must be like for a machine to be made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import blockcow
from epochs.errors import Refused
from epochs.spec import DiskSpec, MachineSpec
from epochs.xen import toolstack
from epochs.xen.config import DomainConfig

KINDS = ("pv", "pvh")
# Lists of devices that a suspended domain does not come back with, as libxl names them.
NOT_SAVED = {"pcidevs": "a PCI device of the host", "usbdevs": "a USB device of the host",
             "p9s": "a 9p file system", "vtpms": "a virtual TPM"}


def accepted(spec: MachineSpec, config: DomainConfig, *, but: int | None = None) -> MachineSpec:
    """A specification with what the configuration says filled in. ``but``: the number of the domain
    that has the disks rightfully now. Refused, NotFound."""
    refuse_kind(config)
    refuse_unsaved(config, config.disks.keys())
    for key in ("kernel", "ramdisk"):
        file = config.raw["b_info"].get(key)
        if file and not Path(file).is_absolute():
            raise Refused(f"{key} is '{file}' in the configuration; give its whole path, for the "
                          "domain is started from another directory")
    given = {disk.name: disk for disk in spec.disks}
    for unknown in given.keys() - config.disks.keys():
        config.disk(unknown)
    disks = tuple(_disk(one, given.get(vdev), vdev) for vdev, one in config.disks.items())
    _refuse_used(disks, {number: other for number, other in toolstack.running().items()
                         if number != but})
    return replace(spec, memory=config.memory, cpus=config.cpus, net="none", disks=disks)


def refuse_kind(config: DomainConfig) -> None:
    """Refused if domains of that kind are not run."""
    if config.kind not in KINDS:
        raise Refused(f"a domain of type {config.kind} has a device model, whose state is not "
                      "kept: make it pvh or pv (files of 'xl save' can be imported and exported)")


def refuse_unsaved(config: DomainConfig, disks: Collection[str]) -> None:
    """Refused if the domain has a device that an epoch with these disks would not bring back."""
    for key, what in NOT_SAVED.items():
        if config.raw.get(key):
            raise Refused(f"the domain has {what} ('{key}'), which cannot be part of an epoch; "
                          "take it out of the configuration")
    if config.disks.keys() != set(disks):
        raise Refused(f"the domain has disks {', '.join(config.disks) or 'none'}, and its machine "
                      f"{', '.join(disks) or 'none'}; take away with 'xl block-detach' what was "
                      "attached since it was added")


def _disk(raw: dict[str, Any], given: DiskSpec | None, vdev: str) -> DiskSpec:
    """A disk of a configuration, with the backend that the user wants for it."""
    path = str(raw.get("pdev_path") or "")
    if raw.get("is_cdrom") or not raw.get("readwrite") or not path:
        raise Refused(f"disk '{vdev}' is read-only or a CD-ROM, which cannot be part of an epoch; "
                      "take it out of the configuration")
    if raw.get("format", "raw") != "raw":
        raise Refused(f"disk '{vdev}' ({path}) is a {raw['format']} file, which cannot be frozen; "
                      "convert it to raw")
    if given is None:
        return DiskSpec(vdev, path)
    if Path(given.file).resolve() != Path(path).resolve():
        raise Refused(f"disk '{vdev}' is {path} in the configuration, not {given.file}")
    if given.backend is not None and given.backend not in (*blockcow.DIRECT, blockcow.LVM):
        raise Refused(f"disk '{vdev}' cannot be kept by {given.backend}, whose layers are files: "
                      "Xen's block backend needs devices; there are lvm, dmthin and dmsnap")
    return replace(given, file=path)


def _refuse_used(disks: tuple[DiskSpec, ...], others: Mapping[int, DomainConfig]) -> None:
    """Xen's block backend takes no device for itself alone, so that nothing else tells."""
    for number, other in others.items():
        held = {Path(str(one.get("pdev_path") or "/")).resolve() for one in other.disks.values()}
        for disk in disks:
            if Path(disk.file).resolve() in held:
                raise Refused(f"disk '{disk.name}' ({disk.file}) is in use by domain "
                              f"'{other.name}' (number {number}); shut that down first")
