"""Putting up a machine's isolated network, plugging its hypervisor in, taking it down.

The network belongs to the machine, not to an instance: it outlives rollbacks, and the address
stays. Its number is kept in the machine's directory, so that it comes back after a stop if nobody
took it meanwhile. What was never completed is made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from epochs import points
from epochs.catalog import MachineRecord
from epochs.durable import write_file
from epochs.errors import EpochsError, Failed, Refused
from epochs.network import namespaces, rules
from epochs.network.namespaces import told
from epochs.network.plan import (
    BRIDGE,
    GATEWAY,
    GUEST,
    HOST_PREFIX,
    Network,
    Publish,
    candidates,
    namespace,
)
from epochs.store import StoreFiles

NUMBER = "network"  # file in the machine's directory
RESOLVED = Path("/run/systemd/resolve/resolv.conf")
TOOLS = ("nft", "dnsmasq", "nsenter", "ip")
MEND = "apt-get install nftables dnsmasq-base util-linux iproute2"


def lacking() -> str | None:
    """Why this host cannot have isolated networks for us, or None."""
    if os.geteuid() != 0:
        return "isolated networks need root"
    if not namespaces.TUN.exists():
        return f"isolated networks need {namespaces.TUN}, which this kernel does not offer"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"isolated networks need {' and '.join(missing)}: {MEND}" if missing else None


def put_up(store: StoreFiles, machine: MachineRecord) -> Network:
    """The network of a machine, complete; made if it is not there. Its rules are loaded in any
    case: somebody may have flushed them. Refused, Failed: then nothing is left of a new one."""
    if (reason := lacking()) is not None:
        raise Refused(reason)
    name = namespace(machine.id)
    network = known(store, machine.id)
    if network is not None and _stands(store, machine.id, network, name):
        _finish(machine, network, name)
        return network
    take_down(store, machine.id)
    try:
        with told("an isolated network"):
            network = _make(store, machine, name, network)
        points.hit("network.made")
        _finish(machine, network, name)
    except BaseException:
        take_down(store, machine.id)
        raise
    return network


def _alias(store: StoreFiles, machine_id: str) -> str:
    return f"epochs {store.catalog.store_id} {machine_id}"


def _stands(store: StoreFiles, machine_id: str, network: Network, name: str) -> bool:
    """Whether the interfaces are all there: an instance was plugged in already, then, or its launch
    was killed behind that."""
    return (namespaces.exists(name)
            and namespaces.aliases().get(network.interface) == _alias(store, machine_id)
            and namespaces.leads_to(network.interface, name)
            and namespaces.has_bridge(name))


def _make(store: StoreFiles, machine: MachineRecord, name: str, before: Network | None) -> Network:
    from pyroute2 import IPRoute

    namespaces.create(name)
    points.hit("network.named")
    numbers = ([] if before is None else [before.number]) + candidates(machine.id)
    with IPRoute() as host:
        for network in map(Network, numbers):
            # Recorded first, so that it is found if we are killed.
            write_file(store.machine_dir(machine.id) / NUMBER, str(network.number).encode())
            if namespaces.reserve(host, network, name):
                break
        else:
            raise Failed("no address is free for an isolated network")
        points.hit("network.reserved")
        namespaces.connect(host, network, name, _alias(store, machine.id))
    return network


def _finish(machine: MachineRecord, network: Network, name: str) -> None:
    """What may be done again: rules, each table in one step, and who gives out the address."""
    rules.load(rules.inside(), name)
    rules.load(rules.outside(network, [Publish.parse(text) for text in machine.spec.publish]))
    points.hit("network.ruled")
    if not namespaces.processes(name):
        _serve_addresses(machine, name)


def _serve_addresses(machine: MachineRecord, name: str) -> None:
    """dnsmasq gives the guest its address, always the same, and resolves names for it. It lives in
    the namespace and ends with it."""
    command = ["nsenter", f"--net=/run/netns/{name}", "dnsmasq", "--conf-file=/dev/null",
               f"--interface={BRIDGE}", "--bind-interfaces", "--except-interface=lo",
               "--pid-file=", "--leasefile-ro", "--dhcp-authoritative", "--no-hosts",
               f"--dhcp-range={GUEST},{GUEST},255.255.255.0,infinite",
               f"--dhcp-host={machine.mac},{GUEST}", f"--dhcp-option=option:router,{GATEWAY}",
               f"--dhcp-option=option:dns-server,{GATEWAY}"]
    if RESOLVED.exists():  # /etc/resolv.conf then names an address that only the host has
        command.append(f"--resolv-file={RESOLVED}")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise Failed(f"dnsmasq does not start in an isolated network: {words[-1]}")


def plug(machine_id: str, instance: str) -> int:
    """A descriptor of a tap in the machine's network, for its hypervisor."""
    with told("a tap"):
        return namespaces.open_tap(namespace(machine_id), f"tap{instance[:12]}")


def plugged(machine_id: str, instance: str) -> bool:
    """Whether an instance's tap is in the machine's network as it is now."""
    name = namespace(machine_id)
    with told("a look at a tap"):
        return namespaces.exists(name) and namespaces.has_interface(name, f"tap{instance[:12]}")


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
    there = namespaces.exists(name)
    if not there and (network is None or not any(namespaces.NAMES.glob("epochs-*"))):
        return
    with told("the end of an isolated network"):
        if there:
            namespaces.end_processes(name)
        # The number may be another's by now, or have been when we were about to try it.
        if network is not None and (
                namespaces.aliases().get(network.interface) == _alias(store, machine_id)
                or (there and namespaces.leads_to(network.interface, name))):
            rules.load(rules.without(network.table))
            namespaces.remove_interface(network.interface)
        points.hit("network.unplugged")
        if there:
            namespaces.remove(name)


def leftovers(store: StoreFiles) -> list[str]:
    """Ids of machines of this store that have, or may have, a network that is up."""
    names = {entry.name for entry in namespaces.NAMES.glob("epochs-*")}
    if not names:
        return []
    start = f"epochs {store.catalog.store_id} "
    found = {alias.removeprefix(start) for interface, alias in namespaces.aliases().items()
             if interface.startswith(HOST_PREFIX) and alias.startswith(start)}
    found |= {machine.id for machine in store.catalog.machines() if namespace(machine.id) in names}
    return sorted(found)


def sweep(store: StoreFiles) -> None:
    """Take down the networks of machines that are off. A command that works on one holds its
    lock, or its journal row names it. One that cannot be taken down now is told."""
    for machine_id in leftovers(store):
        with store.try_operation_lock(machine_id, machine_id) as got:
            if not got or any(machine_id in str(row.plan) for row in store.catalog.journal()):
                continue
            if store.catalog.instance_of(machine_id) is None:
                try:
                    take_down(store, machine_id)
                except (EpochsError, OSError) as error:
                    store.notice("the network of a machine that is off cannot be taken down yet: "
                                 f"{error}")
        if store.catalog.machine_by_id(machine_id) is None:
            store.forget_machine_lock(machine_id)
