"""History: log, show, diff, tag."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from epochs.cli import output
from epochs.cli.output import complete_epoch, complete_machine, emit, opened

if TYPE_CHECKING:
    from epochs.api import Epoch, Store


@click.command("log")
@click.argument("name", required=False, shell_complete=complete_machine)
@click.option("--graph", is_flag=True, help="Draw lines of descent.")
@click.pass_context
def log_command(ctx: click.Context, name: str | None, graph: bool) -> None:
    """Show epochs, newest first; with NAME only those of one machine."""
    with opened(ctx) as store:
        store.settle()
        epochs = store.epochs(name)
        names = _names(store)
        lines = _graph(names, epochs) if graph else [
            _line(names, epoch) for epoch in reversed(epochs)]
        emit(ctx, {"epochs": [epoch.to_json() for epoch in reversed(epochs)]},
             "\n".join(lines) or "no epochs yet; 'epochs create MACHINE' makes one")


def _names(store: Store) -> dict[str, list[str]]:
    """Epoch id to what points at it: machines (with a star), then tags."""
    found: dict[str, list[str]] = {}
    for machine in store.machines():
        if machine.record.head is not None:
            found.setdefault(machine.record.head, []).append(f"{machine.name}*")
    for tag, _, epoch in store.files.catalog.tags():
        found.setdefault(epoch, []).append(tag)
    return found


def _line(names: dict[str, list[str]], epoch: Epoch) -> str:
    own = names.get(epoch.id)
    return " ".join(part for part in (
        epoch.id[:12], f"({', '.join(own)})" if own else "", epoch.record.machine_name,
        output.age(epoch.created), epoch.message,
        "DAMAGED" if epoch.record.damaged else "") if part)


def _graph(names: dict[str, list[str]], epochs: list[Epoch]) -> list[str]:
    from epochs import graph

    by_id = {epoch.id: epoch for epoch in epochs}
    parents = {epoch.id: epoch.parent if epoch.parent in by_id else None for epoch in epochs}
    return [line.drawing + (f" {_line(names, by_id[line.epoch])}" if line.epoch else "")
            for line in graph.draw(parents, list(by_id))]


@click.command("show")
@click.argument("epoch", shell_complete=complete_epoch)
@click.pass_context
def show_command(ctx: click.Context, epoch: str) -> None:
    """Show one epoch."""
    with opened(ctx) as store:
        store.settle()
        found = store.epoch(epoch)
        document = found.to_json()
        document["depth"] = store.depth(found)
    stats = document["stats"]
    compatibility = document["compatibility"]
    rows = [
        ("machine", document["machine"]),
        ("created", output.when(document["created"])),
        ("parent", document["parent"] or "none"), ("depth", str(document["depth"])),
        ("tags", ", ".join(document["tags"]) or "none"), ("message", document["message"] or "none"),
        ("pause", f"{stats['pause_seconds'] * 1e3:.1f} ms ("
         + ", ".join(f"{k.replace('_', ' ')} {v * 1e3:.1f}"
                     for k, v in stats["pause_steps"].items()) + ")"),
        ("memory", f"{stats['pages_resident']} pages resident, {stats['pages_new']} stored here "
         f"({output.size(stats['pack_bytes'])}{', flat' if stats['flat'] else ''})"),
        ("device state", output.size(stats["state_bytes"])),
        *(("disk", f"{disk}: layer {layer[:12]}, "
           f"{output.size(stats['disk_bytes'].get(disk, 0))}")
          for disk, layer in document["disks"].items()),
        ("needs", f"Xen {compatibility['xen']}, a {compatibility['guest']} domain"
         if compatibility.get("hypervisor") == "xen" else
         f"QEMU {compatibility['qemu']}, {compatibility['machine_type']}, "
         f"{compatibility['accelerator']}, CPU {compatibility['cpu_model']}"),
        ("damage", document["damaged"] or "none known"),
    ]
    emit(ctx, document, "\n".join([f"epoch {document['id']}",
                                   *(f"  {key:<13} {value}" for key, value in rows)]))


@click.command("diff")
@click.argument("a", shell_complete=complete_epoch)
@click.argument("b", shell_complete=complete_epoch)
@click.option("--files", is_flag=True, help="Say which files differ, too (needs root).")
@click.pass_context
def diff_command(ctx: click.Context, a: str, b: str, files: bool) -> None:
    """Show what differs between two epochs: pages and disk blocks, and with --files which files
    were added (+), removed (-), changed (M), or got other owners, modes or times (a)."""
    with opened(ctx) as store:
        found = store.diff(a, b, files=files).to_json()
    lines = [f"memory: {found['memory']['pages']} pages "
             f"({output.size(found['memory']['pages'] * 4096)}) in "
             f"{len(found['memory']['runs'])} runs"]
    lines += [f"disk {disk}: {output.size(part['bytes'])} in {len(part['ranges'])} ranges"
              for disk, part in found["disks"].items()]
    marks = {"added": "+", "removed": "-", "changed": "M", "attributes": "a"}
    for disk, changes in found.get("files", {}).items():
        for one in changes:
            where = f"{disk}:{one['partition']}" if one["partition"] else disk
            lines.append(f"{marks[one['change']]} {where}:{output.printable(one['path'])}")
    emit(ctx, found, "\n".join(lines))


@click.command("tag")
@click.argument("epoch", shell_complete=complete_epoch)
@click.argument("tag")
@click.option("--force", is_flag=True, help="Move a tag that exists.")
@click.option("--delete", is_flag=True, help="Remove the tag instead.")
@click.pass_context
def tag_command(ctx: click.Context, epoch: str, tag: str, force: bool, delete: bool) -> None:
    """Tag an epoch."""
    with opened(ctx) as store:
        found = store.untag(epoch, tag) if delete else store.tag(epoch, tag, force=force)
        emit(ctx, {"epoch": found.id, "tags": found.tags},
             f"epoch {found.id[:12]}: tag '{tag}' {'removed' if delete else 'set'}")
