"""A frozen layer as a raw file that may be written to: what is written goes into an overlay that is
thrown away. ``qemu-storage-daemon`` exports it through FUSE."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from pathlib import Path

from .interface import BlockError, JsonDict
from .tools import run

SECONDS = 60
OVERLAY, RAW, LOG = "overlay.qcow2", "disk", "log"


def refusal() -> str | None:
    """None if this kernel has FUSE and we may use it, else why not."""
    if "\tfuse\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no FUSE, or it is not loaded: 'modprobe fuse' loads it"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened: run as root"
    return None


def serve(directory: Path, tree: JsonDict, size: int) -> Path:
    """Start a daemon that works in ``directory``, which is empty; returns the raw file in it, which
    is there then. The daemon goes on until it is ended. Raises BlockError with its words."""
    overlay, raw = directory / OVERLAY, directory / RAW
    raw.touch(mode=0o600)
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(size)])
    top = {"driver": "qcow2", "node-name": "top", "backing": tree,
           "file": {"driver": "file", "filename": str(overlay)}}
    # Nobody else can connect to a pair.
    greeted, given = socket.socketpair()
    with greeted, given:
        command = ["qemu-storage-daemon", "--blockdev", json.dumps(top),
                   "--export", f"type=fuse,id=e,node-name=top,mountpoint={raw},writable=on",
                   "--chardev", f"socket,id=c,fd={given.fileno()}",
                   "--monitor", "chardev=c"]
        log = directory / LOG
        with log.open("wb") as words:
            try:
                daemon = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL,
                                          stdout=words, stderr=words, start_new_session=True,
                                          pass_fds=[given.fileno()])
            except FileNotFoundError:
                raise BlockError("qemu-storage-daemon is not installed: install it (Debian: "
                                 "qemu-system-common)") from None
        given.close()
        # Its monitor greets once everything before is done.
        ended = os.pidfd_open(daemon.pid)
        try:
            ready, _, _ = select.select([greeted.fileno(), ended], [], [], SECONDS)
        finally:
            os.close(ended)
        if greeted.fileno() not in ready or not greeted.recv(1):
            daemon.kill()
            daemon.wait()
            said = log.read_text(errors="replace").strip().splitlines()
            raise BlockError(f"the layer cannot be shown: {said[-1] if said else 'no answer'}")
    return raw
