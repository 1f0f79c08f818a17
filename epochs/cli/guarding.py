"""Guarding and keeping: guard, prune, every."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from epochs.cli import output
from epochs.cli.guests import GuestCommand
from epochs.cli.machines import machine_argument
from epochs.cli.output import emit, notice, opened
from epochs.cli.states import tell

PERIODS = ("hourly", "daily", "weekly", "monthly", "yearly")
Function = TypeVar("Function", bound=Callable[..., Any])


@click.command("guard", cls=GuestCommand, context_settings={"ignore_unknown_options": True})
@click.option("--in-guest", is_flag=True, help="Run it in the guest through its agent.")
@click.option("--timeout", type=float, metavar="SECONDS",
              help="Go back if it takes longer, its check included; exit status 124.")
@click.option("--check", metavar="COMMAND",
              help="A line for the shell, run after it, where it ran; go back if that fails.")
@click.option("--keep-failed", is_flag=True,
              help="Seal the state that is given up as an epoch, to look into it.")
@machine_argument
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def guard_command(ctx: click.Context, name: str, argv: tuple[str, ...], in_guest: bool,
                  timeout: float | None, check: str | None, keep_failed: bool) -> int:
    """Make an epoch, run a command, and go back if it fails. Its exit status is ours.

    On this host it finds the machine's name in $EPOCHS_MACHINE. SIGINT, SIGTERM and SIGHUP end it,
    with what it started if we are not on a terminal, and undo what it did to the machine.
    """
    with opened(ctx) as store:
        done = store.machine(name).guard(
            list(argv), in_guest=in_guest, timeout=timeout, check=check, keep_failed=keep_failed,
            stdout=2 if ctx.obj["json"] else 1)  # there the document stands alone
    if done.undone is None:
        notice(f"'{name}' keeps what was done; 'epochs rollback {name} {done.epoch[:12]}' undoes "
               "it")
    else:
        kept = f"; the failed state is epoch {done.failed[:12]}" if done.failed else ""
        notice(f"{done.undone}: '{name}' is back at epoch {done.epoch[:12]}{kept}")
        tell(done.fixup)
    emit(ctx, done.to_json(), "")
    return done.status


def keeping(command: Function) -> Function:
    """The options that say what to keep."""
    options = [click.option("--keep-last", type=click.IntRange(min=0), default=0, metavar="N",
                            help="Keep the newest N.")]
    options += [click.option(f"--keep-{period}", type=click.IntRange(min=0), default=0, metavar="N",
                             help=f"Keep the newest of each of the last N {unit} that have any.")
                for period, unit in zip(PERIODS, ("hours", "days", "weeks", "months", "years"),
                                        strict=True)]
    options.append(click.option("--keep-tag", multiple=True, metavar="PATTERN",
                                help="Keep what has a tag like this ('*' is any; repeatable)."))
    options.append(click.option("--max-store", metavar="SIZE",
                                help="Then delete the oldest of the rest, but for the last N and "
                                     "tagged ones, until the store is no larger (like 50G)."))
    for option in reversed(options):
        command = option(command)
    return command


@click.command("prune")
@machine_argument
@keeping
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would go, and why the rest "
              "stays.")
@click.pass_context
def prune_command(ctx: click.Context, /, name: str, dry_run: bool, keep_tag: tuple[str, ...],
                  max_store: str | None, **keep: int) -> None:
    """Delete the epochs of NAME that no rule keeps; all others stay intact."""
    from epochs.retention import Policy
    from epochs.spec import parse_size

    policy = Policy(tags=keep_tag, **{key.removeprefix("keep_"): n for key, n in keep.items()})
    limit = None if max_store is None else parse_size(max_store)
    with opened(ctx) as store:
        done = store.machine(name).prune(policy, max_store=limit, dry_run=dry_run)
    rows = [(one.id[:12], output.when(one.created), "keep" if one.kept else "delete",
             ", ".join(one.reasons)) for one in done.decisions]
    count = len(done.deleted)
    last = (f"{count} would be deleted" if dry_run else
            f"{count} deleted, {output.size(max(0, done.freed))} given back; the store occupies "
            f"{output.size(done.used)}")
    emit(ctx, done.to_json(),
         output.table(("EPOCH", "MADE", "", "WHY"), rows) + f"\n{last}" if rows else last)
    if not dry_run and limit is not None and done.used > limit:
        notice(f"the store still occupies {output.size(done.used)}: the rest is needed, or "
               "belongs to other machines")


@click.command("every")
@click.argument("interval")
@machine_argument
@keeping
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path),
              help="Where the units go (default: where systemd looks for ours).")
@click.pass_context
def every_command(ctx: click.Context, /, interval: str, name: str, directory: Path | None,
                  keep_tag: tuple[str, ...], max_store: str | None, **keep: int) -> None:
    """Write a systemd timer that makes an epoch of NAME every INTERVAL, and prunes.

    INTERVAL is a time span like 15min, or a calendar expression like daily or 'Mon..Fri 03:00'.
    """
    from epochs import timers
    from epochs.spec import parse_size

    rules = [word for key, n in keep.items() if n
             for word in (f"--{key.replace('_', '-')}", str(n))]
    rules += [word for pattern in keep_tag for word in ("--keep-tag", pattern)]
    if max_store is not None:
        parse_size(max_store)
        rules += ["--max-store", max_store]
    with opened(ctx) as store:
        made = timers.write(store.machine(name).name, interval, store.files.path, rules, directory)
    emit(ctx, {"machine": name, "service": str(made.service), "timer": str(made.timer),
               "commands": made.commands},
         f"written: {made.service} and {made.timer}\nto start it: "
         + " && ".join(made.commands))
