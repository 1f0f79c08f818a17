"""What nft is told, on the host and in a machine's namespace. Pure, but for :func:`load`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from epochs.errors import Failed, Refused
from epochs.network.plan import BRIDGE, GUEST, HOST_PREFIX, UPLINK, Network, Publish


def inside() -> str:
    """In the namespace: what comes for its address is the guest's, what the guest sends leaves
    under that address."""
    return without("epochs") + f"""
table ip epochs {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        iifname "{UPLINK}" dnat to {GUEST}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        oifname "{UPLINK}" masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{UPLINK}" oifname "{BRIDGE}" accept
        iifname "{BRIDGE}" oifname "{UPLINK}" accept
    }}
}}
"""


def outside(network: Network, published: Sequence[Publish]) -> str:
    """On the host: no way from one machine to another, the way out where the host forwards at all,
    and published ports, for others and for the host itself."""
    leads = "\n        ".join(
        (f"ip daddr {one.address} " if one.address else "fib daddr type local ")
        + f"{one.protocol} dport {one.port} dnat to {network.address}:{one.guest}"
        for one in published)
    return without(network.table) + f"""
table ip {network.table} {{
    chain forward {{
        type filter hook forward priority filter;
        iifname "{network.interface}" oifname "{HOST_PREFIX}*" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        oifname "{network.interface}" ip saddr 127.0.0.0/8 masquerade
        ip saddr {network.subnet} oifname != "{HOST_PREFIX}*" masquerade
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        {leads}
    }}
    chain output {{
        type nat hook output priority -100;
        {leads}
    }}
}}
"""


def without(table: str) -> str:
    """Remove a table of the host, whether it is there or not."""
    return f"table ip {table} {{}}\ndelete table ip {table}\n"


def load(text: str, namespace: str | None = None) -> None:
    """Have nft do it, all or nothing. Refused if there is no nft; Failed in its own words."""
    way = [] if namespace is None else ["nsenter", f"--net=/run/netns/{namespace}"]
    try:
        done = subprocess.run([*way, "nft", "-f", "-"], input=text, capture_output=True, text=True,
                              check=False)
    except FileNotFoundError as error:
        raise Refused(f"isolated networks need {error.filename}: apt-get install nftables "
                      "util-linux") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise Failed(f"nft refused the rules of an isolated network: {words[0]}")
