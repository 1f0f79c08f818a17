"""Putting up a machine's isolated network, plugging its hypervisor in, taking it down.

The network belongs to the machine, not to an instance: it outlives rollbacks, and the address
stays. Its number is kept in the machine's directory, so that it comes back after a stop if nobody
took it meanwhile. A namespace whose host's end has no alias was never completed, and is made anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence

from epochs.catalog import MachineRecord
from epochs.durable import write_file
from epochs.errors import Failed, Refused
from epochs.network import namespaces, rules
from epochs.network.namespaces import told
from epochs.network.plan import (
    BRIDGE,
    GATEWAY,
    GUEST,
    HOST_PREFIX,
    UPLINK,
    Network,
    Publish,
    candidates,
    namespace,
)
from epochs.store import StoreFiles

NUMBER = "network"  # file in the machine's directory
TOOLS = ("nft", "dnsmasq", "nsenter")
MEND = "apt-get install nftables dnsmasq-base util-linux"


def lacking() -> str | None:
    """Why this host cannot have isolated networks for us, or None."""
    if os.geteuid() != 0:
        return "isolated networks need root"
    if not namespaces.TUN.exists():
        return f"isolated networks need {namespaces.TUN}, which this kernel does not offer"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"isolated networks need {' and '.join(missing)}: {MEND}" if missing else None


def put_up(store: StoreFiles, machine: MachineRecord) -> Network:
    """The network of a machine, complete; made if it is not there. Refused, Failed: then nothing is
    left of it."""
    if (reason := lacking()) is not None:
        raise Refused(reason)
    name = namespace(machine.id)
    network = known(store, machine.id)
    alias = f"epochs {store.catalog.store_id} {machine.id}"
    if namespaces.exists(name):
        if network is not None and namespaces.aliases().get(network.interface) == alias:
            if not namespaces.processes(name):
                _serve_addresses(machine, name)
            return network
        take_down(store, machine.id)
    try:
        with told("an isolated network"):
            network = _make(store, machine, name, network, alias)
        published = [Publish.parse(text) for text in machine.spec.publish]
        rules.load(rules.inside(), name)
        rules.load(rules.outside(network, published))
        _serve_addresses(machine, name)
    except BaseException:
        take_down(store, machine.id)
        raise
    return network


def _make(store: StoreFiles, machine: MachineRecord, name: str, before: Network | None,
          alias: str) -> Network:
    from pyroute2 import IPRoute, netns

    netns.create(name)
    numbers = ([] if before is None else [before.number]) + candidates(machine.id)
    with IPRoute() as host:
        for network in map(Network, numbers):
            # Recorded first, so that it is found if we are killed.
            write_file(store.machine_dir(machine.id) / NUMBER, str(network.number).encode())
            if namespaces.reserve(host, network, name):
                break
        else:
            raise Failed("no address is free for an isolated network")
        namespaces.connect(host, network, name, alias)
    return network


def _serve_addresses(machine: MachineRecord, name: str) -> None:
    """dnsmasq gives the guest its address, always the same, and resolves names for it. It lives in
    the namespace and ends with it."""
    command = ["nsenter", f"--net=/run/netns/{name}", "dnsmasq", "--conf-file=/dev/null",
               f"--interface={BRIDGE}", "--bind-interfaces", "--except-interface=lo",
               "--pid-file=", "--leasefile-ro", "--dhcp-authoritative", "--no-hosts",
               f"--dhcp-range={GUEST},{GUEST},255.255.255.0,infinite",
               f"--dhcp-host={machine.mac},{GUEST}", f"--dhcp-option=option:router,{GATEWAY}",
               f"--dhcp-option=option:dns-server,{GATEWAY}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise Failed(f"dnsmasq does not start in an isolated network: {words[-1]}")


def plug(machine_id: str, instance: str) -> int:
    """A descriptor of a tap in the machine's network, for its hypervisor."""
    with told("a tap"):
        return namespaces.open_tap(namespace(machine_id), f"tap{instance[:12]}")


def known(store: StoreFiles, machine_id: str) -> Network | None:
    """The network that a machine has or had."""
    try:
        text = (store.machine_dir(machine_id) / NUMBER).read_text()
    except FileNotFoundError:
        return None
    return Network(int(text))


def address(store: StoreFiles, machine_id: str) -> str | None:
    """Where a machine is reached, if its network is up."""
    network = known(store, machine_id)
    return network.address if network and namespaces.exists(namespace(machine_id)) else None


def take_down(store: StoreFiles, machine_id: str) -> None:
    """Remove a machine's network and who lives in it; nothing if there is none. Repeatable."""
    name = namespace(machine_id)
    network = known(store, machine_id)
    if not namespaces.exists(name):
        return
    from pyroute2 import netns

    with told("the end of an isolated network"):
        namespaces.end_processes(name)
        if network is not None and _ours(network, name):
            rules.load(rules.without(network.table))
            namespaces.remove_interface(network.interface)
        netns.remove(name)


def _ours(network: Network, name: str) -> bool:
    """Whether the host's end of that number leads to the namespace: it may be another's, whose
    number we were about to try."""
    from pyroute2 import IPRoute, NetNS

    with NetNS(name, flags=0) as inside, IPRoute() as host:
        theirs = [link.get_attr("IFLA_LINK") for index in inside.link_lookup(ifname=UPLINK)
                  for link in inside.get_links(index)]
        return bool({*theirs} & {*host.link_lookup(ifname=network.interface)})


def leftovers(store: StoreFiles) -> list[str]:
    """Ids of machines of this store whose network is up."""
    if not any(namespaces.NAMES.glob("epochs-*")):
        return []
    start = f"epochs {store.catalog.store_id} "
    return [alias.removeprefix(start) for interface, alias in namespaces.aliases().items()
            if interface.startswith(HOST_PREFIX) and alias.startswith(start)]


def sweep(store: StoreFiles) -> None:
    """Take down the networks of machines that are off. A command that works on one holds its
    lock."""
    for machine_id in leftovers(store):
        with store.try_operation_lock(machine_id, machine_id) as got:
            if not got:
                continue
            if any(machine_id in str(record.plan) for record in store.catalog.journal()):
                continue
            if store.catalog.instance_of(machine_id) is None:
                with contextlib.suppress(FileNotFoundError):
                    take_down(store, machine_id)


def published(machine: MachineRecord) -> Sequence[str]:
    """As shown to the user."""
    return [str(Publish.parse(text)) for text in machine.spec.publish]


