"""QEMU's block graph of a chain of qcow2 layers: what to open, and what is open.

The graph is always given explicitly, node by node, so that the names in the images' headers do
not matter at run time. Everything below the active layer is opened read-only: QEMU then takes
shared locks only (docs/system/qemu-block-drivers, "Disk image file locking"), and any number of
processes can have the same frozen files open.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from .interface import JsonDict, Layer, LiveBlocks
from .names import file_node, frozen_node, in_directory

FROZEN_L2_CACHE = 1 << 20
"""Bytes of L2 table cache of a frozen layer at most: enough for 8 GiB of disk (16 bytes per
128 KiB cluster), where QEMU's default of 32 MiB for each link of a chain could add up. Only what
is read is ever allocated."""

L2_CACHE_ENTRY = 4096
"""Bytes of L2 table read or written at once; the default is 64 KiB, which a first write to an
idle disk need not load. One entry covers 32 MiB of disk."""


def _file(path: Path, node: str, writable: bool, direct: bool = False) -> JsonDict:
    block = stat.S_ISBLK(path.stat().st_mode)
    return {
        "driver": "host_device" if block else "file",
        "node-name": file_node(node),
        "filename": str(path),
        "aio": "threads",
        "read-only": not writable,
        "auto-read-only": True,
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": False},
    }


def _format(driver: str, node: str, writable: bool, direct: bool = False) -> JsonDict:
    options: JsonDict = {
        "driver": driver,
        "node-name": node,
        "read-only": not writable,
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": False},
    }
    if driver == "qcow2":
        options["l2-cache-entry-size"] = L2_CACHE_ENTRY
        if not writable:
            options["l2-cache-size"] = FROZEN_L2_CACHE
    return options


def active_options(path: Path, node: str, backing: str | None) -> JsonDict:
    """Options of an active overlay; ``backing`` is a node name, or None for "not attached"."""
    options = _format("qcow2", node, writable=True)
    return {**options, "file": _file(path, node, writable=True), "backing": backing}


def raw_options(path: Path, node: str, *, direct: bool = False) -> JsonDict:
    """Options of an active raw file or device, which needs nothing beneath it. ``direct``: past the
    host's page cache."""
    return {**_format("raw", node, writable=True, direct=direct),
            "file": _file(path, node, writable=True, direct=direct)}


def reopen_options(node: str, backing: str) -> JsonDict:
    """The same options for ``blockdev-reopen``, which resets whatever is not repeated and takes
    children by name only (qapi/block-core.json)."""
    return {
        **_format("qcow2", node, writable=True),
        "file": file_node(node),
        "backing": backing,
    }


def frozen_options(directory: Path, layer: Layer, backing: str | None) -> JsonDict:
    """Options of a frozen layer (or of a user's base), named after its file."""
    path = in_directory(directory, layer.file)
    node = frozen_node(layer.id, path, backing)
    options = {
        **_format(layer.format, node, writable=False),
        "file": _file(path, node, writable=False),
    }
    if layer.format == "qcow2":
        options["backing"] = backing
    return options


def chain_options(directory: Path, frozen: Sequence[Layer]) -> list[JsonDict]:
    """Options of a whole frozen chain (given top first), in the order to open them: base first."""
    options: list[JsonDict] = []
    for layer in reversed(frozen):
        backing = options[-1]["node-name"] if options else None
        options.append(frozen_options(directory, layer, backing))
    return options


def nested(options: Sequence[JsonDict]) -> JsonDict:
    """The same graph as one tree, as a ``json:`` name takes it."""
    tree: JsonDict = {}
    for entry in options:
        tree = {**entry, "backing": tree} if entry.get("backing") is not None else entry
    return tree


def raw_tree(path: Path) -> JsonDict:
    """A raw file or device, read-only, as such a tree."""
    driver = "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file"
    return {"driver": "raw", "read-only": True,
            "file": {"driver": driver, "filename": str(path), "read-only": True,
                     "locking": "off"}}


def open_nodes(live: LiveBlocks) -> set[str]:
    """Names of all nodes in the running hypervisor."""
    found = live.execute("query-named-block-nodes", flat=True)
    return {node["node-name"] for node in found}


def backing_nodes(live: LiveBlocks, node: str) -> list[str]:
    """Names of the nodes under ``node``, along the backing links, top first.

    From ``x-debug-query-block-graph``: until QEMU 10.1 there is no other command that gives the
    edges (7.2 and 10.0 checked).
    """
    graph = live.execute("x-debug-query-block-graph")
    names = {entry["id"]: entry["name"] for entry in graph["nodes"]}
    below = {
        names[edge["parent"]]: names[edge["child"]]
        for edge in graph["edges"]
        if edge["name"] == "backing"
    }
    found: list[str] = []
    while node in below and below[node] not in found:
        node = below[node]
        found.append(node)
    return found
