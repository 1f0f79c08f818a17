"""Starting a QEMU and finding it again.

A QEMU outlives the command that started it: it runs in a session of its own, its working directory
is its instance's directory (which is how `recover` finds one that was never recorded), and its
sockets are made here and inherited, so that connecting needs no polling.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from epochs.errors import Failed, HypervisorDied
from epochs.processes import ProcessId
from epochs.qemu import yama
from epochs.qemu.command import Sockets
from epochs.qemu.monitor import Monitor

QMP_SOCKET = "qmp.sock"
CONSOLE_SOCKET = "console.sock"
AGENT_SOCKET = "agent.sock"
LOG = "qemu.log"
WORDS = 600  # characters of QEMU's log quoted in an error

_children: list[subprocess.Popen[bytes]] = []  # reaped when the next one is started


@dataclass
class Spawned:
    """A QEMU that was just started. ``monitor`` is connected."""

    process: ProcessId
    monitor: Monitor


def listening_socket(directory: Path, name: str) -> socket.socket:
    """A UNIX socket that listens in ``directory``, whatever the length of its path."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.bind(f"/proc/self/fd/{fd}/{name}")
        (directory / name).chmod(0o600)
        sock.listen(4)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock


def spawn(binary: str, directory: Path, arguments: Callable[[Sockets], list[str]],
          environment: Mapping[str, str], pass_fds: tuple[int, ...] = ()) -> Spawned:
    """Start QEMU in ``directory`` and connect to its monitor.

    Raises HypervisorDied with QEMU's own words if it ends before it answers.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    sockets: list[socket.socket] = []
    try:
        for name in (QMP_SOCKET, CONSOLE_SOCKET, AGENT_SOCKET):
            sockets.append(listening_socket(directory, name))
        numbers = Sockets(*(sock.fileno() for sock in sockets))
        with (directory / LOG).open("ab") as log:
            (directory / LOG).chmod(0o600)
            child = subprocess.Popen(
                [binary, *arguments(numbers)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory,
                env={**os.environ, **environment}, start_new_session=True,
                pass_fds=(*(sock.fileno() for sock in sockets), *pass_fds),
                preexec_fn=yama.permission_to_grant())  # noqa: PLW1509 - None unless Yama asks
    except OSError as error:
        raise Failed(f"QEMU cannot be started: {error}") from error
    finally:
        for sock in sockets:
            sock.close()
    _children.append(child)
    try:
        process = ProcessId.of(child.pid)
        monitor = Monitor.open(directory / QMP_SOCKET)
    except (HypervisorDied, ProcessLookupError) as error:
        _end(child)
        raise HypervisorDied(
            f"QEMU ended at start: {last_words(directory) or error}") from error
    except BaseException:
        _end(child)
        raise
    return Spawned(process, monitor)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGKILL)
    child.wait()


def last_words(directory: Path) -> str:
    """The end of QEMU's log in one line; empty if there is none."""
    try:
        text = (directory / LOG).read_text(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines)[-WORDS:]
