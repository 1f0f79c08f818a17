"""Upkeep: delete, gc, verify, recover, doctor, completion."""

from __future__ import annotations

import click

from epochs.cli import output
from epochs.cli.output import complete_epoch, emit, opened


@click.command("delete")
@click.argument("epochs", nargs=-1, required=True, shell_complete=complete_epoch)
@click.pass_context
def delete_command(ctx: click.Context, epochs: tuple[str, ...]) -> None:
    """Delete epochs, also from the middle of the graph; all others stay intact."""
    with opened(ctx) as store:
        done = store.delete(epochs)
        emit(ctx, {"deleted": done.epochs, "freed": done.freed},
             f"{len(done.epochs)} deleted, {output.size(max(0, done.freed))} given back")


@click.command("gc")
@click.pass_context
def gc_command(ctx: click.Context) -> None:
    """Merge and drop what nothing needs, and remove files that nobody names."""
    with opened(ctx) as store:
        done = store.gc()
        emit(ctx, done, "\n".join([f"{output.size(max(0, done['freed']))} given back",
                                   *(f"removed {path}" for path in done["removed"])]))


@click.command("verify")
@click.argument("epochs", nargs=-1, shell_complete=complete_epoch)
@click.pass_context
def verify_command(ctx: click.Context, epochs: tuple[str, ...]) -> int:
    """Read every byte that the epochs (default: all) depend on; exit status 6 if any is bad."""
    with opened(ctx) as store, output.progress(ctx) as progress:
        findings = store.verify(epochs or None,
                                lambda done, total: progress("epochs", done, total))
        count = len(epochs) or len(store.epochs())
    emit(ctx, {"epochs": count, "findings": [finding.to_json() for finding in findings]},
         "\n".join(f"epoch {finding.epoch[:12]}: {finding.reason} ({finding.file})"
                   for finding in findings) or f"{count} epochs, no damage")
    return 6 if findings else 0


@click.command("recover")
@click.pass_context
def recover_command(ctx: click.Context) -> None:
    """Settle what an interrupted command left. Every command does this first."""
    with opened(ctx) as store:
        settled = store.settle()
        emit(ctx, {"recovered": [{"operation": one.kind, "machine": one.machine,
                                  "outcome": one.outcome} for one in settled]},
             "" if settled else "nothing to recover")


@click.command("doctor")
@click.pass_context
def doctor_command(ctx: click.Context) -> int:
    """Say what this host can do, and what is missing with the command that mends it."""
    from epochs.doctor import examine

    checks = examine(ctx.obj["store"])
    emit(ctx, {"checks": [check.to_json() for check in checks]},
         "\n".join(f"{check.mark} {check.name:<22} {check.detail}"
                   + (f"\n    mend: {check.mend}" if check.mend else "") for check in checks))
    return 4 if any(check.state == "missing" for check in checks) else 0


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script, e.g. for: eval "$(epochs completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"there is no completion for {shell}")
    print(found(ctx.find_root().command, {}, "epochs", "_EPOCHS_COMPLETE").source())
