"""Files of Xen's `xl save`: import-xen, export-xen."""

from __future__ import annotations

from pathlib import Path

import click

from epochs.cli import output
from epochs.cli.output import complete_epoch, emit, opened


@click.command("import-xen")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What the machine is called (default: as the domain was).")
@click.option("-m", "--message", default="", help="What the epoch is for.")
@click.option("--disk", "disks", multiple=True, metavar="NAME=EPOCH:DISK",
              help="The frozen layer that a disk of the domain had then (repeatable).")
@click.pass_context
def import_xen_command(ctx: click.Context, file: Path, name: str | None, message: str,
                       disks: tuple[str, ...]) -> None:
    """Make an epoch of a FILE that `xl save` wrote. Without --disk it has no disks."""
    from epochs.errors import UsageError

    given: dict[str, tuple[str, str]] = {}
    for text in disks:
        disk, equals, where = text.partition("=")
        epoch, colon, layer = where.partition(":")
        if not (disk and equals and epoch and colon and layer):
            raise UsageError(f"'{text}' is not a disk; write it like xvda=EPOCH:DISK")
        given[disk] = (epoch, layer)
    with opened(ctx) as store, output.progress(ctx) as progress:
        made = store.import_xen(file, name=name, message=message, disks=given, progress=progress)
        emit(ctx, made.to_json(), f"epoch {made.id[:12]} of domain '{made.record.machine_name}', "
             f"{made.stats['pages_resident']} pages")


@click.command("export-xen")
@click.argument("epoch", shell_complete=complete_epoch)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.pass_context
def export_xen_command(ctx: click.Context, epoch: str, file: Path, force: bool) -> None:
    """Write an epoch of a Xen domain as a FILE that `xl restore` takes. Disks are not in it."""
    with opened(ctx) as store:
        found = store.epoch(epoch)
        size = store.export_xen(found, file, force=force)
        emit(ctx, {"epoch": found.id, "file": str(file), "bytes": size},
             f"epoch {found.id[:12]} is in {output.printable(str(file))} "
             f"({output.size(size)}); 'xl restore CONFIG FILE' takes it, with disks of that "
             "very epoch")
