"""Looking at an epoch's files: mount, umount."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from epochs.cli import output
from epochs.cli.output import complete_epoch, emit, opened

if TYPE_CHECKING:
    from epochs.catalog import MountRecord


@click.command("mount")
@click.argument("epoch", metavar="EPOCH[:DISK]", required=False, shell_complete=complete_epoch)
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--partition", metavar="N", type=int, help="Which, where a disk has several.")
@click.pass_context
def mount_command(ctx: click.Context, epoch: str | None, directory: Path | None,
                  partition: int | None) -> None:
    """Mount a disk of an epoch, read-only, on an empty directory; without arguments, list mounts.

    The machine goes on meanwhile, and the epoch's bytes stay what they are: a journal is replayed
    into an overlay that is thrown away.
    """
    if epoch is not None and directory is None:
        raise click.UsageError("give the directory to mount on, too")
    with opened(ctx) as store:
        if epoch is None or directory is None:
            mounts = store.mounts()
            rows = [(output.printable(one.directory), one.epoch[:12], one.disk) for one in mounts]
            emit(ctx, {"mounts": [_json(one) for one in mounts]},
                 output.table(("ON", "EPOCH", "DISK"), rows) if rows else "nothing is mounted")
            return
        name, _, disk = epoch.partition(":")
        made = store.mount(name, directory, disk=disk or None, partition=partition)
        place = output.printable(made.directory)
        emit(ctx, _json(made), f"disk '{made.disk}' of epoch {made.epoch[:12]} is on {place}; "
             f"'epochs umount {place}' takes it down")


@click.command("umount")
@click.argument("directory", type=click.Path(path_type=Path))
@click.pass_context
def umount_command(ctx: click.Context, directory: Path) -> None:
    """Take a mounted epoch down."""
    with opened(ctx) as store:
        gone = store.umount(directory)
        emit(ctx, _json(gone), f"{output.printable(gone.directory)} is free again")


def _json(one: MountRecord) -> dict[str, str]:
    return {"directory": one.directory, "epoch": one.epoch, "disk": one.disk}
