"""Commands of ours as processes of their own: on the host as a user starts them, in a laboratory
forked from a process that has imported everything already.

To start Python and import takes 8 s in dom0 of the Xen laboratory, and two in User-Mode Linux,
where some tests need hundreds of commands. The standard library's fork server does that once.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

LIMIT = 300  # seconds for one command


def _command(arguments: list[str], environment: Mapping[str, str], output: list[str]) -> None:
    """In the new process: what ``python -m epochs`` does, its output going to two files."""
    for number, file in enumerate(output, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from epochs.__main__ import main

    sys.argv = ["epochs", *arguments]
    main()


class Command:
    """A command at work, to be closed."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str],
                 place: Path) -> None:
        self._arguments = arguments
        self._output = [place / "stdout", place / "stderr"]
        for file in self._output:
            file.touch()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_command,
            args=(list(arguments), dict(environment), [str(file) for file in self._output]))
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end. subprocess.TimeoutExpired if that takes too long."""
        self._process.join(LIMIT)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self._arguments, LIMIT)
        return subprocess.CompletedProcess(self._arguments, status,
                                           *(file.read_text() for file in self._output))

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()


@contextmanager
def forked(store: Path, *arguments: str, **more: str) -> Iterator[Command]:
    """A command begun in a laboratory; ``more`` goes to its environment. At the end of the context
    it is killed if it has not ended."""
    with tempfile.TemporaryDirectory() as place:
        command = Command(arguments, environment(store, **more), Path(place))
        try:
            yield command
        finally:
            command.close()


def environment(store: Path, **more: str) -> dict[str, str]:
    """Of a command, without a fault that was to hit another one."""
    rest = {name: value for name, value in os.environ.items() if name != "EPOCHS_FAULT"}
    return {**rest, "EPOCHS_STORE": str(store), **more}


def run_cli(store: Path, *arguments: str, fault: str | None = None,
            check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``epochs`` with these arguments, optionally with a fault injected; ``more`` goes to its
    environment. subprocess.CalledProcessError if it fails, unless ``check`` is false."""
    if fault:
        more["EPOCHS_FAULT"] = fault
    if "EPOCHS_IN_LAB" in os.environ:
        with forked(store, *arguments, **more) as command:
            done = command.ended()
    else:
        done = subprocess.run([sys.executable, "-m", "epochs", *arguments],
                              env=environment(store, **more), capture_output=True, text=True,
                              check=False, timeout=LIMIT)
    if check:
        done.check_returncode()
    return done


def cli_json(store: Path, *arguments: str) -> object:
    """Run a command with --json and return its document."""
    return json.loads(run_cli(store, "--json", *arguments).stdout)


def _everything() -> list[str]:
    """Names of all modules that a command may import; the tracker's is none, but a library for
    QEMU."""
    found = []
    for name in ("epochs", "memsave", "blockcow"):
        package = importlib.import_module(name)
        found += [module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")
                  if not module.name.endswith((".__main__", ".pytest_plugin", "._tracker_preload"))]
    return found


if "EPOCHS_IN_LAB" in os.environ:
    multiprocessing.set_forkserver_preload([__name__, *_everything()])
