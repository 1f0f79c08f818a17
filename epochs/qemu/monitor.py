"""A synchronous QMP connection to one QEMU, over qemu.qmp.

The private event loop runs only inside calls. ``stop`` and ``cont`` report how long they took,
because they bound the pause.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import qemu.qmp
from qemu.qmp import EventListener, QMPClient
from qemu.qmp.qmp_client import NegotiationError

from epochs.errors import Failed, HypervisorDied

ANSWER_LIMIT = 60.0  # seconds; a monitor that is silent for longer is stuck
GREETINGS = 5  # connections tried while an event comes between greeting and agreement


def connect_unix(path: Path) -> socket.socket:
    """Connect to a UNIX socket however long its path is (sun_path holds 108 bytes)."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock


class MonitorError(Failed):
    """QEMU answered a command with an error; ``text`` is its own description."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"QEMU refused {command}: {text}")
        self.command = command
        self.text = text


def _overtaken(error: HypervisorDied) -> bool:
    """Whether it was a message other than the answer that ended the agreement on capabilities:
    QEMU sends events as soon as it agrees, which may be before it says so, and qemu.qmp takes
    the first message for the answer."""
    cause = error.__cause__
    negotiation = cause.exc if isinstance(cause, qemu.qmp.ConnectError) else None
    return (isinstance(negotiation, NegotiationError)
            and isinstance(negotiation.__cause__, AssertionError))


class Monitor:
    """One QMP session. Context manager; closing it leaves QEMU alone."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("epochs")
        try:
            self._run(self._client.connect(sock))
        except BaseException:
            sock.close()
            self._loop.close()
            raise

    @classmethod
    def open(cls, path: Path) -> Monitor:
        """Connect to a QMP socket; HypervisorDied if nobody listens there."""
        tried = 0
        while True:
            tried += 1
            try:
                return cls(connect_unix(path))
            except OSError as error:
                raise HypervisorDied(f"QEMU does not answer at {path}: {error}") from error
            except HypervisorDied as error:
                if tried == GREETINGS or not _overtaken(error):
                    raise

    def _run(self, coroutine: Any) -> Any:
        return self._guarded(asyncio.wait_for(coroutine, ANSWER_LIMIT))

    def _guarded(self, bounded: Any) -> Any:
        """Run a coroutine; qemu.qmp's ways of saying "gone" become HypervisorDied."""
        try:
            return self._loop.run_until_complete(bounded)
        except (qemu.qmp.ConnectError, qemu.qmp.ExecInterruptedError, qemu.qmp.StateError,
                EOFError) as error:
            raise HypervisorDied(f"QEMU's monitor hung up: {error}") from error
        except TimeoutError as error:
            raise Failed(f"QEMU's monitor did not answer within {ANSWER_LIMIT:.0f} s") from error

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one QMP command ('_' in argument names stands for '-'); raises MonitorError."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.call(command, named)

    def call(self, command: str, arguments: dict[str, object]) -> Any:
        """The same with argument names as they are."""
        try:
            return self._run(self._client.execute(command, arguments or None))
        except qemu.qmp.ExecuteError as error:
            raise MonitorError(command, str(error)) from error

    def human(self, line: str) -> str:
        """Run a command of the human monitor and return what it printed."""
        return str(self.call("human-monitor-command", {"command-line": line}))

    def humans(self, lines: Sequence[str]) -> list[str]:
        """The same for several at once, sent without waiting for each other's answers."""
        async def ask() -> list[Any]:
            return await asyncio.gather(*(self._client.execute(
                "human-monitor-command", {"command-line": line}) for line in lines))

        try:
            return [str(answer) for answer in self._run(ask())]
        except qemu.qmp.ExecuteError as error:
            raise MonitorError("human-monitor-command", str(error)) from error

    def run_job(self, command: str, job_id: str, **arguments: object) -> None:
        """Start a job, wait for its end by events, dismiss it; raises Failed with its error."""
        events = self.listen("JOB_STATUS_CHANGE")
        try:
            self.execute(command, job_id=job_id, **arguments)
            while self.wait_event(events)["data"] != {"id": job_id, "status": "concluded"}:
                pass
        finally:
            self.forget(events)
        job = next(j for j in self.execute("query-jobs") if j["id"] == job_id)
        self.execute("job-dismiss", id=job_id)
        if "error" in job:
            raise Failed(f"QEMU's job {job_id} failed: {job['error']}")

    def wait_event(self, listener: EventListener, limit: float = ANSWER_LIMIT) -> dict[str, Any]:
        """The next event of a registered listener; TimeoutError after ``limit`` seconds.

        Raises HypervisorDied if the monitor hangs up meanwhile."""
        async def event() -> Any:
            got = asyncio.ensure_future(listener.get())
            gone = asyncio.ensure_future(self._disconnected())
            try:
                await asyncio.wait({got, gone}, timeout=limit,
                                   return_when=asyncio.FIRST_COMPLETED)
                return got.result() if got.done() else None if gone.done() else TimeoutError()
            finally:
                got.cancel()
                gone.cancel()

        outcome = self._guarded(event())
        if outcome is None:
            raise HypervisorDied("QEMU's monitor hung up")
        if isinstance(outcome, TimeoutError):
            raise outcome
        return dict(outcome)

    async def _disconnected(self) -> None:
        """Returns when the session is over (EOF moves it out of RUNNING)."""
        while self._client.runstate is qemu.qmp.Runstate.RUNNING:
            await self._client.runstate_changed()

    def listen(self, *names: str) -> EventListener:
        """A listener that collects events from now on; pass it to :meth:`forget` when done."""
        listener = EventListener(set(names))
        self._client.register_listener(listener)
        return listener

    def forget(self, listener: EventListener) -> None:
        self._client.remove_listener(listener)

    def status(self) -> str:
        """QEMU's run state: running, paused, inmigrate, shutdown, …"""
        return str(self.execute("query-status")["status"])

    def close(self) -> None:
        """End the session; QEMU goes on."""
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 5))
        except (qemu.qmp.QMPError, EOFError, OSError, TimeoutError):
            pass  # the peer is gone: that is what was wanted
        finally:
            self._loop.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def to_json(value: object) -> str:
    """Compact JSON, as QEMU's command line takes it."""
    return json.dumps(value, separators=(",", ":"))
