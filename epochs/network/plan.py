"""Names and addresses of isolated networks. Pure.

::

    guest 10.0.2.15 -- tap -- bridge 10.0.2.2 -- NAT -- "up" 198.18.x.2 -- 198.18.x.1 "epn-N" host
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from epochs.errors import UsageError

# Set aside for measurements between devices (RFC 2544), and so used by nobody else.
POOL = IPv4Network("198.18.0.0/15")
COUNT = POOL.num_addresses // 4  # networks of four addresses, two of them usable

# The same inside all of them, and as QEMU's user network has them.
GUEST, GATEWAY, INSIDE = "10.0.2.15", "10.0.2.2", 24
GATEWAY_MAC = "52:55:0a:00:02:02"  # a restored guest remembers it
BRIDGE, UPLINK = "bridge", "up"
HOST_PREFIX = "epn-"
PUBLISH = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+):)?(\d+):(\d+)(?:/(tcp|udp))?")


@dataclass(frozen=True)
class Network:
    """The ``number``th one."""

    number: int

    @property
    def interface(self) -> str:
        """Of the host's end. The kernel has one of a name only, so it also is the reservation."""
        return f"{HOST_PREFIX}{self.number}"

    @property
    def table(self) -> str:
        """Of nft, on the host."""
        return f"epochs-{self.number}"

    @property
    def subnet(self) -> IPv4Network:
        return IPv4Network((int(POOL.network_address) + 4 * self.number, 30))

    @property
    def host(self) -> str:
        return str(IPv4Address(int(self.subnet.network_address) + 1))

    @property
    def address(self) -> str:
        """Where the guest is reached from the host."""
        return str(IPv4Address(int(self.subnet.network_address) + 2))


def candidates(machine_id: str) -> list[int]:
    """Numbers to try for a machine that has none: each machine begins elsewhere."""
    first = int.from_bytes(hashlib.sha256(machine_id.encode()).digest()[:4]) % COUNT
    return [(first + step) % COUNT for step in range(1024)]


def namespace(machine_id: str) -> str:
    """Name of a machine's network namespace."""
    return f"epochs-{machine_id[:20]}"


@dataclass(frozen=True)
class Publish:
    """A port of the host that leads to one of the guest. ``address`` None: any of the host's."""

    address: str | None
    port: int
    guest: int
    protocol: str

    @classmethod
    def parse(cls, text: str) -> Publish:
        """``[ADDRESS:]PORT:GUESTPORT[/tcp|/udp]``; UsageError."""
        match = PUBLISH.fullmatch(text)
        if match is None or not all(0 < int(match[n]) < 65536 for n in (2, 3)):
            raise UsageError(f"'{text}' is no port to publish; write it like 2222:22 or "
                             "127.0.0.1:8053:53/udp")
        try:
            address = str(IPv4Address(match[1])) if match[1] else None
        except ValueError:
            raise UsageError(f"'{match[1]}' is no address of IPv4") from None
        return cls(address, int(match[2]), int(match[3]), match[4] or "tcp")

    def __str__(self) -> str:
        where = f"{self.address}:" if self.address else ""
        return f"{where}{self.port}:{self.guest}/{self.protocol}"
