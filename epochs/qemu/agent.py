"""The QEMU guest agent: newline-delimited JSON over a virtio-serial port.

A restored guest may hold half a message of a connection that no longer exists, so every session
begins with guest-sync-delimited (a 0xFF byte before the answer), as qemu-ga's reference says.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from epochs.errors import EpochsError, Failed
from epochs.qemu.monitor import connect_unix

DELIMITER = b"\xff"
MAX_ANSWER = 64 * 2**20  # bytes; guest-exec returns at most 16 MiB of output, in base64
FIRST_POLL, LAST_POLL = 0.005, 0.25  # seconds; guest-exec-status has no event to wait for


class AgentSilent(EpochsError):
    """The guest agent does not answer: not installed, not started yet, or the guest is stuck."""

    exit_code = 5


class CommandLate(Failed):
    """A command in the guest has not ended in time; it goes on there."""


@dataclass(frozen=True)
class Completed:
    """A command that ran in the guest; ``status`` is its exit status, or 128 + signal."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool


class Agent:
    """One session with the agent. ``limit`` is in seconds, for each answer."""

    def __init__(self, path: Path, limit: float) -> None:
        self._limit = limit
        self._sock = connect_unix(path)
        self._buffer = b""
        try:
            self._sync()
        except BaseException:
            self._sock.close()
            raise

    def _sync(self) -> None:
        number = secrets.randbelow(2**31)
        message = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._sock.sendall(DELIMITER + json.dumps(message).encode() + b"\n")
        deadline = time.monotonic() + self._limit
        while True:
            line = self._line(deadline)
            try:
                answer = json.loads(line.rsplit(DELIMITER, 1)[-1])
            except ValueError:
                continue  # the tail of an answer to somebody before us
            if answer.get("return") == number:
                return

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentSilent("the guest agent does not answer; is qemu-guest-agent installed "
                                  "and running in the guest?")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise AgentSilent("the guest agent's connection was closed")
            self._buffer += data
            if len(self._buffer) > MAX_ANSWER:
                raise Failed("the guest agent's answer is longer than 64 MiB")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one agent command; Failed with the agent's words if it refuses."""
        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self._sock.sendall(json.dumps(message).encode() + b"\n")
        answer = json.loads(self._line(time.monotonic() + self._limit))
        if "error" in answer:
            raise Failed(f"the guest agent refused {command}: {answer['error'].get('desc')}")
        return answer.get("return")

    def shutdown(self) -> None:
        """Ask the guest to power off; there is no answer to wait for."""
        message = {"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}}
        self._sock.sendall(json.dumps(message).encode() + b"\n")

    def run(self, argv: list[str], *, stdin: bytes | None = None,
            timeout: float | None = None,
            environment: dict[str, str] | None = None) -> Completed:
        """Run a command in the guest and wait for it (``timeout`` in seconds; CommandLate after
        it). ``environment`` is all that it gets of one; None: the agent's."""
        arguments: dict[str, object] = {"path": argv[0], "arg": argv[1:], "capture_output": True}
        if environment is not None:
            arguments["env"] = [f"{name}={value}" for name, value in environment.items()]
        if stdin is not None:
            arguments["input_data"] = base64.b64encode(stdin).decode()
        pid = self.execute("guest-exec", **arguments)["pid"]
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = FIRST_POLL
        while True:
            state = self.execute("guest-exec-status", pid=pid)
            if state["exited"]:
                break
            if deadline is not None and time.monotonic() > deadline:
                raise CommandLate(f"'{argv[0]}' has not ended in the guest after {timeout:.0f} s "
                                  "(it goes on there)")
            time.sleep(pause)
            pause = min(pause * 1.5, LAST_POLL)
        status = state.get("exitcode", 128 + state.get("signal", 0))
        return Completed(status, base64.b64decode(state.get("out-data", "")),
                         base64.b64decode(state.get("err-data", "")),
                         bool(state.get("out-truncated") or state.get("err-truncated")))

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
