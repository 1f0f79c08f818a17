"""The kernel's side of an isolated network: namespaces, interfaces, taps; through pyroute2.

Only pyroute2's IPRoute is used, in a thread that has entered the namespace: its NetNS and
netns.create fork, and a signal that comes then runs our own clearing up in the child as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from epochs.errors import Failed, Refused
from epochs.network.plan import (
    BRIDGE,
    GATEWAY,
    GATEWAY_MAC,
    INSIDE,
    UPLINK,
    Network,
)

NAMES = Path("/run/netns")
TUN = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_UP = 1  # linux/if.h
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
Result = TypeVar("Result")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """The kernel's refusals as ours."""
    from pyroute2 import NetlinkError

    try:
        yield
    except NetlinkError as error:
        if error.code in (errno.EOPNOTSUPP, errno.ENODEV, errno.EPROTONOSUPPORT):
            raise Refused(f"this kernel cannot make {what}: {error}") from error
        if error.code in (errno.EPERM, errno.EACCES):
            raise Refused(f"{what} cannot be made without root: {error}") from error
        raise Failed(f"{what} cannot be made: {error}") from error
    except PermissionError as error:
        raise Refused(f"{what} cannot be made without root: {error}") from error
    except OSError as error:
        raise Failed(f"{what} cannot be made: {error}") from error


def exists(name: str) -> bool:
    return (NAMES / name).exists()


def within(name: str, action: Callable[[], Result]) -> Result:
    """Do something in a namespace, in a thread that ends with it. What it opens stays usable."""
    from pyroute2 import netns

    def there() -> Result:
        netns.setns(name, flags=0)
        return action()

    with ThreadPoolExecutor(1, "epochs-netns") as thread:
        return thread.submit(there).result()


def create(name: str) -> None:
    """A new namespace, known by name. Failed in the words of ip(8)."""
    _ip("add", name)


def remove(name: str) -> None:
    """Forget a namespace; it is gone with the last who is in it."""
    _ip("delete", name)


def _ip(action: str, name: str) -> None:
    done = subprocess.run(["ip", "netns", action, name], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise Failed(f"ip netns {action} {name} failed: {done.stderr.strip()}")


def reserve(host: Any, network: Network, name: str) -> bool:
    """Make the pair of interfaces between the host and a namespace; False if its number is taken,
    here or by an address of the host's."""
    from pyroute2 import NetlinkError

    if any(host.get_addr(address=network.host)):
        return False
    try:
        host.link("add", ifname=network.interface, kind="veth",
                  peer={"ifname": UPLINK, "net_ns_fd": name})
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            return False
        raise
    return True


def connect(host: Any, network: Network, name: str, alias: str) -> None:
    """Addresses, routes and the bridge. The alias of the host's end says whose it is."""
    (ours,) = host.link_lookup(ifname=network.interface)
    host.addr("add", index=ours, address=network.host, prefixlen=30)
    host.link("set", index=ours, state="up", ifalias=alias)
    within(name, lambda: _connect_inside(network))
    # A port published on 127.0.0.1 leads there.
    _set(f"ipv4/conf/{network.interface}/route_localnet", "1")


def _connect_inside(network: Network) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as inside:
        inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
        (up,) = inside.link_lookup(ifname=UPLINK)
        inside.addr("add", index=up, address=network.address, prefixlen=30)
        inside.link("set", index=up, state="up")
        inside.route("add", dst="default", gateway=network.host)
        inside.link("add", ifname=BRIDGE, kind="bridge", address=GATEWAY_MAC)
        (bridge,) = inside.link_lookup(ifname=BRIDGE)
        inside.addr("add", index=bridge, address=GATEWAY, prefixlen=INSIDE)
        inside.link("set", index=bridge, state="up")
    _set("ipv4/ip_forward", "1")


def _set(what: str, value: str) -> None:
    Path("/proc/sys/net", what).write_text(value)


def aliases() -> dict[str, str]:
    """Interface to alias, of those of the host that have one."""
    from pyroute2 import IPRoute

    with told("a list of interfaces"), IPRoute() as host:
        return {link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_IFALIAS")
                for link in host.get_links() if link.get_attr("IFLA_IFALIAS")}


def open_tap(name: str, tap: str) -> int:
    """A tap on the namespace's bridge; it is gone when its descriptor is closed."""
    from pyroute2 import IPRoute

    def there() -> int:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", tap.encode(),
                                                   IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            with IPRoute() as inside:
                (index,) = inside.link_lookup(ifname=tap)
                inside.link("set", index=index, master=inside.link_lookup(ifname=BRIDGE)[0],
                            state="up")
        except BaseException:
            os.close(fd)
            raise
        return fd

    return within(name, there)


def leads_to(interface: str, name: str) -> bool:
    """Whether the host's end of a pair has its other end in a namespace."""
    from pyroute2 import IPRoute

    def there() -> set[int]:
        with IPRoute() as inside:
            return {link.get_attr("IFLA_LINK") for index in inside.link_lookup(ifname=UPLINK)
                    for link in inside.get_links(index)}

    try:
        theirs = within(name, there)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False  # a name that was never mounted: its making was killed
    with IPRoute() as host:
        return bool(theirs & {*host.link_lookup(ifname=interface)})


def has_bridge(name: str) -> bool:
    """Whether a namespace's own side is complete: its bridge, which is made last, is up."""
    from pyroute2 import IPRoute

    def there() -> bool:
        with IPRoute() as inside:
            return any(link["flags"] & IFF_UP for index in inside.link_lookup(ifname=BRIDGE)
                       for link in inside.get_links(index))

    return within(name, there)


def has_interface(name: str, interface: str) -> bool:
    """Whether there is an interface of that name in a namespace."""
    from pyroute2 import IPRoute

    def there() -> bool:
        with IPRoute() as inside:
            return bool(inside.link_lookup(ifname=interface))

    return within(name, there)


def processes(name: str) -> list[int]:
    """Pids of who lives in a namespace."""
    there = (NAMES / name).stat()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                its = (entry / "ns" / "net").stat()
                if (its.st_dev, its.st_ino) == (there.st_dev, there.st_ino):
                    found.append(int(entry.name))
    return found


def end_processes(name: str) -> None:
    """Kill who lives in a namespace and wait until they are gone."""
    import select

    for pid in processes(name):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if pid in processes(name):  # still the same one
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [], 10.0)
        finally:
            os.close(fd)


def remove_interface(interface: str) -> None:
    """Remove one end of a pair, and the other with it."""
    from pyroute2 import IPRoute

    with IPRoute() as host:
        for index in host.link_lookup(ifname=interface):
            host.link("del", index=index)
