"""File systems in a raw disk image: found by blkid and sfdisk, mounted read-only."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from blockcow import loop
from epochs.errors import Failed, Refused

# A guest made it: nothing in it may act here, nor bring the host down.
OPTIONS = "ro,nosuid,nodev,noexec"
# What a superblock asks for when it finds errors may be a panic; and two epochs of one disk have
# the same UUID.
KIND_OPTIONS = {"ext2": "errors=continue", "ext3": "errors=continue", "ext4": "errors=continue",
                "nilfs2": "errors=continue", "xfs": "nouuid"}


@dataclass(frozen=True)
class FileSystem:
    """``partition`` is None for one that takes the whole disk. ``offset``, ``size`` in bytes; a
    size of 0 means up to the end."""

    kind: str
    partition: int | None = None
    offset: int = 0
    size: int = 0


def found_in(image: Path) -> list[FileSystem]:
    """What can be mounted in an image: the disk itself, or its partitions."""
    whole = _probe(image)
    if kind := whole.get("TYPE"):
        return [FileSystem(kind)] if whole.get("USAGE") == "filesystem" else []
    if "PTTYPE" not in whole:
        return []
    table = json.loads(_run(["sfdisk", "--json", str(image)]).stdout)["partitiontable"]
    unit = int(table.get("sectorsize", 512))
    found = []
    for one in table.get("partitions", []):
        number = int(re.findall(r"\d+", one["node"])[-1])  # the image's name, then the number
        offset, size = one["start"] * unit, one["size"] * unit
        inside = _probe(image, offset, size)
        if inside.get("USAGE") == "filesystem":
            found.append(FileSystem(inside["TYPE"], number, offset, size))
    return found


def chosen(image: Path, partition: int | None, what: str) -> FileSystem:
    """The one to mount; Refused if it is not clear, or there is none."""
    there = found_in(image)
    numbers = ", ".join(str(one.partition) for one in there)
    if partition is not None:
        for one in there:
            if one.partition == partition:
                return one
        raise Refused(f"{what} has no file system in partition {partition}; "
                      + (f"there are {numbers}" if there else "there is none at all"))
    if not there:
        holds = _probe(image)
        kind = holds.get("TYPE") or holds.get("PTTYPE") or "nothing that blkid knows"
        raise Refused(f"{what} holds no file system that can be mounted ({kind})")
    if len(there) > 1:
        raise Refused(f"{what} has several file systems; choose one with --partition: {numbers}")
    return there[0]


def mount(image: Path, one: FileSystem, directory: Path) -> None:
    """Mount it. The journal is replayed, into the image, which is a throw-away."""
    options = ",".join(word for word in (OPTIONS, KIND_OPTIONS.get(one.kind)) if word)
    with loop.attached(image, offset=one.offset, size=one.size) as node:
        done = _run(["mount", "-t", one.kind, "-o", options, str(node), str(directory)],
                    check=False)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise Failed(f"the file system cannot be mounted on {directory}: "
                         f"{words[0] if words else done.returncode}")


@dataclass(frozen=True)
class _Mount:
    """A line of mountinfo (proc(5)). ``loop`` is the number of the loop device, if it is one."""

    place: bytes
    kind: bytes
    loop: int | None


def _mounts() -> list[_Mount]:
    found = []
    with Path("/proc/self/mountinfo").open("rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(b" ")
            major, _, minor = fields[2].partition(b":")
            place = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), fields[4])
            kind = fields[fields.index(b"-") + 1]
            found.append(_Mount(place, kind, int(minor) if int(major) == loop.MAJOR else None))
    return found


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted on just that directory or file."""
    wanted = os.fsencode(directory)
    return any(one.place == wanted for one in _mounts())


def unmount(image: Path, *, lazily: bool = False) -> None:
    """Unmount every file system that was mounted from an image, wherever that is now, and nothing
    else; none is fine. Refused if somebody works in one, or something else was mounted over it.
    ``lazily``: it goes once nobody works in it any more."""
    while (place := _place_of(image)) is not None:
        done = _run(["umount", *(["--lazy"] if lazily else []), place], check=False)
        if done.returncode and _place_of(image) is not None:
            raise Refused(f"{place} cannot be unmounted: {done.stderr.strip()}; end what works "
                          "in it")


def _place_of(image: Path) -> str | None:
    mounts = _mounts()
    for one in mounts:
        if one.loop is not None and loop.backing_file(one.loop) == image:
            top = [other for other in mounts if other.place == one.place][-1]
            if top != one:
                raise Refused(f"something else was mounted over {os.fsdecode(one.place)}; unmount "
                              "that first")
            return os.fsdecode(one.place)
    return None


def unmount_export(image: Path) -> None:
    """Take down what a daemon that was killed left of its FUSE export; none is fine."""
    wanted = os.fsencode(image)
    while any(one.place == wanted and one.kind.startswith(b"fuse") for one in _mounts()):
        _run(["umount", "--lazy", str(image)])


def _probe(image: Path, offset: int = 0, size: int = 0) -> dict[str, str]:
    where = ["--offset", str(offset), "--size", str(size)] if size else []
    done = _run(["blkid", "--probe", "--output", "export", *where, str(image)], check=False)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", check=False, env={
                                  **os.environ, "LC_ALL": "C",
                                  "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"})
    except FileNotFoundError:
        raise Refused(f"{command[0]} is not installed (Debian: util-linux, fdisk)") from None
    if check and done.returncode:
        raise Failed(f"{command[0]} failed: {done.stderr.strip()}")
    return done
