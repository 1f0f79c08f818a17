"""Running the QEMU tools: bounded in time, bounded in memory for files of unknown origin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .interface import BlockError, JsonDict

UNTRUSTED_SECONDS = 30
UNTRUSTED_BYTES = 2 << 30
"""Bounds for a tool that reads an image from outside. A crafted qcow2 can ask for long loops and
large tables; 2 GiB of address space is what ``qemu-img check`` takes for an 8 TiB image
(2 bytes of reference count per 64 KiB cluster, and as much again for the copy)."""


def leashed(command: Sequence[str]) -> list[str]:
    """The command with a wrapper that lets it die with this process (prctl(2), PR_SET_PDEATHSIG),
    so that a kill of ours leaves no tool behind. FileNotFoundError if there is no such command."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(command[0])
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)


def run(
    arguments: Sequence[str],
    *,
    timeout: float | None = None,
    untrusted: bool = False,
    cwd: Path | None = None,
    accept: Sequence[int] = (0,),
) -> subprocess.CompletedProcess[str]:
    """Run one tool. Raises BlockError with the tool's last words if its exit code is not one of
    ``accept``, if it is missing, or if it took longer than ``timeout`` seconds."""
    command = list(arguments)
    if untrusted:
        timeout = timeout or UNTRUSTED_SECONDS
        if prlimit := shutil.which("prlimit"):
            command = [prlimit, f"--as={UNTRUSTED_BYTES}", *command]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            leashed(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=cwd,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise BlockError(
            f"{arguments[0]} is not installed: install QEMU's tools (Debian: qemu-utils, "
            "qemu-system-common)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{arguments[0]} did not finish within {timeout:g} s") from error
    if done.returncode not in accept:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BlockError(f"{arguments[0]} {arguments[1]} failed: {words[-1]}")
    return done


def json_of(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON document a tool printed; raises BlockError if it is none."""
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise BlockError(f"{done.args[0]} printed something that is not JSON") from error


def json_name(options: JsonDict) -> str:
    """A ``json:`` pseudo file name: options for tools, without any escaping trouble."""
    return "json:" + json.dumps(options)
