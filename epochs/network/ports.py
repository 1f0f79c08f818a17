"""Published ports of the host must be nobody else's."""

from __future__ import annotations

import socket

from epochs.catalog import MachineRecord
from epochs.errors import Refused
from epochs.network.plan import Publish
from epochs.store import StoreFiles

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def refuse_taken(store: StoreFiles, machine: MachineRecord) -> None:
    """Refused if a port that a machine would publish belongs to another machine that is on, or to a
    program of the host."""
    wanted = [Publish.parse(text) for text in machine.spec.publish]
    if not wanted:
        return
    for other in store.catalog.machines():
        if other.id == machine.id or store.catalog.instance_of(other.id) is None:
            continue
        theirs = {(one.protocol, one.port) for one in map(Publish.parse, other.spec.publish)}
        for one in wanted:
            if (one.protocol, one.port) in theirs:
                raise Refused(f"port {one.port} of this host leads to machine '{other.name}' "
                              "already; publish another one")
    for one in wanted:
        with socket.socket(socket.AF_INET, KINDS[one.protocol]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((one.address or "0.0.0.0", one.port))  # noqa: S104 - as it will be
            except OSError as error:
                raise Refused(f"port {one} cannot be published: {error.strerror}") from error

