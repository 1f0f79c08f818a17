"""A domain's configuration as libxl writes it: JSON (tools/libs/light/libxl_types.idl)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from epochs.errors import NotFound, Refused

KIB = 1024


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
