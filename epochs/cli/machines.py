"""Machines: add, start, stop, pause, list, status, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from epochs.cli import output
from epochs.cli.output import complete_machine, emit, opened

machine_argument = click.argument("name", shell_complete=complete_machine)


@click.command("add", context_settings={"ignore_unknown_options": False})
@click.argument("name", required=False)
@click.option("--memory", metavar="SIZE", help="RAM, like 512M or 2G.")
@click.option("--cpus", type=int, help="Number of CPUs (default 1).")
@click.option("--disk", "disks", multiple=True, metavar="NAME=FILE[,format=F][,backend=B][,pool=P]",
              help="A disk image or block device; it is never written to.")
@click.option("--kernel", help="Boot this kernel instead of a disk's boot loader.")
@click.option("--initrd", help="Initial RAM disk for --kernel.")
@click.option("--append", help="Command line for --kernel.")
@click.option("--net", type=click.Choice(["user", "isolated", "none"]),
              help="Network: QEMU's own (user, the default), a namespace with an address of its "
                   "own (isolated), or none.")
@click.option("--publish", multiple=True, metavar="[ADDRESS:]PORT:GUESTPORT[/udp]",
              help="Let a port of this host lead to one of the guest (may be repeated).")
@click.option("--vga", is_flag=True, default=None, help="Give it a display.")
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]),
              help="How CPUs are run (default auto: KVM where it really works).")
@click.option("--qemu", metavar="PATH", help="The QEMU binary to use.")
@click.option("--xen", metavar="CONFIG|DOMAIN",
              help="A domain of Xen: its configuration file for `xl create`, or the name or number "
                   "of one that runs and goes on as a machine; --disk then says only which backend "
                   "a disk of it gets.")
@click.option("--from", "source", metavar="FILE", help="Read all of this from a TOML file.")
@click.argument("qemu_args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def add_command(ctx: click.Context, /, name: str | None, disks: tuple[str, ...],
                xen: str | None, source: str | None, qemu_args: tuple[str, ...],
                **options: Any) -> None:
    """Register a machine. Further QEMU arguments follow after "--"."""
    from epochs.errors import UsageError
    from epochs.spec import XEN, MachineSpec, from_toml, parse_disk, parse_size

    given = {key: value for key, value in options.items() if value not in (None, ())}
    if "memory" in given:
        given["memory"] = parse_size(given["memory"])
    fields: dict[str, Any] = {}
    if source is not None:
        named, fields = from_toml(Path(source))
        name = name or named
    fields.update(given)
    if disks:
        fields["disks"] = tuple(parse_disk(disk) for disk in disks)
    if qemu_args:
        fields["extra"] = qemu_args
    if not name:
        raise UsageError("the machine needs a name")
    if xen is not None and (given or source is not None or qemu_args):
        raise UsageError("--xen goes with --disk only: the configuration says the rest")
    if xen is not None and "/" not in xen and not Path(xen).exists():
        with opened(ctx) as store, output.progress(ctx) as progress:
            machine = store.take_over(name, xen, fields.get("disks", ()), progress)
            status = machine.status()
        emit(ctx, status, f"domain '{xen}' goes on as machine '{name}', from epoch "
             f"{str(status['head'])[:12]}")
        return
    if xen is not None:
        fields |= {"hypervisor": XEN, "config": _configuration(Path(xen)), "memory": 0}
    if "memory" not in fields:
        raise UsageError("the machine needs --memory")
    with opened(ctx) as store, output.progress(ctx) as progress:
        machine = store.add(name, MachineSpec(**fields), progress)
        status = machine.status()
    emit(ctx, status, f"machine '{name}' added ({status['accelerator']}, "
         f"{status['machine_type']}); start it with 'epochs start {name}'")


def _configuration(path: Path) -> str:
    from epochs.errors import NotFound, Refused

    try:
        return path.read_text()
    except FileNotFoundError:
        raise NotFound(f"configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"configuration {path} cannot be read: {error}") from error


@click.command("start")
@machine_argument
@click.pass_context
def start_command(ctx: click.Context, name: str) -> None:
    """Boot a machine, or let a paused one go on."""
    with opened(ctx) as store:
        done = store.machine(name).start()
        emit(ctx, {"machine": name, "action": done}, f"machine '{name}' {done}")


@click.command("stop")
@machine_argument
@click.option("--kill", is_flag=True, help="Pull the plug at once.")
@click.option("--timeout", type=float, default=60.0, show_default=True,
              help="Seconds that the guest has to power itself off.")
@click.pass_context
def stop_command(ctx: click.Context, name: str, kill: bool, timeout: float) -> None:
    """Power a machine off by its guest agent or ACPI."""
    with opened(ctx) as store:
        store.machine(name).stop(kill=kill, timeout=timeout)
        emit(ctx, {"machine": name, "action": "stopped"}, f"machine '{name}' stopped")


@click.command("pause")
@machine_argument
@click.pass_context
def pause_command(ctx: click.Context, name: str) -> None:
    """Hold a machine's CPUs until 'epochs start'."""
    with opened(ctx) as store:
        store.machine(name).pause()
        emit(ctx, {"machine": name, "action": "paused"}, f"machine '{name}' paused")


