"""What every command shares: the store of this invocation, and printing for people or machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from epochs.api import Store
    from epochs.hypervisor import Progress


def notice(text: str) -> None:
    """A remark on standard error."""
    print(f"epochs: {text}", file=sys.stderr, flush=True)


@contextmanager
def opened(ctx: click.Context) -> Iterator[Store]:
    """The store that the command line names."""
    from epochs.api import Store

    with Store(ctx.obj["store"], notice=notice) as store:
        yield store


def emit(ctx: click.Context, document: Any, text: str) -> None:
    """Print ``document`` with --json, else ``text``."""
    if ctx.obj["json"]:
        print(json.dumps(document, indent=2, sort_keys=True))
    elif text:
        print(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the last one is not padded."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                               ).rstrip() for line in lines)


def size(number: float) -> str:
    """Bytes for people: "3.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def printable(text: str) -> str:
    """A name from inside a guest: what is not printable is shown as an escape."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def age(then: float) -> str:
    """How long ago: "5 min ago"."""
    seconds = max(0.0, time.time() - then)
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def when(then: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


@contextmanager
def progress(ctx: click.Context) -> Iterator[Progress]:
    """A progress bar on standard error if that is a terminal, else nothing."""
    if ctx.obj["json"] or not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _names(ctx: click.Context, kinds: str) -> list[str]:
    """Names for completion; an unusable store completes to nothing."""
    from epochs.errors import EpochsError
    from epochs.store import StoreFiles, default_path

    path = Path(ctx.find_root().params.get("store") or default_path())
    if not (path / "catalog.sqlite").is_file():
        return []  # pressing Tab makes no store
    try:
        files = StoreFiles(path)
    except EpochsError:
        return []
    try:
        machines = files.catalog.machines()
        names = [machine.name for machine in machines]
        if kinds == "epochs":
            owner = {machine.id: machine.name for machine in machines}
            names += [f"{owner[m]}@{tag}" for tag, m, _ in files.catalog.tags() if m in owner]
            names += [epoch[:12] for epoch in files.catalog.parents()]
        return names
    finally:
        files.close()


def complete_machine(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of machine names."""
    return [name for name in _names(ctx, "machines") if name.startswith(incomplete)]


def complete_epoch(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of epochs."""
    return [name for name in _names(ctx, "epochs") if name.startswith(incomplete)]
