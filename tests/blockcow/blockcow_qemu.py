"""A real QEMU without a guest, and the LiveBlocks that talks QMP to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockcow import BlockError

MIB = 1 << 20


class QmpRefused(Exception):
    pass


class Live:
    """LiveBlocks over a QMP socket, and the qemu-io of the same process for reads and writes."""

    def __init__(self, blockdevs: Sequence[dict[str, Any]], extra: Sequence[str] = ()) -> None:
        self.folder = tempfile.mkdtemp(prefix="bc-")
        address = f"{self.folder}/qmp"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(1)
            command = [
                "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "16M", "-S",
                "-nodefaults", "-no-user-config", "-display", "none",
                "-chardev", f"socket,id=q,fd={listening.fileno()},server=on,wait=off",
                "-mon", "chardev=q,mode=control",
            ]  # fmt: skip
            for options in blockdevs:
                command += ["-blockdev", json.dumps(options)]
            # qemu-io prints to standard output; by the line, so that it is there when QMP answers
            self.output = os.open(f"{self.folder}/stdout", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            self.process = subprocess.Popen(
                ["stdbuf", "-oL", *command, *extra],
                pass_fds=[listening.fileno()],
                stdout=self.output,
                stderr=subprocess.PIPE,
            )
            self.said = 0
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(60)
            self.socket.connect(address)
        self.stream = self.socket.makefile("rwb")
        self.executed: list[str] = []
        try:
            if not self.stream.readline():
                raise QmpRefused("no greeting")
        except (OSError, QmpRefused):
            self.process.kill()
            assert self.process.stderr
            words = self.process.stderr.read().decode()
            self.close()
            raise QmpRefused(words) from None
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        self.executed.append(command)
        number = f"{os.getpid()}-{len(self.executed)}"
        request = {"execute": command, "arguments": arguments, "id": number}
        self.stream.write(json.dumps(request).encode() + b"\n")
        self.stream.flush()
        while True:
            line = self.stream.readline()
            if not line:
                raise QmpRefused("QEMU is gone")
            answer = json.loads(line)
            if answer.get("id") != number:
                continue  # an event, or the answer to a process that was killed
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpRefused(answer["error"]["desc"])

    def run_job(self, command: str, job_id: str, **arguments: object) -> None:
        raise NotImplementedError

    def io(self, node: str, line: str) -> str:
        """One qemu-io command on a node; raises if it failed."""
        said = self.execute("human-monitor-command", **{"command-line": f'qemu-io {node} "{line}"'})
        new = os.pread(self.output, 1 << 20, self.said)
        self.said += len(new)
        said += new.decode()
        if "failed" in said or (said.strip() and "ops" not in said):
            raise QmpRefused(said)
        return str(said)

    def write(self, node: str, offset: int, length: int, pattern: int) -> None:
        kind = "-z" if pattern == 0 else f"-P {pattern}"
        self.io(node, f"write {kind} {offset} {length}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as ``quit`` does: what the guest wrote reaches the files."""
        if self.stream.closed:
            return
        self.process.terminate()
        self.process.wait(30)
        os.close(self.output)
        self.stream.close()
        self.socket.close()
        assert self.process.stderr
        self.process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def open_files(self) -> dict[str, set[int]]:
        """Per path the access modes (O_RDONLY, O_RDWR) that the process has it open with."""
        found: dict[str, set[int]] = {}
        base = Path(f"/proc/{self.process.pid}")
        for fd in (base / "fd").iterdir():
            info = (base / "fdinfo" / fd.name).read_text()
            flags = int(info.split("flags:")[1].split()[0], 8)
            found.setdefault(str(fd.readlink()), set()).add(flags & os.O_ACCMODE)
        return found

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_bytes(path: Path, form: str = "qcow2") -> bytes:
    """Everything a disk holds, read by qemu-img through the headers."""
    target = path.with_name(path.name + ".read")
    done = subprocess.run(
        ["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BlockError(done.stderr)
    content = target.read_bytes()
    target.unlink()
    return content


def tool(*arguments: str | Path) -> str:
    return subprocess.run(
        [str(a) for a in arguments], check=True, capture_output=True, text=True
    ).stdout


def assert_same(found: bytes, expected: bytes, what: str = "image") -> None:
    """Compare whole images. Not a bare ``==`` in an assert: where $CI is set pytest explains that
    by a line-by-line difference of megabytes, which takes longer than any test may."""
    if found != expected:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False))
                   if pair[0] != pair[1]), min(len(found), len(expected)))
        raise AssertionError(
            f"{what}: {len(found)} and {len(expected)} bytes, first unlike at {at}")
