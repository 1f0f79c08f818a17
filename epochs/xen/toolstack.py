"""Xen's own toolstack, `xl`: making, restoring, renaming and destroying domains.

Every call runs in the directory of an instance of ours, which is how whatever a killed command left
running is found (:func:`epochs.processes.working_in`). `-e` lets no daemon of xl's wait for a
domain: one that has shut itself down stays, and says why, until it is destroyed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from epochs import points
from epochs.errors import Failed, Refused
from epochs.xen.config import DomainConfig
from memsave.errors import MemsaveError, XenMissing

LOG = "xl.log"
XL_CONF = Path("/etc/xen/xl.conf")
PIPE = 1 << 20  # bytes on their way to xl
WORDS = 600  # characters of its log quoted in an error


def _run(*arguments: str, directory: Path | None = None, limit: float | None = None) -> str:
    """Its output; Failed with its own words."""
    try:
        done = subprocess.run(["xl", *arguments], capture_output=True, text=True, check=False,
                              stdin=subprocess.DEVNULL, cwd=directory, timeout=limit)
    except FileNotFoundError:
        raise XenMissing("xl is not there: install xen-utils") from None
    if done.returncode:
        raise Failed(f"xl {arguments[0]} failed: {_last(done.stderr or done.stdout)}")
    return done.stdout


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines)[-WORDS:] or "it says nothing"


def understood(text: str) -> DomainConfig:
    """What xl makes of a configuration. Refused if it does not take it."""
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(text)
        file.flush()
        try:
            found = _run("create", "--dryrun", "--quiet", file.name)
        except Failed as error:
            raise Refused(f"xl does not take this configuration: {error}") from error
    return DomainConfig.parse(found[max(found.find("{"), 0):])


def configuration(text: str) -> DomainConfig:
    """What a machine's specification holds: libxl's JSON, or text for `xl create`."""
    return DomainConfig.parse(text) if text.startswith("{") else understood(text)


def running() -> dict[int, DomainConfig]:
    """The domains that a toolstack knows the configuration of, but for dom0, by number."""
    return {int(one["domid"]): DomainConfig.parse(json.dumps(one["config"]))
            for one in json.loads(_run("list", "--long")) if one["domid"]}


def config_of(domid: int) -> DomainConfig:
    """A running domain's configuration as it is now."""
    listed = json.loads(_run("list", "--long", str(domid)))
    one = listed[0] if isinstance(listed, list) else listed
    return DomainConfig.parse(json.dumps(one["config"]))


def create(directory: Path, text: str) -> None:
    """Build a domain out of `xl`'s text and leave it paused."""
    file = directory / "domain.cfg"
    file.write_text(text)
    _run("create", "--quiet", "-e", "-p", str(file), directory=directory)


def boot(directory: Path, config: DomainConfig) -> None:
    """Build a domain out of libxl's JSON and leave it paused."""
    done = subprocess.run([sys.executable, "-m", "epochs.xen.boot"], input=config.to_json(),
                          cwd=directory, capture_output=True, check=False)
    if done.returncode:
        raise Failed("libxl did not build the domain: "
                     + _last(done.stderr.decode(errors="replace")))


def restore(directory: Path, write: Callable[[int], None]) -> None:
    """A domain out of the file of `xl save` that ``write`` writes into a descriptor; it is left
    paused. Failed with xl's words; what ``write`` raises, if xl did not end first."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE)
    with (directory / LOG).open("ab") as log:
        child = subprocess.Popen(["xl", "restore", "-e", "-p", f"/dev/fd/{source}"],
                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory,
                                 pass_fds=(source,))
    os.close(source)
    failure: Exception | None = None
    try:
        points.hit("launch.spawned")
        write(sink)
        points.hit("launch.patched")
    except (OSError, MemsaveError) as error:
        failure = error  # perhaps only that xl reads no further
    finally:
        os.close(sink)
        status = child.wait()
    if status:
        raise Failed("xl restore failed: "
                     + _last((directory / LOG).read_text(errors="replace"))) from failure
    if failure is not None:
        raise failure


def makes_room() -> bool:
    """Whether xl takes memory from dom0 for a new domain that finds none free: xl.conf's
    ``autoballoon``, by default where dom0 was not given a size of its own."""
    wish = "auto"
    with contextlib.suppress(FileNotFoundError):
        for line in XL_CONF.read_text().splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "autoballoon":
                wish = value.strip().strip('"')
    if wish != "auto":
        return wish not in ("0", "off")
    return "dom0_mem=" not in _run("info", "xen_commandline")


def rename(domid: int, name: str, directory: Path) -> None:
    """Give a domain another name; Failed if another one has it."""
    _run("rename", str(domid), name, directory=directory)


def destroy(domid: int, directory: Path) -> None:
    """End a domain at once, with its devices and what xenstore has of it."""
    _run("destroy", str(domid), directory=directory if directory.exists() else None)


def shut_down(domid: int, limit: float) -> bool:
    """Ask a guest to power itself off and wait for it; False after ``limit`` seconds."""
    try:
        _run("shutdown", "-F", "-w", str(domid), limit=limit)
    except subprocess.TimeoutExpired:
        return False
    return True
