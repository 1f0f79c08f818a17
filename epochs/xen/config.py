"""A domain's configuration as libxl writes it: JSON (tools/libs/light/libxl_types.idl)."""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochs.errors import NotFound, Refused

KIB = 1024
OVERHEAD = 8 << 20  # bytes of Xen's own for a domain, beyond what its configuration says


@dataclass
class DomainConfig:
    """``raw``: the document as it is; what is not looked at here stays in it."""

    raw: dict[str, Any]

    @classmethod
    def parse(cls, text: bytes | str) -> DomainConfig:
        """Refused if it does not describe a domain."""
        try:
            raw = json.loads(text)
            found = cls(raw)
            for part in (found.name, found.kind, found.memory, found.cpus, found.disks):
                if part is None:
                    raise KeyError(part)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"the domain's configuration is not one of libxl's: {error}") from error
        return found

    def to_json(self) -> bytes:
        return json.dumps(self.raw).encode()

    @property
    def name(self) -> str:
        return str(self.raw["c_info"]["name"])

    @property
    def kind(self) -> str:
        """"pv", "pvh" or "hvm"."""
        return str(self.raw["c_info"]["type"])

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.raw["b_info"]["max_memkb"]) * KIB

    @property
    def footprint(self) -> int:
        """Bytes that must be free on the host for it: what it may have now, which its balloon
        driver keeps to, and not all that it could be given."""
        now = int(self.raw["b_info"].get("target_memkb") or 0) * KIB or self.memory
        return now + int(self.raw["b_info"].get("shadow_memkb") or 0) * KIB + OVERHEAD

    @property
    def cpus(self) -> int:
        return int(self.raw["b_info"].get("max_vcpus", 1))

    @property
    def disks(self) -> dict[str, dict[str, Any]]:
        """By their name in the guest, as xvda."""
        return {str(disk["vdev"]): disk for disk in self.raw.get("disks", [])}

    def disk(self, name: str) -> dict[str, Any]:
        """NotFound if there is none of that name."""
        if name not in self.disks:
            raise NotFound(f"the domain has no disk '{name}'; it has "
                           + (", ".join(self.disks) or "none"))
        return self.disks[name]

    def placed(self, name: str, who: uuid.UUID, devices: Mapping[str, Path]) -> DomainConfig:
        """The same domain under another name and UUID, with its disks where ``devices`` says."""
        raw = copy.deepcopy(self.raw)
        raw["c_info"] |= {"name": name, "uuid": str(who)}
        for disk in raw.get("disks", []):
            disk.pop("script", None)
            disk |= {"pdev_path": str(devices[disk["vdev"]]), "backend": "phy", "format": "raw"}
        for nic in raw.get("nics", []):
            nic.pop("ifname", None)  # the host's side of it: two domains may be there for a while
        return DomainConfig(raw)

    def detached(self) -> DomainConfig:
        """The same domain as an epoch keeps it: whoever restores it says who it is and where its
        disks are. `xl restore` of an exported one finds no disks, rather than those of today."""
        nowhere = {name: Path("/epochs/disks-are-not-in-this-file") / name for name in self.disks}
        return self.placed(self.name, uuid.uuid4(), nowhere)

    def with_macs_of(self, machine_id: str) -> DomainConfig:
        """The same domain with MAC addresses of that machine's own, always the same ones."""
        raw = copy.deepcopy(self.raw)
        for number, nic in enumerate(raw.get("nics", [])):
            nic["mac"] = mac_address(machine_id, number)
        return DomainConfig(raw)


def mac_address(machine_id: str, number: int) -> str:
    """An address of those that the Xen project has for domains (xl-network-configuration)."""
    low = hashlib.sha256(f"{machine_id}/{number}".encode()).digest()
    return f"00:16:3e:{low[0] & 0x7f:02x}:{low[1]:02x}:{low[2]:02x}"


def overridden(text: str, name: str, who: uuid.UUID,
               devices: Mapping[str, Path]) -> str:
    """A configuration for `xl create` with this identity and these disks instead of its own; what
    comes last counts."""
    disks = ", ".join(f'"format=raw, vdev={disk}, access=rw, target={device}"'
                      for disk, device in devices.items())
    return f'{text}\nname = "{name}"\nuuid = "{who}"\ndisk = [{disks}]\n'
