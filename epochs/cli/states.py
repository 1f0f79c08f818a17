"""States: create, rollback, fork."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from epochs.cli import output
from epochs.cli.machines import machine_argument
from epochs.cli.output import complete_epoch, emit, opened

if TYPE_CHECKING:
    from epochs.fixup import Fixup

MAX_FORKS = 1000

no_fixup = click.option(
    "--fixup/--no-fixup", default=True,
    help="Through its agent set the guest's clock, renew its random numbers, and run its "
         "/etc/epochs/fixup (the default), or leave it alone.")


def tell(fixup: Fixup | None) -> None:
    """Say what was not done in a guest."""
    if fixup is None or not fixup.missed:
        return
    reasons: dict[str, list[str]] = {}
    for name, why in fixup.missed:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        output.notice(f"not done in the guest of '{fixup.machine}': {', '.join(names)} ({why})")


@click.command("create")
@machine_argument
@click.option("-m", "--message", default="", help="What this epoch is for.")
@click.option("-t", "--tag", "tags", multiple=True, help="Tag it (may be repeated).")
@click.option("--flat/--no-flat", default=None,
              help="Force or forbid a new flat pack (default: when it pays).")
@click.option("--if-running", is_flag=True, help="Do nothing, and succeed, if it is off or paused.")
@click.pass_context
def create_command(ctx: click.Context, name: str, message: str, tags: tuple[str, ...],
                   flat: bool | None, if_running: bool) -> None:
    """Make a live epoch of a running machine."""
    with opened(ctx) as store, output.progress(ctx) as progress:
        if if_running and (word := store.machine(name).status()["state"]) != "running":
            emit(ctx, {"machine": name, "skipped": word}, f"machine '{name}' is {word}: no epoch")
            return
        epoch = store.machine(name).create(message, tags, flat=flat, progress=progress)
        document = epoch.to_json()
    stats: dict[str, Any] = document["stats"]
    written = stats["pack_bytes"] + sum(stats["disk_bytes"].values())
    emit(ctx, document, f"epoch {epoch.id[:12]} of '{name}': paused "
         f"{stats['pause_seconds'] * 1e3:.1f} ms, {stats['pages_new']} pages, "
         f"{output.size(written)} written, {stats['total_seconds']:.2f} s in all")


@click.command("rollback")
@machine_argument
@click.argument("epoch", required=False, shell_complete=complete_epoch)
@click.option("--keep/--discard", "keep", default=True,
              help="Seal the present state as an epoch first (the default), or give it up.")
@no_fixup
@click.pass_context
def rollback_command(ctx: click.Context, name: str, epoch: str | None, keep: bool,
                     fixup: bool) -> None:
    """Put a machine back to EPOCH (default: its newest). It goes on from there."""
    with opened(ctx) as store, output.progress(ctx) as progress:
        if epoch is None and "@" in name:  # "rollback web@tag" names both
            name, epoch = name.partition("@")[0], name
        done = store.machine(name).rollback(epoch, keep=keep, fixup=fixup,
                                            progress=progress)
    kept = f"; its state until now is epoch {done['kept'][:12]}" if done["kept"] else ""
    told: Fixup | None = done["fixup"]
    tell(told)
    emit(ctx, {**done, "fixup": told.to_json() if told else None},
         f"machine '{name}' is back at epoch {done['epoch'][:12]} after "
         f"{done['seconds'] * 1e3:.0f} ms{kept}")


@click.command("fork")
@click.argument("epoch", shell_complete=complete_epoch)
@click.argument("newname")
@click.option("--count", type=click.IntRange(1, MAX_FORKS),
              help="Start so many, called NEWNAME-1, NEWNAME-2, ...")
@click.option("--publish", multiple=True, metavar="[ADDRESS:]PORT:GUESTPORT",
              help="Let a port of this host lead to one of the guest (may be repeated).")
@click.option("--paused", is_flag=True, help="Leave them paused.")
@click.option("--hostname", is_flag=True, help="Make each one's name its guest's host name.")
@click.option("--machine-id", is_flag=True, help="Give each guest an /etc/machine-id of its own.")
@no_fixup
@click.pass_context
def fork_command(ctx: click.Context, epoch: str, newname: str, count: int | None,
                 publish: tuple[str, ...], paused: bool, hostname: bool, machine_id: bool,
                 fixup: bool) -> None:
    """Start new machines from an epoch, sharing its memory and disks copy-on-write."""
    names = [newname] if count is None else [f"{newname}-{n}" for n in range(1, count + 1)]
    from epochs.fixup import Wishes

    if not fixup and (hostname or machine_id):
        raise click.UsageError("--no-fixup leaves the guest alone, so it goes with neither "
                               "--hostname nor --machine-id")
    with opened(ctx) as store:
        source = store.epoch(epoch).id
        machines = store.fork_many(source, names, publish=publish, paused=paused, fixup=fixup,
                                   wishes=Wishes(hostname, machine_id))
        found = [machine.status() for machine in machines]
    for machine in machines:
        tell(machine.fixup)
    emit(ctx, {"epoch": source, "machines": found,
               "fixups": [machine.fixup.to_json() for machine in machines if machine.fixup]},
         "\n".join(f"machine '{one['name']}' forked from epoch {source[:12]} ({one['state']})"
                   + (f" at {one['address']}" if one["address"] else "")
                   for one in found))
