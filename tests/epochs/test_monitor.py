"""The monitor, where a real QEMU cannot be made to behave so at will: a server in its place."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from epochs.errors import HypervisorDied
from epochs.qemu.monitor import GREETINGS, Monitor

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
GREETING: dict[str, object] = {"QMP": {"version": VERSION, "capabilities": []}}
EVENT: dict[str, object] = {"event": "VSERPORT_CHANGE", "data": {"id": "agent", "open": True},
                            "timestamp": {"seconds": 0, "microseconds": 0}}


def serve(listener: socket.socket, overtaken: int) -> int:
    """Take connections until one gets beyond the greeting: an event comes before the answer in the
    first ones. How many there were."""
    def say(message: dict[str, object]) -> None:
        sock.sendall(json.dumps(message).encode() + b"\n")

    def answer(value: dict[str, object], *before: dict[str, object]) -> None:
        asked = json.loads(sock.recv(1 << 16))  # which has no end of line, and comes as one
        for message in before:
            say(message)
        say({"return": value, **({"id": asked["id"]} if "id" in asked else {})})

    for number in range(overtaken + 1):
        sock, _ = listener.accept()
        with sock:
            say(GREETING)
            if number < overtaken:
                answer({}, EVENT)
            else:
                answer({})
                answer({"status": "running", "running": True})
            assert sock.recv(1) == b"", "the client hangs up"
    return overtaken + 1


@contextmanager
def server(path: Path, overtaken: int) -> Iterator[Future[int]]:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)
        yield pool.submit(serve, listener, overtaken)


@pytest.mark.parametrize("overtaken", [0, 1, GREETINGS - 1])
def test_an_event_before_the_answer(tmp_path: Path, overtaken: int) -> None:
    with server(tmp_path / "qmp", overtaken) as served:
        with Monitor.open(tmp_path / "qmp") as monitor:
            assert monitor.status() == "running"
        assert served.result(60) == overtaken + 1


def test_an_event_before_every_answer(tmp_path: Path) -> None:
    with server(tmp_path / "qmp", GREETINGS) as served:
        with pytest.raises(HypervisorDied, match="Negotiation failed"):
            Monitor.open(tmp_path / "qmp")
        with Monitor.open(tmp_path / "qmp") as monitor:  # the control: the same server, once more
            assert monitor.status() == "running"
        assert served.result(60) == GREETINGS + 1


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(HypervisorDied, match="does not answer"):
        Monitor.open(tmp_path / "qmp")