@click.command("list")
@click.pass_context
def list_command(ctx: click.Context) -> None:
    """List machines."""
    with opened(ctx) as store:
        store.settle()
        found = [machine.status() for machine in store.machines()]
        rows = [[one["name"], one["state"], output.size(one["memory"]), str(one["cpus"]),
                 one["accelerator"], str(one["epochs"]), (one["head"] or "-")[:12]]
                for one in found]
        emit(ctx, {"machines": found},
             output.table(["NAME", "STATE", "MEMORY", "CPUS", "ACCEL", "EPOCHS", "HEAD"], rows)
             if rows else "no machines yet; 'epochs add' registers one")


@click.command("status")
@machine_argument
@click.pass_context
def status_command(ctx: click.Context, name: str) -> None:
    """Show one machine."""
    with opened(ctx) as store:
        found = store.machine(name).status()
    rows = [
        ("state", found["state"] + (f": {found['detail']}" if found["detail"] else "")),
        ("memory", f"{output.size(found['memory'])}, {found['cpus']} CPUs"),
        ("runs as", f"{found['machine_type']}, {found['accelerator']}"
         + (f", QEMU {found['qemu']}, pid {found['pid']}" if found["pid"] else "")
         + (f", Xen {found['xen']}, domain {found['domid']}" if found["domid"] else "")),
        ("network", " ".join([found["net"], *([found["address"]] if found["address"] else []),
                              *found["publish"]])),
        ("display", "VGA" if found["vga"] else "none"),
        *(("disk", f"{disk['name']}: {disk['backend']}, {disk['chain']} layers"
           + (f", {output.size(room['free'])} of {output.size(room['total'])} free in "
              f"{room['where']}" if (room := disk["room"]) else "")) for disk in found["disks"]),
        ("head", (found["head"] or "no epoch yet")[:12]),
        ("epochs", str(found["epochs"])),
        ("console log", found["console_log"]),
    ]
    emit(ctx, found, "\n".join([f"machine {found['name']}",
                                *(f"  {key:<12} {value}" for key, value in rows)]))


@click.command("remove")
@machine_argument
@click.option("--with-epochs", is_flag=True, help="Delete the epochs that were made of it too.")
@click.option("--force", is_flag=True, help="Also if it is running.")
@click.pass_context
def remove_command(ctx: click.Context, name: str, with_epochs: bool, force: bool) -> None:
    """Forget a machine and its present disks. Its epochs stay unless asked for."""
    with opened(ctx) as store:
        done = store.machine(name).remove(with_epochs=with_epochs, force=force)
        emit(ctx, {"machine": name, "deleted_epochs": done.epochs},
             f"machine '{name}' removed" + (f" with {len(done.epochs)} epochs" if done.epochs
                                            else ""))
