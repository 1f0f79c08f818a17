"""Standby instances."""

from __future__ import annotations

from typing import Any

import click

from epochs.cli import output
from epochs.cli.output import complete_epoch, complete_machine, emit, notice, opened


@click.command("standby")
@click.argument("epoch", required=False, shell_complete=complete_epoch)
@click.option("--count", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
              help="So many; 0: none any more.")
@click.option("--for", "machine", metavar="NAME", shell_complete=complete_machine,
              help="For rollbacks of this machine (default: for forks).")
@click.option("--fixup/--no-fixup", default=True,
              help="As the rollback or the fork will say (default: --fixup).")
@click.option("--fill", is_flag=True, hidden=True, help="Make what is missing; in the background.")
@click.pass_context
def standby_command(ctx: click.Context, epoch: str | None, count: int, machine: str | None,
                    fixup: bool, fill: bool) -> int:
    """Have instances of EPOCH ready, so that going to it takes milliseconds.

    They are held, and take a process and the memory of its own each. One that was taken is replaced
    in the background. Without EPOCH, list them. They go with their epoch.
    """
    with opened(ctx) as store:
        if fill:
            store.fill_standbys(wait=False)
            return 0
        if epoch is None:
            found = store.standbys()
        else:
            wanted = store.epoch(epoch).id
            store.standby(wanted, count, machine=machine, fixup=fixup)
            found = [one for one in store.standbys()
                     if (one["epoch"], one["machine"], one["fixup"]) == (wanted, machine, fixup)]
    for one in found:
        if one["ready"] < one["count"] and one["trouble"]:
            notice(f"of {one['count']} standby instances {one['ready']} are ready: "
                   f"{one['trouble']}")
    emit(ctx, {"standbys": found}, "\n".join(map(_line, found)) or "no standby instances")
    return 5 if epoch and any(one["ready"] < one["count"] for one in found) else 0


def _line(one: dict[str, Any]) -> str:
    use = f"rollbacks of '{one['machine']}'" if one["machine"] else "forks"
    return (f"epoch {one['epoch'][:12]}: {one['ready']} of {one['count']} ready for {use}"
            f"{'' if one['fixup'] else ' with --no-fixup'}, {output.size(one['memory'])}")
